"""Fill a volume with weights once: fetched, checked against digests known beforehand, the READY marker last."""

import hashlib
import http.client
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import structlog
import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from mill_shared.config import Section, StorageConfig
from mill_shared.errors import ConfigError, KeyMissing, OutsideError
from mill_shared.models.weights import SUMS
from mill_shared.storage import open_store

READY = "READY"
"""Marker in the folder, written when everything in it has been checked."""
HUB = "https://huggingface.co"
TRIES = 8
LONGEST_WAIT_S = 60
TIMEOUT_S = 60
"""Without a byte from the server."""
READ_BYTES = 8 * 2**20
MAY_PASS = frozenset({408, 425, 429})
"""Answers that another try may not meet, beside 5xx."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")]


class WeightsSource(Section):
    """A file or folder of weights, and the digests that it must have."""

    path: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name below the mount path, e.g. `sam_vit_h_4b8939.pth` is `/models/sam_vit_h_4b8939.pth` in a run file."""
    source: str = Field(pattern=r"^(https?|s3|hub)://[^/]+/.+")
    """`https://` or `s3://` of the file, or of the folder that `files` are in; or `hub://owner/name`, a repository of
    the Hugging Face hub."""
    sha256: Digest | None = None
    """SHA-256 of the file; of folders `files` or `revision` say it."""
    files: dict[FileName, Digest] = Field(default_factory=dict)
    """File -> SHA-256 of a folder. Of the hub: only these; default: all files of the revision, by the hub's digests."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit of the hub's repository; a branch could change under a run."""

    @model_validator(mode="after")
    def _has_digests(self) -> "WeightsSource":
        if self.source.startswith("hub://"):
            if self.revision is None or self.sha256 is not None or self.source.count("/") != 3:
                raise ValueError(f"{self.path}: hub://owner/name needs `revision`, a commit, and no `sha256`")
        elif self.revision is not None:
            raise ValueError(f"{self.path}: `revision` goes with hub://")
        elif (self.sha256 is None) == (not self.files):
            raise ValueError(f"{self.path}: give `sha256` of a file, or `files` of a folder, so that it can be checked")
        return self


class PrefetchSpec(Section):
    """What a volume holds."""

    weights: tuple[WeightsSource, ...] = Field(min_length=1)
    """Each under a name of its own."""
    storage: StorageConfig = StorageConfig()
    """How S3 is reached."""

    @model_validator(mode="after")
    def _distinct(self) -> "PrefetchSpec":
        names = [source.path for source in self.weights]
        if len(set(names)) < len(names) or {READY, SUMS} & set(names):
            raise ValueError(f"weights: every path once, and none is {READY} or {SUMS} (got {', '.join(names)})")
        return self


@dataclass(frozen=True)
class Hub:
    """Where hub:// is."""

    url: str = HUB
    token: str | None = None
    """Sent to the hub alone."""


@dataclass(frozen=True)
class _File:
    name: str
    """Below the folder."""
    url: str
    sha256: str | None
    git_blob: str | None = None
    """Git's SHA-1 of a small file of the hub, which tells no SHA-256 of those."""

    def agrees(self, sha256: str, git_blob: str) -> bool:
        return sha256 == self.sha256 if self.sha256 is not None else git_blob == self.git_blob


def read_spec(path: Path) -> PrefetchSpec:
    """Read what to fetch.

    Raises:
        ConfigError: unreadable, not YAML, or a field is missing, unknown or wrong.
    """
    try:
        return PrefetchSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, item['loc'])) or '(file)'}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"prefetch file {path}: {'; '.join(faults)}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"prefetch file {path}: {' '.join(str(error).split())}") from error


def prefetch(
    spec: PrefetchSpec, folder: Path, hub: Hub | None = None, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Fill a folder; False where its READY marker says that this was done before.

    Files that an interrupted call left are kept if their digest is right. `SHA256SUMS` files are written beside the
    weights, so that no worker hashes them again.

    Raises:
        ConfigError: a digest differs, a source refuses or lacks a file, or the volume cannot take it.
        OutsideError: a source was unavailable for too long.
    """
    if (folder / READY).is_file():
        return False
    hub = hub or Hub()
    log = structlog.get_logger()
    try:
        sums: dict[str, str] = {}
        for source in spec.weights:
            for file in _files(source, hub, sleep):
                path = folder / file.name
                kept = path.is_file() and file.agrees(*_digests(path))
                sums[file.name] = _digests(path)[0] if kept else _fetch(file, path, spec.storage, hub, sleep)
                log.info("kept" if kept else "fetched", file=file.name, size_bytes=path.stat().st_size)
            own = {
                name.removeprefix(f"{source.path}/"): digest
                for name, digest in sums.items()
                if name.startswith(f"{source.path}/")
            }
            if own:
                _write(folder / source.path / SUMS, _listing(own))
        _write(folder / SUMS, _listing(sums))
        _write(folder / READY, f"{hashlib.sha256(_listing(sums).encode()).hexdigest()}\n")
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror or error}; give the volume room and write access") from error
    return True


def _listing(sums: dict[str, str]) -> str:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _files(source: WeightsSource, hub: Hub, sleep: Callable[[float], None]) -> Iterator[_File]:
    """Yield the files of a source in the order of their names."""
    if not source.source.startswith("hub://"):
        if source.sha256 is not None:
            yield _File(source.path, source.source, source.sha256)
        for name in sorted(source.files):
            yield _File(f"{source.path}/{name}", f"{source.source.rstrip('/')}/{name}", source.files[name])
        return
    repository = source.source.removeprefix("hub://")
    found = dict(_tree(f"{hub.url}/api/models/{repository}/tree/{source.revision}?recursive=true", hub, sleep))
    for name in sorted(source.files):
        if name not in found:
            raise ConfigError(f"{source.source}: no file {name} at {source.revision}; correct `files`")
    for name in sorted(source.files or found):
        if name == SUMS or name.startswith("."):
            continue
        sha256, git_blob = (source.files[name], None) if source.files else found[name]
        url = f"{hub.url}/{repository}/resolve/{source.revision}/{quote(name)}"
        yield _File(f"{source.path}/{name}", url, sha256, git_blob)


def _tree(url: str | None, hub: Hub, sleep: Callable[[float], None]) -> Iterator[tuple[str, tuple[str | None, str]]]:
    """Yield name and digests (SHA-256 of large files, else none; Git's) of a repository's files, page by page."""
    while url is not None:
        page, link = _retried(_page, url, hub, sleep)
        try:
            for item in page:
                name = item["path"]
                if item["type"] == "file":
                    if name.startswith("/") or ".." in name.split("/"):
                        raise ConfigError(f"{url}: lists the file {name!r}, which would lie outside the folder")
                    large = item.get("lfs")
                    yield name, (large["oid"] if large else None, item["oid"])
        except (TypeError, KeyError) as error:
            raise ConfigError(f"{url}: the answer is no list of files; is this a hub?") from error
        url = link


def _page(url: str, hub: Hub) -> tuple[Any, str | None]:
    with _open(url, hub) as answer:
        try:
            page = json.loads(answer.read())
        except ValueError as error:
            raise ConfigError(f"{url}: the answer is no JSON; is this a hub?") from error
        for part in (answer.headers.get("Link") or "").split(","):
            target, _, relation = part.partition(";")
            if 'rel="next"' in relation:
                return page, urljoin(url, target.strip().strip("<>"))
        return page, None


def _fetch(file: _File, path: Path, storage: StorageConfig, hub: Hub, sleep: Callable[[float], None]) -> str:
    """Write a file that appears only when its digest is right; return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        if file.url.startswith("s3://"):
            root, _, key = file.url.rpartition("/")
            try:
                open_store(root, storage).get_file(key, temporary)
            except KeyMissing as error:
                raise ConfigError(f"{file.url}: no such object; correct the source") from error
        else:
            _retried(lambda url, at: _download(url, at, temporary), file.url, hub, sleep)
        sha256, git_blob = _digests(temporary)
        if not file.agrees(sha256, git_blob):
            found = (
                f"SHA-256 is {sha256}, not {file.sha256}"
                if file.sha256
                else f"Git's is {git_blob}, not {file.git_blob}"
            )
            raise ConfigError(f"{file.url}: {found}; the source was changed, or the digest is mistyped")
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return sha256


def _digests(path: Path) -> tuple[str, str]:
    """Return a file's SHA-256, and the SHA-1 under which Git knows it."""
    sha256, git_blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(READ_BYTES):
            sha256.update(block)
            git_blob.update(block)
    return sha256.hexdigest(), git_blob.hexdigest()


def _download(url: str, hub: Hub, path: Path) -> None:
    with _open(url, hub) as answer, path.open("wb") as stream:
        expected = answer.headers.get("Content-Length")
        while block := _read(answer, url):
            stream.write(block)
        if expected is not None and stream.tell() != int(expected):
            raise OutsideError(f"{url}: the connection ended after {stream.tell()} of {expected} bytes")


def _read(answer: Any, url: str) -> bytes:
    try:
        return bytes(answer.read(READ_BYTES))
    except (OSError, http.client.HTTPException) as error:
        raise OutsideError(f"{url}: the connection broke: {error}") from error


class _SameHostRedirects(HTTPRedirectHandler):
    """Follows redirects; what is meant for the hub alone does not go on to another host."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            following.remove_header("Authorization")
        return following


def _open(url: str, hub: Hub) -> Any:
    request = Request(url, headers={"User-Agent": "labelmill"})
    if hub.token is not None and url.startswith(f"{hub.url}/"):
        request.add_header("Authorization", f"Bearer {hub.token}")
    try:
        return build_opener(_SameHostRedirects).open(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        error.close()
        if error.code in MAY_PASS or error.code >= 500:
            raise OutsideError(f"{url}: the server answered {error.code}") from error
        hint = "; it may need a token (HF_TOKEN)" if error.code in (401, 403) else "; correct the source"
        raise ConfigError(f"{url}: the server answered {error.code}{hint}") from error
    except (URLError, OSError, http.client.HTTPException) as error:
        raise OutsideError(f"{url}: no answer: {getattr(error, 'reason', error)}") from error


def _retried(action: Callable[[str, Hub], Any], url: str, hub: Hub, sleep: Callable[[float], None]) -> Any:
    for attempt in Retrying(
        retry=retry_if_exception_type(OutsideError),
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(multiplier=1, max=LONGEST_WAIT_S),
        sleep=sleep,
        reraise=True,
    ):
        with attempt:
            return action(url, hub)
    raise AssertionError("unreachable: Retrying ends with a result or an error")
