"""What a run needs of its bucket, proved by trying it: before a GPU is rented, not hours later."""

import ssl
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from mill_jobs.config import RunConfig
from mill_shared.config import StorageConfig
from mill_shared.errors import AlreadyExists, KeyMissing, MillError
from mill_shared.storage import Store, open_store

PROBE = ".labelmill-probe"
"""Prefix of what the checks write. A store has no delete, so two small objects stay."""
MAX_SKEW_S = 300
"""Seconds between the clocks above which it is a problem; S3 refuses signatures that are 900 s off."""
CLOCK_TIMEOUT_S = 15


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    ok: bool
    text: str
    """What was found and, if it is a problem, what to do."""


def _tried(name: str, action: Callable[[], str]) -> Check:
    try:
        return Check(name, True, action())
    except MillError as error:
        return Check(name, False, str(error))


def probe_absent(store: Store) -> Check:
    """Ask for an object that is not there; a server that hides it (403) would stop every worker."""

    def ask() -> str:
        try:
            store.get(f"{PROBE}/absent")
        except KeyMissing:
            return f"{store.url}: an absent key answers that it is absent"
        return f"{store.url}: readable"

    return _tried("absent key", ask)


def probe_create_once(store: Store) -> Check:
    """Create an object twice with other content; the second time must be refused, and the first must stay."""
    key = f"{PROBE}/create-once"
    first, second = (f"{uuid.uuid4()}\n".encode() for _ in range(2))
    try:
        try:
            store.put_new(key, first)
        except AlreadyExists:  # of an earlier probe: refused, as it must be
            first = store.get(key)
        try:
            store.put_new(key, second)
        except AlreadyExists:
            if store.get(key) == first:
                return Check("create-once", True, f"{store.url}: create-once is honoured")
    except (MillError, KeyMissing) as error:
        return Check("create-once", False, str(error))
    return Check(
        "create-once", False,
        f"{store.url}: the server accepts If-None-Match and overwrites all the same; two workers could undo each "
        "other's chunks. Use a server that honours it (AWS, Ceph, GCS, R2, SeaweedFS 4.41 or newer)",
    )  # fmt: skip


def probe_write(store: Store) -> Check:
    """Write, overwrite and read an object."""

    def write() -> str:
        for text in (b"1", str(time.time()).encode()):
            store.put(f"{PROBE}/overwrite", text)
        if store.get(f"{PROBE}/overwrite") != text:
            return f"{store.url}: writable, but another probe is at work at the same time"
        return f"{store.url}: writable"

    return _tried("write", write)


def clock_check(server: str, date: str | None, now: float) -> Check:
    """Compare a server's Date header with this machine's time."""
    if date is None:
        return Check("clock", True, f"{server} does not say its time; nothing to compare")
    try:
        skew_s = now - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return Check("clock", True, f"{server} says a time that is none ({date}); nothing to compare")
    if abs(skew_s) > MAX_SKEW_S:
        text = f"this machine's clock is {skew_s:+.0f} s off {server}; set it (NTP), S3 refuses requests from 900 s on"
        return Check("clock", False, text)
    return Check("clock", True, f"clock within {abs(skew_s):.0f} s of {server}")


def probe_clock(config: StorageConfig) -> Check:
    """Compare the server's time of day with ours. Any answer will do, a refusal too."""
    region = f".{config.region}" if config.region else ""
    server = config.endpoint or f"https://s3{region}.amazonaws.com"
    context = ssl.create_default_context(cafile=str(config.ca_bundle)) if config.ca_bundle else None
    headers: Message
    try:
        with urlopen(Request(server, method="HEAD"), timeout=CLOCK_TIMEOUT_S, context=context) as answer:
            headers = answer.headers
    except HTTPError as error:
        headers = error.headers
        error.close()
    except (URLError, OSError) as error:
        return Check("clock", False, f"{server}: no answer ({error}); check storage.endpoint and the network policy")
    return clock_check(server, headers.get("Date"), time.time())


def probe_url(url: str, config: StorageConfig) -> list[Check]:
    """Check a store that results go to."""
    clock = [probe_clock(config)] if url.startswith("s3://") else []
    try:
        store = open_store(url, config)
    except MillError as error:
        return [*clock, Check("open", False, str(error))]
    return [*clock, probe_absent(store), probe_write(store), probe_create_once(store)]


def probe_run(config: RunConfig) -> list[Check]:
    """Check the store of a run file, and that its images and its COCO files can be asked for."""
    checks = probe_url(config.store, config.storage)
    if config.dataset.images.startswith("s3://"):
        checks.append(probe_absent(open_store(config.dataset.images, config.storage)))
    for name, url in (("dataset.coco", config.dataset.coco), ("finalize.base", config.finalize.base)):
        if url is not None:
            checks.append(_probe_file(name, url, config.storage))
    return checks


def _probe_file(name: str, url: str, config: StorageConfig) -> Check:
    if not url.startswith("s3://"):
        there = Path(url).is_file()
        return Check(name, there, f"{name}: {url}" if there else f"{name}: no such file here: {url}; use s3://")
    parent, _, key = url.rpartition("/")

    def look() -> str:
        return f"{name}: {url}, {open_store(parent, config).size(key)} bytes"

    try:
        return _tried(name, look)
    except KeyMissing:
        return Check(name, False, f"{name}: no such object: {url}; correct the run file")
