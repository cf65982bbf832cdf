"""What every test gets: a clean environment, and a real S3 server for those that ask."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from seaweed import SeaweedFS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a browser, so that a machine without one can run the rest."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own AWS settings, and keep the SDK from asking a metadata server."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MILL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[SeaweedFS]":
    """One server on loopback for a session (with xdist: for a worker), with a bucket; ended by its process."""
    from seaweed import SeaweedFS

    server = SeaweedFS(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: "SeaweedFS", clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> "SeaweedFS":
    """The session's server, with its credentials in this test's environment."""
    from seaweed import CREDENTIALS

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return s3_server
