"""What a worker says about itself while it works, and how others read it."""

from collections.abc import Mapping

import msgspec

from mill_shared.errors import KeyMissing
from mill_shared.keys import RunKeys
from mill_shared.storage import Store

BEATS_BEFORE_SILENT = 6
"""A worker that missed this many heartbeats no longer counts as at work."""
WORKING = "working"
"""The state of a worker that did not say how it ended: alive, or dead."""
WAITING = "waiting"
"""The state of a worker for which something outside is unavailable."""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """State of one shard's newest worker. Times are seconds since the epoch."""

    pass_index: int
    shard: int
    shards: int
    state: str
    """`working`, `waiting` (something outside is unavailable), `done`, or `stopped: <reason>`."""
    host: str
    pid: int
    started_at: float
    updated_at: float
    chunks: int
    """Chunks of this shard."""
    chunks_done: int
    images: int
    """Images of this shard."""
    images_done: int
    images_labelled: int
    """Images that this worker labelled itself."""
    failed: Mapping[str, int]
    """Images that this worker found failed, by reason."""
    chunk_in_hand: int | None = None
    row_in_hand: int | None = None
    """Only under --one-by-one."""
    suspects: Mapping[int, int] = {}
    """Row -> how many workers died with it alone in hand."""


def read_heartbeat(store: Store, keys: RunKeys, pass_index: int, shard: int, shards: int) -> Heartbeat | None:
    """Return the last heartbeat of a shard, or None where there is none that can be read."""
    try:
        return msgspec.json.decode(store.get(keys.heartbeat(pass_index, shard, shards)), type=Heartbeat)
    except (KeyMissing, msgspec.DecodeError):
        return None


def read_heartbeats(store: Store, keys: RunKeys) -> list[Heartbeat]:
    """Return every shard's last heartbeat, of all passes and shard counts; those that cannot be read are left out."""
    found = []
    for entry in list(store.list(keys.progress)):
        try:
            found.append(msgspec.json.decode(store.get(entry.key), type=Heartbeat))
        except (KeyMissing, msgspec.DecodeError):
            continue
    return found
