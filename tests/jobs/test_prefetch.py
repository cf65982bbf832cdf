"""Weights from servers that are real, broken, slow to agree, or changed behind our back."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, ClassVar

import pytest
from pydantic import ValidationError

from mill_jobs.prefetch import READY, Hub, PrefetchSpec, prefetch
from mill_shared.config import StorageConfig
from mill_shared.errors import ConfigError, OutsideError
from mill_shared.models.weights import content_digest, file_digests
from mill_shared.storage import open_store

if TYPE_CHECKING:
    from seaweed import SeaweedFS

REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE, SMALL = b"weights" * 1000, b'{"hidden": 8}'


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Server(BaseHTTPRequestHandler):
    """A file server with a hub in it; every answer is scripted by its path."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, str | None]]]
    failing: ClassVar[int]
    elsewhere: ClassVar[str]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        if self.path == "/busy" and Server.failing > 0:
            Server.failing -= 1
            self._answer(503, b"")
        elif self.path in ("/file", "/busy", "/folder/large.bin"):
            self._answer(200, LARGE)
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", str(len(LARGE)))
            self.end_headers()
            self.wfile.write(LARGE[:10])
            self.close_connection = True
        elif self.path.startswith(f"/api/models/org/model/tree/{REVISION}"):
            self._tree()
        elif self.path == f"/org/model/resolve/{REVISION}/large.bin":
            self._answer(302, b"", Location=f"{self.elsewhere}/folder/large.bin")
        elif self.path == f"/org/model/resolve/{REVISION}/sub/config.json":
            self._answer(307, b"", Location="/cached")
        elif self.path == "/cached":
            self._answer(200 if self.headers.get("Authorization") else 401, SMALL)
        else:
            self._answer(404, b"")

    def _tree(self) -> None:
        blob = hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
        if "cursor" in self.path:
            tail = [{"type": "file", "path": "sub/config.json", "oid": blob}]
            self._answer(200, json.dumps(tail).encode())
            return
        page: list[dict[str, object]] = [
            {"type": "directory", "path": "sub", "oid": "0"},
            {"type": "file", "path": ".gitattributes", "oid": "0"},
            {"type": "file", "path": "large.bin", "oid": "0", "lfs": {"oid": sha256(LARGE), "size": len(LARGE)}},
        ]
        following = f'</api/models/org/model/tree/{REVISION}?recursive=true&cursor=x>; rel="next"'
        self._answer(200, json.dumps(page).encode(), Link=following)

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Server) for _ in range(2)]
    for each in servers:
        Thread(target=each.serve_forever, daemon=True).start()
    Server.seen, Server.failing = [], 0
    Server.elsewhere = f"http://127.0.0.1:{servers[1].server_port}"
    yield f"http://127.0.0.1:{servers[0].server_port}"
    for each in servers:
        each.shutdown()
        each.server_close()


def spec(**source: object) -> PrefetchSpec:
    return PrefetchSpec.model_validate({"weights": [source]})


def no_sleep(seconds: float) -> None:
    pass


def test_file_is_checked_marked_and_fetched_once(server: str, tmp_path: Path) -> None:
    wanted = spec(path="sam.pth", source=f"{server}/file", sha256=sha256(LARGE))
    assert prefetch(wanted, tmp_path / "new")
    assert (tmp_path / "new" / "sam.pth").read_bytes() == LARGE
    assert file_digests(tmp_path / "new" / "sam.pth") == {"sam.pth": sha256(LARGE)}
    assert not prefetch(wanted, tmp_path / "new")
    assert len(Server.seen) == 1
    assert sorted(item.name for item in (tmp_path / "new").iterdir()) == [READY, "SHA256SUMS", "sam.pth"]


def test_another_digest_leaves_neither_file_nor_marker(server: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{server}/file: SHA-256 is {sha256(LARGE)}, not 0000"):
        prefetch(spec(path="sam.pth", source=f"{server}/file", sha256="0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_call_goes_on_with_what_is_right(server: str, tmp_path: Path) -> None:
    both = PrefetchSpec.model_validate(
        {
            "weights": [
                {"path": "a.pth", "source": f"{server}/file", "sha256": sha256(LARGE)},
                {"path": "b.pth", "source": f"{server}/file", "sha256": sha256(LARGE)},
            ]
        }
    )
    (tmp_path / "a.pth").write_bytes(LARGE)
    (tmp_path / "b.pth").write_bytes(LARGE[:-1])
    assert prefetch(both, tmp_path)
    assert (tmp_path / "b.pth").read_bytes() == LARGE
    assert len(Server.seen) == 1


def test_busy_server_is_asked_again(server: str, tmp_path: Path) -> None:
    Server.failing = 3
    assert prefetch(spec(path="sam.pth", source=f"{server}/busy", sha256=sha256(LARGE)), tmp_path, sleep=no_sleep)


def test_cut_connection_is_told_from_a_changed_file(server: str, tmp_path: Path) -> None:
    with pytest.raises(OutsideError, match="ended after 10 of 7000 bytes"):
        prefetch(spec(path="sam.pth", source=f"{server}/short", sha256=sha256(LARGE)), tmp_path, sleep=no_sleep)


def test_missing_file_stops_at_once(server: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="404; correct the source"):
        prefetch(spec(path="sam.pth", source=f"{server}/nothing", sha256=sha256(LARGE)), tmp_path)
    assert len(Server.seen) == 1


def test_hub_repository_at_a_commit_is_checked_by_the_hubs_digests(server: str, tmp_path: Path) -> None:
    wanted = spec(path="model", source="hub://org/model", revision=REVISION)
    assert prefetch(wanted, tmp_path, Hub(server, "secret"))
    assert (tmp_path / "model" / "large.bin").read_bytes() == LARGE
    assert (tmp_path / "model" / "sub" / "config.json").read_bytes() == SMALL
    assert not (tmp_path / "model" / ".gitattributes").exists()
    listed = file_digests(tmp_path / "model")
    assert listed == {"large.bin": sha256(LARGE), "sub/config.json": sha256(SMALL)}
    (tmp_path / "model" / "SHA256SUMS").unlink()
    assert listed == file_digests(tmp_path / "model")
    assert content_digest(tmp_path / "model")


def test_token_stays_with_the_hub(server: str, tmp_path: Path) -> None:
    prefetch(spec(path="model", source="hub://org/model", revision=REVISION), tmp_path, Hub(server, "secret"))
    assert ("/folder/large.bin", None) in Server.seen
    assert ("/cached", "Bearer secret") in Server.seen


def test_hub_files_can_be_chosen(server: str, tmp_path: Path) -> None:
    files = {"large.bin": sha256(LARGE)}
    prefetch(spec(path="model", source="hub://org/model", revision=REVISION, files=files), tmp_path, Hub(server))
    assert not (tmp_path / "model" / "sub").exists()
    other = spec(path="model", source="hub://org/model", revision=REVISION, files={"other.bin": "0" * 64})
    with pytest.raises(ConfigError, match=r"no file other\.bin"):
        prefetch(other, tmp_path / "second", Hub(server))


def test_folder_from_a_bucket(s3: "SeaweedFS", tmp_path: Path) -> None:
    storage = StorageConfig(endpoint=s3.endpoint, region="us-east-1", path_style=True)
    open_store("s3://mill/weights", storage).put("chat/large.bin", LARGE)
    source = {"path": "chat", "source": "s3://mill/weights/chat", "files": {"large.bin": sha256(LARGE)}}
    assert prefetch(PrefetchSpec.model_validate({"weights": [source], "storage": storage}), tmp_path)
    assert (tmp_path / "chat" / "large.bin").read_bytes() == LARGE
    absent = source | {"files": {"absent.bin": sha256(LARGE)}}
    with pytest.raises(ConfigError, match="no such object"):
        prefetch(PrefetchSpec.model_validate({"weights": [absent], "storage": storage}), tmp_path / "second")


@pytest.mark.parametrize(
    "source",
    [
        {"path": "a", "source": "https://host/a"},
        {"path": "a", "source": "hub://org/model"},
        {"path": "a", "source": "hub://org/model", "revision": "main"},
        {"path": "../a", "source": "https://host/a", "sha256": "0" * 64},
        {"path": "a", "source": "https://host/a", "files": {"../../etc/passwd": "0" * 64}},
        {"path": "a", "source": "ftp://host/a", "sha256": "0" * 64},
        {"path": READY, "source": "https://host/a", "sha256": "0" * 64},
    ],
)
def test_source_that_cannot_be_checked_or_escapes_is_refused(source: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PrefetchSpec.model_validate({"weights": [source], "storage": StorageConfig()})
