"""An image with which the process dies, with real processes and a real signal."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mill_jobs.config import read_config
from mill_jobs.run import open_run
from mill_shared.heartbeat import read_heartbeat
from mill_shared.keys import RunKeys
from mill_shared.records import decode_chunk
from mill_shared.storage import LocalStore
from runs import SAMPLE, mill, start_mill, write_run

DEADLY_ROW = 1


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, ChatServer)
        self.rfile.read(int(self.headers["Content-Length"]))
        if server.row_in_hand() == DEADLY_ROW:
            server.reached.set()
            server.released.wait(60)
            return
        answer = json.dumps({"choices": [{"message": {"content": "No"}, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


class ChatServer(ThreadingHTTPServer):
    """Says No to everything, but never answers about one image."""

    def __init__(self, store: Path, run: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._store, self._run = LocalStore(store), run
        self.reached, self.released = threading.Event(), threading.Event()

    def row_in_hand(self) -> int | None:
        """Return which image the worker says that it works on."""
        beat = read_heartbeat(self._store, RunKeys(self._run), 0, 0, 1)
        return None if beat is None else beat.row_in_hand


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ChatServer]:
    with ChatServer(tmp_path / "store", "run") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def test_one_by_one_isolates_an_image_with_which_workers_die(tmp_path: Path, server: ChatServer) -> None:
    chat = {"kind": "http", "url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "revision": "1"}
    masks = {"kind": "oracle", "truth": str(SAMPLE / "instances.json")}
    path = write_run(
        tmp_path, images=4, sharding={"chunk_size": 4},
        recipe={"name": "cotpl", "label": {"masks": masks, "chat": chat, "min_box_area_px": 0}},
    )  # fmt: skip
    assert mill("plan", path).returncode == 0
    for _ in range(2):
        server.reached.clear()
        worker = start_mill("label", path, "--one-by-one")
        assert server.reached.wait(60)
        worker.kill()
        assert worker.wait_for().returncode == -9
    ended = mill("label", path, "--one-by-one")
    assert ended.returncode == 0, ended.stderr
    store, plan = open_run(read_config(path))
    records = decode_chunk(store.get(RunKeys(plan.run).chunk(0, 0)))
    assert [(record.row, record.reason) for record in records] == [
        (0, None), (DEADLY_ROW, "killed_the_process"), (2, None), (3, None),
    ]  # fmt: skip
