"""The same runs on a real S3 server: same bytes as on a path, an outage is waited out, errors are named."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mill_jobs.config import read_config
from mill_jobs.final import fetch_final
from mill_jobs.run import open_run
from mill_shared.errors import ExitCode
from runs import SAMPLE, final_files, finalize, label_all, last_error, mill, start_mill, write_run
from seaweed import BUCKET, CREDENTIALS, SeaweedFS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    found = SeaweedFS(tmp_path_factory.mktemp("seaweed"))
    yield found
    found.kill()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


def upload_images(server: SeaweedFS, count: int) -> str:
    client = server.client()
    for path in sorted((SAMPLE / "images").iterdir())[:count]:
        client.upload_file(str(path), BUCKET, f"photos/{path.name}")
    return f"s3://{BUCKET}/photos"


def test_a_run_on_s3_has_the_bytes_of_a_run_on_a_path(server: SeaweedFS, tmp_path: Path) -> None:
    local = label_all(write_run(tmp_path / "local"))
    on_path = finalize(local)
    path = write_run(
        tmp_path / "s3", name="same", store=f"s3://{BUCKET}/runs", storage=server.storage,
        dataset={"images": upload_images(server, 12)},
    )  # fmt: skip
    ended = mill("local", path, "--workers", 2)
    assert ended.returncode == 0, ended.stderr
    config = read_config(path)
    on_s3 = finalize(config)
    store, _ = open_run(config)
    fetch_final(store, "same", on_s3.digest, tmp_path / "bundle")
    fetched = {file.name: file.read_bytes() for file in (tmp_path / "bundle").iterdir()}
    expected = final_files(local, on_path)
    for name in ("instances.json", "classes.json", "weights.json", "regions.parquet", "summary.json"):
        assert fetched[name] == expected[name], name
    assert mill("verify", path).returncode == 0


def test_the_bucket_gone_for_a_while_costs_nothing_but_time(server: SeaweedFS, tmp_path: Path) -> None:
    path = write_run(
        tmp_path, name="outage", images=45, sharding={"chunk_size": 1}, store=f"s3://{BUCKET}/runs",
        storage=server.storage,
    )  # fmt: skip
    worker = start_mill("label", path)
    client = server.client()
    prefix = "runs/outage/pass-0/chunks/"
    deadline = time.monotonic() + 60
    while client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("KeyCount", 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.kill()
    time.sleep(8)
    server.start()
    ended = worker.wait_for(150)
    assert ended.returncode == 0, ended.stderr
    assert '"waiting"' in ended.stderr
    verified = mill("verify", path)
    assert verified.returncode == 0, verified.stderr
    assert "45 of 45 images recorded" in verified.stdout


def test_workers_and_finalize_that_start_during_an_outage_wait_too(server: SeaweedFS, tmp_path: Path) -> None:
    path = write_run(tmp_path, name="early", images=4, store=f"s3://{BUCKET}/runs", storage=server.storage)
    for command in (["label"], ["finalize", "--no-report"]):
        server.kill()
        waiting = start_mill(*command, path)
        assert waiting.stderr is not None
        while '"waiting"' not in (line := waiting.stderr.readline()):
            assert line, "it ended"
        server.start()
        ended = waiting.wait_for(120)
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("store", "environment", "message"),
    [
        ("s3://no-such-bucket/runs", {}, "no such bucket: no-such-bucket"),
        (f"s3://{BUCKET}/runs", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "not permitted"),
        (f"s3://{BUCKET}/runs", {"AWS_ACCESS_KEY_ID": "nobody"}, "not permitted"),
    ],
)
def test_what_is_wrong_for_ever_stops_at_once(
    server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, environment: dict[str, str],
    message: str,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = mill("label", write_run(tmp_path, name="wrong", store=store, storage=server.storage))
    assert ended.returncode == ExitCode.CONFIG, ended.stderr
    assert message in last_error(ended)
    assert "Traceback" not in ended.stderr


def test_no_credentials_are_named(server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    ended = mill("label", write_run(tmp_path, store=f"s3://{BUCKET}/runs", storage=server.storage))
    assert ended.returncode == ExitCode.CONFIG
    assert "no credentials for S3; set AWS_ACCESS_KEY_ID" in last_error(ended)


def test_a_server_that_is_not_there_is_outside(tmp_path: Path) -> None:
    path = write_run(
        tmp_path, store=f"s3://{BUCKET}/runs", limits={"outside_wait_s": 0},
        storage={"endpoint": "http://127.0.0.1:9", "path_style": True, "region": "us-east-1"},
    )  # fmt: skip
    ended = mill("label", path)
    assert ended.returncode == ExitCode.OUTSIDE
    assert "Traceback" not in ended.stderr
