"""Fixtures of the commands' tests."""

import pytest

from oracle_run import OracleRun, make_oracle_run


@pytest.fixture(scope="session")
def oracle_run(tmp_path_factory: pytest.TempPathFactory) -> OracleRun:
    """Return a run of six photographs; a test may add finals to it, and nothing else."""
    return make_oracle_run(tmp_path_factory.mktemp("oracle-run"))
