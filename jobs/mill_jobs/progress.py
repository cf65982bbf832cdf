"""The heartbeat of a worker, and what it is for: progress, the chunk in hand, the watchdog."""

import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec
import structlog

from mill_shared.errors import ExitCode, MillError
from mill_shared.heartbeat import WAITING, WORKING, Heartbeat, read_heartbeats
from mill_shared.keys import RunKeys
from mill_shared.storage import Store

log = structlog.get_logger()


def active_heartbeats(store: Store, keys: RunKeys, *, now: float, fresh_s: float) -> list[Heartbeat]:
    """Return the heartbeats of workers that are at work: not ended, and heard of within `fresh_s` seconds."""
    beats = read_heartbeats(store, keys)
    return [beat for beat in beats if beat.state in (WORKING, WAITING) and now - beat.updated_at < fresh_s]


class HeartbeatWriter:
    """Writes the heartbeat every few seconds from a thread of its own, and ends a process that is stuck or orphaned."""

    def __init__(
        self, store: Store, keys: RunKeys, first: Heartbeat, *, interval_s: float, stalled_after_s: float,
        parent: int | None = None, exit_process: Callable[[int], object] = os._exit,
    ) -> None:  # fmt: skip
        self._store, self._key = store, keys.heartbeat(first.pass_index, first.shard, first.shards)
        self.beat = first
        self._interval_s, self._stalled_after_s = interval_s, stalled_after_s
        self._parent, self._exit_process = parent, exit_process
        self._last_progress = time.monotonic()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        state = "done" if error is None else f"stopped: {type(error).__name__}"
        self.update(state=state)
        self._write()

    def update(self, *, progressed: bool = False, write: bool = False, **changes: object) -> None:
        """Change fields of the heartbeat.

        Args:
            progressed: an image was finished; resets the watchdog.
            write: store it at once instead of at the next beat.
            **changes: fields of `Heartbeat`.
        """
        with self._lock:
            self.beat = msgspec.structs.replace(self.beat, **changes)
        if progressed:
            self._last_progress = time.monotonic()
        if write:
            self._write()

    def _write(self) -> None:
        with self._lock:
            self.beat = msgspec.structs.replace(self.beat, updated_at=time.time())
            data = msgspec.json.encode(self.beat)
        try:
            self._store.put(self._key, data)
        except MillError as error:
            log.debug("heartbeat not written", error=str(error))

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            if self._parent is not None and os.getppid() != self._parent:
                log.error("the parent process is gone; ending")
                self._exit_process(ExitCode.INTERRUPTED)
            if self.beat.state == WAITING:
                self._last_progress = time.monotonic()
            elif time.monotonic() - self._last_progress > self._stalled_after_s:
                log.error(
                    "no image finished for too long; ending for a retry",
                    stalled_after_s=self._stalled_after_s,
                    chunk=self.beat.chunk_in_hand,
                )
                self._exit_process(ExitCode.STALLED)
            self._write()


def new_heartbeat(*, pass_index: int, shard: int, shards: int, chunks: int, images: int) -> Heartbeat:
    """Return the first heartbeat of this process."""
    now = time.time()
    return Heartbeat(
        pass_index=pass_index, shard=shard, shards=shards, state=WORKING, host=socket.gethostname(), pid=os.getpid(),
        started_at=now, updated_at=now, chunks=chunks, chunks_done=0, images=images, images_done=0, images_labelled=0,
        failed={},
    )  # fmt: skip
