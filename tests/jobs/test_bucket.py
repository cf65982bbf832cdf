"""The probe against stores that keep their promises and stores that do not."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mill_jobs.bucket import clock_check, probe_create_once, probe_url
from mill_shared.config import StorageConfig
from mill_shared.storage import LocalStore, open_store
from runs import mill, write_run


class Overwriting(LocalStore):
    """A server that accepts If-None-Match and ignores it."""

    def put_new(self, key: str, data: bytes) -> None:
        self.put(key, data)


class Forbidding(BaseHTTPRequestHandler):
    """A server that hides absent keys: 403 to everything."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def forbidding() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Forbidding)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_folder_keeps_every_promise_and_can_be_probed_again(tmp_path: Path) -> None:
    for _ in range(2):
        assert [check.ok for check in probe_url(str(tmp_path), StorageConfig())] == [True, True, True]
    assert len(list(tmp_path.glob(".labelmill-probe/*"))) == 2


def test_a_real_server_keeps_every_promise(s3: "object") -> None:
    from seaweed import BUCKET, SeaweedFS

    assert isinstance(s3, SeaweedFS)
    storage = StorageConfig(endpoint=s3.endpoint, path_style=True, region="us-east-1")
    checks = probe_url(f"s3://{BUCKET}/probe", storage)
    assert {check.name: check.ok for check in checks} == {
        "clock": True, "absent key": True, "write": True, "create-once": True,
    }  # fmt: skip
    missing = {check.name: check for check in probe_url("s3://no-such-bucket/x", storage)}
    assert not missing["absent key"].ok
    assert "no such bucket: no-such-bucket; make it" in missing["absent key"].text


def test_a_server_that_ignores_create_once_is_found_out(tmp_path: Path) -> None:
    check = probe_create_once(Overwriting(tmp_path))
    assert not check.ok
    assert "overwrites all the same" in check.text
    assert probe_create_once(LocalStore(tmp_path)).ok


def test_a_server_that_hides_absent_keys_is_found_out(forbidding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    storage = StorageConfig(endpoint=forbidding, path_style=True, region="us-east-1")
    found = {check.name: check for check in probe_url("s3://bucket/x", storage)}
    assert found["clock"].ok
    assert not found["absent key"].ok
    assert "need GetObject, PutObject and ListBucket" in found["absent key"].text


@pytest.mark.parametrize(
    ("date", "now", "ok", "says"),
    [
        ("Thu, 01 Jan 1970 00:10:00 GMT", 600.0, True, "within 0 s"),
        ("Thu, 01 Jan 1970 00:10:00 GMT", 899.0, True, "within 299 s"),
        ("Thu, 01 Jan 1970 00:10:00 GMT", 1000.0, False, "+400 s off"),
        ("Thu, 01 Jan 1970 00:10:00 GMT", 0.0, False, "-600 s off"),
        (None, 0.0, True, "does not say"),
        ("yesterday", 0.0, True, "that is none"),
    ],
)
def test_the_clock_is_compared(date: str | None, now: float, ok: bool, says: str) -> None:
    check = clock_check("http://server", date, now)
    assert check.ok is ok
    assert says in check.text


def test_the_command_probes_a_run_file_and_says_what_is_wrong(tmp_path: Path) -> None:
    good = write_run(tmp_path, images=2)
    ended = mill("probe", good, "--json")
    assert ended.returncode == 0, ended.stderr
    assert all(json.loads(line)["ok"] for line in ended.stdout.splitlines())
    bad = write_run(tmp_path / "bad", images=2, finalize={"base": "/no/such/base.json"})
    ended = mill("probe", bad)
    assert ended.returncode == 78
    assert "PROBLEM  finalize.base: no such file here: /no/such/base.json" in ended.stdout


def test_a_failed_worker_leaves_the_end_of_its_log_in_the_store(tmp_path: Path) -> None:
    run_file = write_run(tmp_path, images=4, dataset={"coco": None, "images": str(tmp_path / "gone")})
    ended = mill("label", run_file, "--shard=1/3")
    assert ended.returncode == 78
    store = open_store(str(tmp_path / "store"))
    [entry] = list(store.list("run/failures/"))
    assert entry.key.startswith("run/failures/00001-of-00003/")
    text = store.get(entry.key).decode()
    assert "Traceback" in text
    assert "no such folder" in text


def test_a_pilot_labels_the_first_chunks_and_the_rest_follows(tmp_path: Path) -> None:
    run_file = write_run(tmp_path, images=8)
    assert mill("label", run_file, "--first=3").returncode == 0
    store = open_store(str(tmp_path / "store"))
    assert [entry.key[-14:] for entry in store.list("run/pass-0/chunks/")] == ["000000.parquet", "000001.parquet"]
    assert mill("finalize", run_file, "--no-report").returncode == 80
    assert mill("finalize", run_file, "--no-report", "--set=limits.min_coverage=0").returncode == 0
    assert mill("label", run_file).returncode == 0
    assert len(list(store.list("run/pass-0/chunks/"))) == 4
    assert mill("finalize", run_file, "--no-report").returncode == 0
