"""What a published final is, and how to get at it.

A final is a folder named by its digest. Its manifest is written last; without one it does not exist. Numbered
references say which final is the newest.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from mill_shared.errors import AlreadyExists, ConfigError, CorruptError, KeyMissing
from mill_shared.keys import RunKeys
from mill_shared.storage import Store

log = structlog.get_logger()

READ_BYTES = 8 * 2**20


class FileEntry(msgspec.Struct, frozen=True):
    """A file of a final."""

    name: str
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a final consists of and what it was made from."""

    run: str
    final: str
    label_digest: str
    recipe: str
    code: str
    finalize: dict[str, Any]
    """The finalize parts of the run file."""
    base_sha256: str | None
    passes: int
    images: int
    records: dict[str, int]
    """Images by outcome: ok, empty, failed, missing."""
    failed: dict[str, int]
    """Failed images by reason."""
    chunks: list[tuple[int, int, str]]
    """(pass, chunk, digest) of every chunk that went in, in plan order."""
    files: list[FileEntry]
    missing: list[str] = []
    """What the bundle lacks for its trainer, a line each; empty for a complete one."""


class Ref(msgspec.Struct, frozen=True):
    """A numbered reference to a final; the newest is "latest"."""

    final: str
    passes: int
    covered: int
    """Images with an ok or empty record."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(store: Store, run: str, digest: str) -> Manifest | None:
    """Return the manifest of a final, or None: a final without one does not exist."""
    key = RunKeys(run).manifest(digest)
    try:
        return msgspec.json.decode(store.get(key), type=Manifest)
    except KeyMissing:
        return None
    except msgspec.DecodeError as error:
        raise CorruptError(f"{key}: cannot be read: {error}") from error


def read_refs(store: Store, run: str) -> list[Ref]:
    """Return the numbered references to finals, oldest first."""
    refs: list[Ref] = []
    while True:
        try:
            refs.append(msgspec.json.decode(store.get(RunKeys(run).ref(len(refs) + 1)), type=Ref))
        except KeyMissing:
            return refs


def latest_final(store: Store, run: str) -> str:
    """Return the digest of the newest referenced final.

    Raises:
        ConfigError: the run has none.
    """
    refs = read_refs(store, run)
    if not refs:
        raise ConfigError(f"run {run}: no final yet; make one with `mill finalize`")
    return refs[-1].final


def publish_ref(store: Store, run: str, manifest: Manifest) -> bool:
    """Make the final the latest, unless the newest one covers more; True where it is the latest now."""
    ref = Ref(manifest.final, manifest.passes, manifest.records["ok"] + manifest.records["empty"])
    while True:
        refs = read_refs(store, run)
        if refs and refs[-1].final == ref.final:
            return True
        if refs and (ref.passes, ref.covered) < (refs[-1].passes, refs[-1].covered):
            log.warning("the newest final covers more; this one does not become the latest", latest=refs[-1].final)
            return False
        try:
            store.put_new(RunKeys(run).ref(len(refs) + 1), msgspec.json.encode(ref))
        except AlreadyExists:
            continue
        return True


def fetch_final(store: Store, run: str, digest: str, folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Bring a final's files to a folder, each checked against the manifest before it gets its name.

    Args:
        store: the run's store.
        run: the run's id.
        digest: the final.
        folder: is made where it is missing.
        names: which files; default: all.

    Raises:
        ConfigError: no such final, or no such file in it.
        CorruptError: a file does not match its digest; nothing under that name is left.
    """
    manifest = read_manifest(store, run, digest)
    if manifest is None:
        raise ConfigError(f"run {run}: no final {digest}; see the refs, or make one with `mill finalize`")
    entries = {entry.name: entry for entry in manifest.files}
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise ConfigError(f"final {digest}: no file {', '.join(unknown)}; it has {', '.join(entries)}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        for name in names or entries:
            part = Path(scratch) / name
            store.get_file(RunKeys(run).final(digest, name), part)
            if file_sha256(part) != entries[name].sha256:
                raise CorruptError(f"{RunKeys(run).final(digest, name)}: does not match the manifest's SHA-256")
            paths.append(Path(shutil.move(part, folder / name)))
    (folder / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return [*paths, folder / "manifest.json"]
