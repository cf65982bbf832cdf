"""What a store promises, on a path and on a real S3 server, and what it answers when something is wrong."""

import http.client
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ClientError

from mill_shared import storage
from mill_shared.config import StorageConfig
from mill_shared.errors import AlreadyExists, ConfigError, KeyMissing, OutsideError
from mill_shared.storage import LocalStore, S3Store, Store, open_store
from seaweed import BUCKET, SeaweedFS

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def s3_config(server: SeaweedFS, **changes: object) -> StorageConfig:
    return StorageConfig.model_validate({**server.storage, "timeout_s": 30, **changes})


@pytest.fixture
def prefix() -> str:
    return f"tests/{uuid.uuid4().hex}"


OpenBucket = Callable[..., S3Store]


@pytest.fixture(scope="module")
def clients() -> dict[StorageConfig, "S3Client"]:
    return {}


@pytest.fixture
def open_bucket(s3: SeaweedFS, prefix: str, clients: dict[StorageConfig, "S3Client"]) -> OpenBucket:
    """Return what opens the test's own prefix; a client takes a fifth of a second to make and is kept."""

    def opened(**changes: object) -> S3Store:
        config, url = s3_config(s3, **changes), f"s3://{BUCKET}/{prefix}"
        if config not in clients:
            clients[config] = storage._make_client(url, config)
        return S3Store(url, BUCKET, prefix, config, clients[config])

    return opened


@pytest.fixture
def bucket(open_bucket: OpenBucket) -> Store:
    return open_bucket()


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture(params=["path", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.getfixturevalue("folder" if request.param == "path" else "bucket")
    return found


# What every store promises


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "one byte", "1.2 MB"])
def test_what_was_put_is_read(store: Store, data: bytes) -> None:
    store.put("folder/näme with spaces+%.bin", data)
    assert store.get("folder/näme with spaces+%.bin") == data
    assert store.size("folder/näme with spaces+%.bin") == len(data)
    assert store.exists("folder/näme with spaces+%.bin")


def test_put_writes_over_an_older_object(store: Store) -> None:
    store.put("key", b"a longer first content")
    store.put("key", b"second")
    assert store.get("key") == b"second"


@pytest.mark.parametrize("key", ["absent", "chunks/absent", "chunks", "chunks/000001.parquet/below"])
def test_what_is_not_there_is_missing(store: Store, tmp_path: Path, key: str) -> None:
    store.put("chunks/000001.parquet", b"x")
    for read in (store.get, store.size, lambda key: store.get_file(key, tmp_path / "got" / "file")):
        with pytest.raises(KeyMissing):
            read(key)
    assert not store.exists(key)
    assert [path for path in (tmp_path / "got").rglob("*") if path.is_file()] == []


def test_put_new_writes_once(store: Store) -> None:
    store.put_new("plan.json", b"first")
    store.put_new("plan.json", b"first")  # our own write, tried again
    with pytest.raises(AlreadyExists):
        store.put_new("plan.json", b"other")
    assert store.get("plan.json") == b"first"


def test_sixteen_writers_of_one_new_key_have_one_winner(store: Store) -> None:
    start = threading.Barrier(16)
    rounds = range(20 if isinstance(store, LocalStore) else 1)  # the server takes seconds to serve such a crowd

    def write(number: int) -> list[bool]:
        won = []
        for key in rounds:
            start.wait(60)
            try:
                store.put_new(f"contested/{key}", b"%d" % number)
                won.append(True)
            except AlreadyExists:
                won.append(False)
        return won

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, range(16)))
    for key in rounds:
        winners = [number for number in range(16) if won[number][key]]
        assert len(winners) == 1
        assert store.get(f"contested/{key}") == b"%d" % winners[0]


def test_many_threads_share_a_store(store: Store) -> None:
    def both_ways(number: int) -> bool:
        store.put(f"shared/{number}", b"%d" % number * 1000)
        return store.get(f"shared/{number}") == b"%d" % number * 1000

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(both_ways, range(96)))
    assert len(list(store.list("shared/"))) == 96


def test_files_go_both_ways(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new folder" / "target"
    source.write_bytes(os.urandom(9 * 2**20 + 17))
    store.put("file", b"older")
    store.put_file("file", source)
    store.get_file("file", target)
    assert target.read_bytes() == source.read_bytes()
    source.write_bytes(b"short")
    store.put_file("file", source)
    store.get_file("file", target)
    assert target.read_bytes() == b"short"
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert target.stat().st_mode == source.stat().st_mode


def test_a_listing_is_in_the_order_of_keys_and_relative_to_the_root(store: Store) -> None:
    # A folder's name sorts before its siblings "a-b" and "a.txt", its objects behind them.
    keys = ["Z", "a-b", "a.txt", "a/b", "a/c/d.parquet", "a0", "ä", "猫/x"]
    for key in reversed(keys):
        store.put(key, key.encode())
    assert [entry.key for entry in store.list("")] == keys
    assert [entry.size_bytes for entry in store.list("")] == [len(key.encode()) for key in keys]


def test_a_listing_takes_any_prefix(store: Store) -> None:
    for key in ("pass-0/chunks/000009", "pass-0/chunks/000010", "pass-0/chunks/000011", "pass-0/progress", "pass-1/x"):
        store.put(key, b"")

    def listed(prefix: str) -> list[str]:
        return [entry.key for entry in store.list(prefix)]

    assert listed("pass-0/chunks/00001") == ["pass-0/chunks/000010", "pass-0/chunks/000011"]
    assert listed("pass-0/") == [
        "pass-0/chunks/000009", "pass-0/chunks/000010", "pass-0/chunks/000011", "pass-0/progress",
    ]  # fmt: skip
    assert listed("pass-0/progress") == ["pass-0/progress"]
    assert len(listed("pass")) == 5
    assert listed("none") == listed("none/below") == listed("pass-0/progress/below") == []


@pytest.mark.parametrize("key", ["", "/etc/passwd", "..", "../x", "a/../../x", "a//b", "a/", "./a", "a\\b"])
def test_unsafe_keys_are_refused(store: Store, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    calls: list[Callable[[], object]] = [
        lambda: store.get(key), lambda: store.put(key, b"x"), lambda: store.put_new(key, b"x"),
        lambda: store.get_file(key, tmp_path / "file"), lambda: store.put_file(key, tmp_path / "file"),
        lambda: store.exists(key), lambda: store.size(key),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="unsafe key"):
            call()


@pytest.mark.parametrize("prefix_of_keys", ["/etc", "..", "../", "a/../../b", "./a"])
def test_unsafe_prefixes_are_refused(store: Store, prefix_of_keys: str) -> None:
    with pytest.raises(ValueError, match="unsafe prefix"):
        list(store.list(prefix_of_keys))


@pytest.mark.parametrize("name", ["folder", "file/below", "n" * 300])
def test_a_target_that_cannot_be_written_is_named(store: Store, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    store.put("key", b"data")
    with pytest.raises(ConfigError, match=f"^{tmp_path / name}: .*; choose a folder that this user may use$"):
        store.get_file("key", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} - {"store"} == {"folder", "file"}
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("name", ["absent", "folder", "file/below", "n" * 300])
def test_a_source_that_cannot_be_read_is_named(store: Store, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"^{tmp_path / name}: .*; name a file that this user may read$"):
        store.put_file("new folder/key", tmp_path / name)
    assert list(store.list("")) == []


def test_a_full_disk_is_outside_and_leaves_no_half_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "S3_TRIES", 1)
    store.put("key", bytes(2**20))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))  # no test may fill a disk; this fails the same way
    try:
        with pytest.raises(OutsideError, match=f"^{tmp_path / 'got' / 'file'}: "):
            store.get_file("key", tmp_path / "got" / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "got").iterdir()) == []
    store.get_file("key", tmp_path / "got" / "file")
    assert (tmp_path / "got" / "file").read_bytes() == bytes(2**20)


@pytest.mark.parametrize(
    ("url", "message"),
    [("", "expected s3://bucket/prefix or a path"), ("s3://", "no bucket"), ("gs://bucket/x", "unknown kind of store")],
)
def test_other_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_store(url)


# A folder


def run_python(code: str, *arguments: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)


def test_a_path_needs_no_boto3(tmp_path: Path) -> None:
    code = """
import sys
from mill_shared.storage import open_store
store = open_store(sys.argv[1])
store.put("x", b"x"), store.put_new("y", b"y"), list(store.list(""))
sys.exit("boto3" in sys.modules or "botocore" in sys.modules)
"""
    with run_python(code, tmp_path) as ended:
        assert ended.wait(60) == 0


def test_reading_a_folder_leaves_no_trace_in_it(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    store = open_store(str(tmp_path))
    assert [entry.key for entry in store.list("")] == ["photo.jpg"]
    assert store.get("photo.jpg") == b"x"
    assert store.exists("photo.jpg")
    with pytest.raises(KeyMissing):
        store.get("absent")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_folder_that_is_not_there_is_an_empty_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "absent"))
    assert list(store.list("")) == []
    assert not store.exists("x")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("attempt", range(4))
def test_a_process_killed_while_it_writes_leaves_the_old_object_or_the_new_one(tmp_path: Path, attempt: int) -> None:
    code = """
import sys
from pathlib import Path
from mill_shared.storage import LocalStore
store = LocalStore(Path(sys.argv[1]))
store.put("key", b"0" * 4_000_000)
print("started", flush=True)
while True:
    for number in range(10):
        store.put("key", b"%d" % number * 4_000_000)
"""
    writer = run_python(code, tmp_path)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == b"started\n"
    time.sleep(0.013 * attempt)
    writer.kill()
    writer.wait(30)
    store = LocalStore(tmp_path)
    data = store.get("key")
    assert len(data) == 4_000_000
    assert len(set(data)) == 1
    assert [entry.key for entry in store.list("")] == ["key"]
    store.put("key", b"after")
    assert store.get("key") == b"after"


def test_what_a_killed_writer_left_is_never_listed(folder: LocalStore) -> None:
    folder.put("a/b", b"x")
    (folder.scratch_folder() / "left").write_bytes(b"half")
    assert [entry.key for entry in folder.list("")] == ["a/b"]


def test_an_unfinished_file_in_the_scratch_folder_can_become_an_object(folder: LocalStore) -> None:
    unfinished = folder.scratch_folder() / "merged.json"
    unfinished.write_bytes(b"merged")
    folder.put_file("final/merged.json", unfinished)
    unfinished.unlink()
    assert folder.get("final/merged.json") == b"merged"
    assert list(folder.scratch_folder().iterdir()) == []


@pytest.mark.parametrize("write", ["put", "put_new", "put_file"])
def test_an_object_and_each_new_folder_above_it_are_on_disk_before_the_write_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def recorded(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        flushed.append(str(path.relative_to(tmp_path)) if path.is_dir() else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    (tmp_path / "source").write_bytes(b"x")
    content = tmp_path / "source" if write == "put_file" else b"x"

    def flushes(store: LocalStore, key: str) -> list[str]:
        flushed.clear()
        getattr(store, write)(key, content)
        return flushed

    store = LocalStore(tmp_path / "new" / "store")
    first = flushes(store, "run/chunks/1")
    assert {".", "new", "new/store", "new/store/run"} <= set(first[:-2])
    assert first[-2:] == ["file", "new/store/run/chunks"]
    assert flushes(store, "run/chunks/2") == ["file", "new/store/run/chunks"]
    # Another process may have made the folders and not yet have flushed them.
    assert {"new/store", "new/store/run"} <= set(flushes(LocalStore(tmp_path / "new" / "store"), "run/chunks/3"))
    assert set(flushes(store, "run/other/1")) == {"file", "new/store", "new/store/run", "new/store/run/other"}


@pytest.mark.parametrize("write", ["put", "put_new"])
def test_a_file_system_without_hard_links_is_refused_at_the_first_write(
    folder: LocalStore, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    def link(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what FAT answers; no test may mount one

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ConfigError, match=r"store: this file system has no hard links.*use another folder or a bucket"):
        getattr(folder, write)("key", b"x")
    assert list(folder.list("")) == []


def test_linked_folders_are_listed_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.jpg").write_bytes(b"22")
    root = tmp_path / "images"
    root.mkdir()
    (root / "1.jpg").write_bytes(b"1")
    (root / "train").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(root)
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "dangling.jpg").symlink_to(tmp_path / "gone")
    os.mkfifo(root / "pipe.jpg")
    store = LocalStore(root)
    assert [(entry.key, entry.size_bytes) for entry in store.list("")] == [("1.jpg", 1), ("train/2.jpg", 2)]
    assert store.get("train/2.jpg") == b"22"


def test_paths_that_cannot_work_are_wrong_for_ever(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="file: "):
        list(open_store(str(tmp_path / "file")).list(""))
    store = open_store(str(tmp_path))
    for write in (store.put, store.put_new):
        for key in ("file/below", "folder", "n" * 300):
            with pytest.raises(ConfigError, match=key[:200]):
                write(key, b"x")


# A bucket


def test_the_server_honours_create_once(s3: SeaweedFS, prefix: str) -> None:
    client = s3.client()
    client.put_object(Bucket=BUCKET, Key=prefix, Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=BUCKET, Key=prefix, Body=b"second", IfNoneMatch="*")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412


def test_keys_lie_below_the_prefix(s3: SeaweedFS, bucket: Store, prefix: str) -> None:
    bucket.put("a/b", b"x")
    s3.client().put_object(Bucket=BUCKET, Key=f"{prefix}-other/c", Body=b"y")
    assert s3.client().get_object(Bucket=BUCKET, Key=f"{prefix}/a/b")["Body"].read() == b"x"
    (entry,) = bucket.list("")
    assert (entry.key, entry.size_bytes, len(entry.etag)) == ("a/b", 1, 32)
    assert bucket.url == f"s3://{BUCKET}/{prefix}"


def test_a_whole_bucket_is_a_store_and_folder_marks_are_no_objects(s3: SeaweedFS) -> None:
    client = s3.client()
    name = f"whole-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    client.put_object(Bucket=name, Key="folder/", Body=b"")
    store = open_store(f"s3://{name}", s3_config(s3))
    store.put("folder/x", b"x")
    assert [entry.key for entry in store.list("")] == ["folder/x"]


def test_a_listing_of_many_pages(s3: SeaweedFS, bucket: Store, prefix: str) -> None:
    keys = [f"{number:03d}" for number in range(25)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: bucket.put(key, b""), keys))
    client = s3.client()
    pages = []

    def small_pages(params: dict[str, object], **_: object) -> None:
        params["MaxKeys"] = 4
        pages.append(params.get("ContinuationToken"))

    client.meta.events.register("provide-client-params.s3.ListObjectsV2", small_pages)
    store = S3Store("s3://x", BUCKET, prefix, s3_config(s3), client)
    assert [entry.key for entry in store.list("")] == keys
    assert len(pages) == 7


def test_large_files_go_in_parts(
    s3: SeaweedFS, bucket: Store, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    (tmp_path / "large").write_bytes(os.urandom(11 * 2**20))
    bucket.put_file("large", tmp_path / "large")
    assert s3.client().head_object(Bucket=BUCKET, Key=f"{prefix}/large")["ETag"].endswith('-3"')
    bucket.get_file("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()


# A bucket in trouble


class FaultyProxy:
    """Passes requests on to the server, except where a fault is due.

    Faults, one a request, in the order given: `cut` (closed without an answer), `lose` (passed on, the answer thrown
    away), `half` (half of the answer's body), or a status with its S3 error code, as in `503 SlowDown`; `` is none.
    """

    def __init__(self, target: SeaweedFS) -> None:
        self.faults: list[str] = []
        self.always = ""
        self.requests: list[str] = []
        self.headers: list[list[str]] = []
        host, port = target.endpoint.removeprefix("http://").split(":")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.requests.append(self.command)
                proxy.headers.append([name.lower() for name in self.headers])
                fault = proxy.faults.pop(0) if proxy.faults else proxy.always
                if fault == "cut":
                    self.close_connection = True
                    return
                if fault[:1].isdigit():
                    status, _, code = fault.partition(" ")
                    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made up</Message></Error>"
                    self.answer(int(status), [], text.encode())
                    return
                upstream = http.client.HTTPConnection(host, int(port), timeout=20)
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    upstream.putheader(name, value)
                upstream.endheaders(body)
                response = upstream.getresponse()
                data = response.read()
                upstream.close()
                if fault == "lose":
                    self.close_connection = True
                    return
                self.answer(response.status, response.getheaders(), data, half=fault == "half")

            def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, half: bool = False) -> None:
                self.send_response(status)
                lengths = [value for name, value in headers if name.lower() == "content-length"]
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", lengths[0] if self.command == "HEAD" and lengths else str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if half else data)
                self.close_connection = self.close_connection or half

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = serve

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def running_proxy(s3_server: SeaweedFS) -> Iterator[FaultyProxy]:
    found = FaultyProxy(s3_server)
    yield found
    found.close()


@pytest.fixture
def proxy(running_proxy: FaultyProxy) -> FaultyProxy:
    running_proxy.always = ""
    for record in (running_proxy.faults, running_proxy.requests, running_proxy.headers):
        record.clear()
    return running_proxy


@pytest.fixture
def flaky(proxy: FaultyProxy, open_bucket: OpenBucket) -> Store:
    return open_bucket(endpoint=proxy.endpoint)


@pytest.mark.parametrize("fault", ["cut", "503 SlowDown", "429 TooManyRequests", "409 OperationAborted"])
def test_one_fault_a_request_is_invisible(flaky: Store, proxy: FaultyProxy, tmp_path: Path, fault: str) -> None:
    (tmp_path / "source").write_bytes(b"file")
    for action, expected in (
        (lambda: flaky.put("put", b"data"), None),
        (lambda: flaky.put_new("new", b"data"), None),
        (lambda: flaky.put_file("file", tmp_path / "source"), None),
        (lambda: flaky.get("put"), b"data"),
        (lambda: flaky.size("new"), 4),
        (lambda: flaky.exists("absent"), False),
        (lambda: [entry.key for entry in flaky.list("")], ["file", "new", "put"]),
        (lambda: flaky.get_file("file", tmp_path / "target"), None),
    ):
        proxy.faults = [fault]
        assert action() == expected
        assert proxy.faults == []
    assert (tmp_path / "target").read_bytes() == b"file"


def test_a_write_that_was_damaged_on_its_way_is_sent_again(flaky: Store, proxy: FaultyProxy) -> None:
    proxy.faults = ["400 BadDigest", "400 RequestTimeout", "400 IncompleteBody"]
    flaky.put_new("key", b"data")
    assert proxy.requests == ["PUT"] * 4
    assert flaky.get("key") == b"data"


def test_a_write_whose_answer_was_lost_is_still_ours(flaky: Store, proxy: FaultyProxy, bucket: Store) -> None:
    proxy.faults = ["lose"]
    flaky.put_new("plan.json", b"mine")
    assert proxy.requests == ["PUT", "PUT", "GET"]
    assert bucket.get("plan.json") == b"mine"


def test_a_lost_answer_does_not_hide_another_writer(flaky: Store, proxy: FaultyProxy, bucket: Store) -> None:
    bucket.put("plan.json", b"theirs")
    proxy.faults = ["lose"]
    with pytest.raises(AlreadyExists):
        flaky.put_new("plan.json", b"mine")
    assert bucket.get("plan.json") == b"theirs"


def test_an_object_that_is_deleted_while_it_is_compared_is_written_again(
    flaky: Store, proxy: FaultyProxy, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.faults = ["412 PreconditionFailed"]
    flaky.put_new("plan.json", b"mine")
    assert proxy.requests == ["PUT", "GET", "PUT"]
    assert bucket.get("plan.json") == b"mine"
    monkeypatch.setattr(storage, "S3_TRIES", 2)
    proxy.faults = ["412 PreconditionFailed", ""] * 2
    with pytest.raises(OutsideError, match=r"/other\.json: was there and is gone again"):
        flaky.put_new("other.json", b"mine")
    assert proxy.faults == []


def test_faults_of_local_files_are_said_at_once(flaky: Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    flaky.put("key", b"data")
    proxy.requests.clear()
    with pytest.raises(ConfigError):
        flaky.get_file("key", tmp_path)
    assert proxy.requests == ["GET"]
    with pytest.raises(ConfigError):
        flaky.put_file("key", tmp_path / "absent")
    assert proxy.requests == ["GET"]


def test_half_an_answer_is_fetched_again(flaky: Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    data = os.urandom(200_000)
    flaky.put("data", data)
    proxy.faults = ["half"]
    assert flaky.get("data") == data
    proxy.faults = ["half", "half"]
    flaky.get_file("data", tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("fault", ["503 SlowDown", "half", "cut"])
def test_a_server_that_stays_broken_is_outside_after_five_tries(
    flaky: Store, proxy: FaultyProxy, prefix: str, tmp_path: Path, fault: str
) -> None:
    flaky.put("data", b"0123456789")
    proxy.always = fault
    proxy.requests.clear()
    with pytest.raises(OutsideError, match=f"^s3://{BUCKET}/{prefix}/data: ") as caught:
        flaky.get_file("data", tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert proxy.requests == ["GET"] * 5
    assert list(tmp_path.iterdir()) == []
    proxy.always = ""
    assert flaky.get("data") == b"0123456789"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("403 AccessDenied", "AccessDenied.*GetObject, PutObject and ListBucket"),
        ("403 InvalidAccessKeyId", "InvalidAccessKeyId.*correct AWS_ACCESS_KEY_ID"),
        ("403 SignatureDoesNotMatch", "SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY"),
        ("403 RequestTimeTooSkewed", "clock"),
        ("400 ExpiredToken", "get new ones"),
        ("404 NoSuchBucket", "no such bucket: mill; make it, or correct the URL"),
        ("400 InvalidArgument", "refused the request.*InvalidArgument"),
    ],
)
def test_what_no_try_can_mend_is_said_at_once(
    flaky: Store, proxy: FaultyProxy, prefix: str, tmp_path: Path, answer: str, message: str
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    proxy.always = answer
    for action in (
        lambda: flaky.get("key"),
        lambda: flaky.put("key", b"x"),
        lambda: flaky.put_new("key", b"x"),
        lambda: flaky.get_file("key", tmp_path / "target"),
        lambda: flaky.put_file("key", tmp_path / "source"),
    ):
        proxy.requests.clear()
        with pytest.raises(ConfigError, match=f"^s3://{BUCKET}/{prefix}/key: .*{message}") as caught:
            action()
        assert "\n" not in str(caught.value)
        assert len(proxy.requests) == 1


def test_writes_carry_their_sha256_unless_the_server_cannot_have_it(
    proxy: FaultyProxy, open_bucket: OpenBucket, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    carried = []
    for choice in ("when_supported", "when_required"):
        store = open_bucket(endpoint=proxy.endpoint, request_checksum_calculation=choice)
        proxy.headers.clear()
        store.put(choice, b"x")
        store.put_new(f"{choice}-new", b"x")
        store.put_file(f"{choice}-file", tmp_path / "source")
        assert len(proxy.headers) == 3
        carried.append([[name for name in headers if "checksum" in name] for headers in proxy.headers])
    assert all("x-amz-checksum-sha256" in names for names in carried[0])
    assert carried[1] == [[], [], []]


def test_a_server_that_stands_still_is_outside_and_then_back(
    s3: SeaweedFS, bucket: Store, open_bucket: OpenBucket
) -> None:
    bucket.put("before", b"x")
    assert s3.process is not None
    s3.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(OutsideError, match="before"):
            open_bucket(timeout_s=0.3).get("before")
    finally:
        s3.process.send_signal(signal.SIGCONT)
    assert bucket.get("before") == b"x"


def test_a_server_that_is_not_there_is_outside(open_bucket: OpenBucket) -> None:
    with pytest.raises(OutsideError, match="Could not connect"):
        open_bucket(endpoint="http://127.0.0.1:9").put("key", b"x")


def test_a_missing_bucket_is_named_by_every_method(s3: SeaweedFS, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    actions: list[Callable[[Store], object]] = [
        lambda store: store.get("key"), lambda store: store.put("key", b"x"), lambda store: store.put_new("key", b"x"),
        lambda store: store.get_file("key", tmp_path / "target"),
        lambda store: store.put_file("key", tmp_path / "source"), lambda store: list(store.list("")),
        lambda store: store.exists("key"), lambda store: store.size("key"),
    ]  # fmt: skip
    store = open_store("s3://no-such-bucket/runs", s3_config(s3))
    for action in actions:
        with pytest.raises(ConfigError, match="no such bucket: no-such-bucket"):
            action(store)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_named(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "wrong")
    with pytest.raises(ConfigError, match=r"not permitted .*AWS_SECRET_ACCESS_KEY"):
        open_store(f"s3://{BUCKET}/x", s3_config(s3)).put("key", b"x")


def test_no_credentials_are_named(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ConfigError, match="no credentials for S3"):
        open_store(f"s3://{BUCKET}/x", s3_config(s3)).put("key", b"x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store(f"s3://{BUCKET}/x", s3_config(s3)).put("key", b"x")


@pytest.mark.parametrize(
    ("url", "changes", "message"),
    [
        (f"s3://{BUCKET}/x", {"ca_bundle": "/no/such.pem"}, "storage.ca_bundle: no such file: /no/such.pem"),
        (f"s3://{BUCKET}/x", {"endpoint": "not a url"}, "Invalid endpoint: not a url"),
        ("s3://Bucket With Spaces/x", {}, "Invalid bucket name"),
    ],
)
def test_settings_that_cannot_work_are_named(s3: SeaweedFS, url: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_store(url, s3_config(s3, **changes)).get("key")


def test_a_profile_that_is_not_there_is_named(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="nobody"):
        open_store(f"s3://{BUCKET}/x", s3_config(s3))
