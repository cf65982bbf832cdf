"""The command as it is typed: help, usage, and what it says without a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mill_k8s.cli import millctl


def typed(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mill_k8s.cli", *arguments]
    env = {**os.environ, "KUBECONFIG": "/no/such/kubeconfig", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


@pytest.mark.parametrize("name", sorted(millctl.commands))
def test_every_command_and_every_option_has_help(name: str) -> None:
    command = millctl.commands[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name}"


def test_help_needs_neither_the_client_nor_numpy() -> None:
    program = (
        "import json, sys\nfrom click.testing import CliRunner\nfrom mill_k8s.cli import millctl\n"
        "CliRunner().invoke(millctl, ['submit', '--help'])\nprint(json.dumps(sorted(sys.modules)))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert not {"kubernetes", "numpy", "pyarrow", "pydantic", "boto3", "torch"} & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("submit",), "Missing option '--shards'"),
        (("submit", "--shards", "0"), "not in the range"),
        (("submit", "--shards", "2", "-o", "yaml"), "-o goes with --dry-run"),
        (("submit", "no-such.yaml", "--shards", "2"), "does not exist"),
        (("rerun", "r", "--reason", "decode"), "--reason goes with --failed"),
        (("logs", "r", "--finalize", "--shard", "1"), "leave --finalize out"),
        (("wait", "r", "--", "mill", "finalize"), "--attempt and --run-file"),
    ],
)
def test_a_wrong_combination_is_a_usage_error(arguments: tuple[str, ...], says: str) -> None:
    ended = typed(*arguments)
    assert ended.returncode == 2
    assert says in ended.stderr


@pytest.mark.parametrize("arguments", [("runs",), ("status", "r"), ("submit", "--shards", "2"), ("doctor",)])
def test_without_a_cluster_it_says_what_to_set(arguments: tuple[str, ...]) -> None:
    ended = typed(*arguments)
    assert ended.returncode == 78
    entry = json.loads(ended.stderr.strip().splitlines()[-1])
    assert "set KUBECONFIG" in entry["event"]


def test_an_api_that_does_not_answer_is_worth_another_try(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "config"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
                "users": [{"name": "u", "user": {}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "mine"}}],
            }
        )
    )
    ended = typed("runs", KUBECONFIG=str(kubeconfig))
    assert ended.returncode == 75
    assert "does not answer" in json.loads(ended.stderr.strip().splitlines()[-1])["event"]
    ended = typed("runs", "--context", "other", KUBECONFIG=str(kubeconfig))
    assert ended.returncode == 78
