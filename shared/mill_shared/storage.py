"""Objects under keys, on a path or in a bucket, with the same promises: writes are atomic, put_new is create-once."""

import contextlib
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from mill_shared.config import StorageConfig
from mill_shared.errors import AlreadyExists, ConfigError, KeyMissing, OutsideError

T = TypeVar("T")

SCRATCH = ".mill-scratch"
"""Folder of a path store that holds unfinished writes; never listed."""
READ_BYTES = 8 * 2**20
S3_TRIES = 5
S3_CONNECTIONS = 64
PART_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Entry:
    """An object in a listing."""

    key: str
    size_bytes: int
    etag: str
    """The store's own; empty for a path."""


class Store(Protocol):
    """Objects under keys relative to the store's root.

    Every method may raise ConfigError (wrong for ever: no bucket, no permission) and OutsideError (unavailable now).
    """

    url: str
    """As given; holds no credentials."""

    def get(self, key: str) -> bytes:
        """Return an object. Raises KeyMissing."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write an object, over an older one; readers see the one or the other."""
        ...

    def put_new(self, key: str, data: bytes) -> None:
        """Write an object that is not there yet; an equal one is our own retried write. Raises AlreadyExists."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Write an object to a file, which appears whole or not at all. Raises KeyMissing."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Write a file's content as an object, over an older one."""
        ...

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose keys begin with a prefix, in ascending order of keys."""
        ...

    def size(self, key: str) -> int:
        """Return an object's size in bytes. Raises KeyMissing."""
        ...


def open_store(url: str, config: StorageConfig | None = None) -> Store:
    """Open a store.

    Args:
        url: `s3://bucket/prefix`, or a path.
        config: how S3 is reached.

    Raises:
        ConfigError: not such a URL.
    """
    if url.startswith("s3://"):
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(f"{url}: no bucket; expected s3://bucket/prefix or a path")
        return S3Store(url, bucket, prefix.strip("/"), config or StorageConfig())
    if "://" in url:
        raise ConfigError(f"{url}: unknown kind of store; expected s3://bucket/prefix or a path")
    return LocalStore(Path(url))


def _checked(key: str) -> str:
    if not key or key.startswith("/") or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"unsafe key: {key!r}")
    return key


class LocalStore:
    """A folder. Objects are written beside, flushed to disk and then linked or renamed into place."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self._root = root

    def path_of(self, key: str) -> Path:
        """Return the file of an object, to be read only."""
        return self._root / _checked(key)

    def scratch_folder(self) -> Path:
        """Return a folder on the same file system for unfinished files; it is made where it is missing."""
        folder = self._root / SCRATCH
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _local_error(folder, error) from error
        return folder

    def get(self, key: str) -> bytes:
        """Return an object. Raises KeyMissing."""
        with self._reading(key):
            return self.path_of(key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        """Write an object, over an older one."""
        with self._written(key, data) as temporary:
            temporary.replace(self.path_of(key))

    def put_new(self, key: str, data: bytes) -> None:
        """Write an object that is not there yet. Raises AlreadyExists."""
        path = self.path_of(key)
        with self._written(key, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                if path.read_bytes() != data:
                    raise AlreadyExists(key) from error
            except OSError as error:
                raise ConfigError(
                    f"{self._root}: this file system has no hard links, which create-once writes need ({error}); "
                    "use another folder or a bucket"
                ) from error

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object to a file. Raises KeyMissing."""
        with self._reading(key), self.path_of(key).open("rb") as source, _appearing(path) as target:
            while block := source.read(READ_BYTES):
                target.write(block)

    def put_file(self, key: str, path: Path) -> None:
        """Write a file's content; one in the scratch folder is linked instead of copied."""
        target = self.path_of(key)
        with self._failing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.scratch_folder() / uuid.uuid4().hex
            try:
                if path.is_relative_to(self._root / SCRATCH):
                    os.link(path, temporary)
                else:
                    with path.open("rb") as source, temporary.open("wb") as copy:
                        while block := source.read(READ_BYTES):
                            copy.write(block)
                _flush(temporary)
                temporary.replace(target)
                _flush(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        with self._failing(self.path_of(key)):
            return self.path_of(key).is_file()

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose keys begin with a prefix."""
        folder = self._root / prefix.rpartition("/")[0] if prefix else self._root
        found = []
        for parent, folders, files in os.walk(folder, onerror=self._unreadable):
            folders[:] = [name for name in folders if name != SCRATCH]
            for name in files:
                path = Path(parent) / name
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):
                        found.append(Entry(key, path.stat().st_size, ""))
        yield from sorted(found, key=lambda entry: entry.key)

    def size(self, key: str) -> int:
        """Return an object's size in bytes. Raises KeyMissing."""
        with self._reading(key):
            return self.path_of(key).stat().st_size

    def _unreadable(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise _local_error(self._root, error) from error

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise KeyMissing(key) from error
        except OSError as error:
            raise _local_error(self.path_of(key), error) from error

    @contextlib.contextmanager
    def _failing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _local_error(path, error) from error

    @contextlib.contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[Path]:
        path = self.path_of(key)
        with self._failing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.scratch_folder() / uuid.uuid4().hex
            try:
                temporary.write_bytes(data)
                _flush(temporary)
                yield temporary
                _flush(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _appearing(path: Path) -> "Iterator[Any]":
    """Open a file that gets its name only when it is complete."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _local_error(path: Path, error: OSError) -> ConfigError | OutsideError:
    text = f"{path}: {error.strerror or error}"
    if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
        return ConfigError(f"{text}; choose a folder that this user may use")
    return OutsideError(text)


class S3Store:
    """A bucket. Credentials come from the SDK's chain; one retry layer; every error is one of ours."""

    def __init__(self, url: str, bucket: str, prefix: str, config: StorageConfig, client: Any = None) -> None:
        self.url = url
        self._bucket, self._prefix, self._config = bucket, f"{prefix}/" if prefix else "", config
        self._client = client or _make_client(config)

    def get(self, key: str) -> bytes:
        """Return an object. Raises KeyMissing."""
        return bytes(self._call(key, lambda: self._client.get_object(**self._at(key))["Body"].read()))

    def put(self, key: str, data: bytes) -> None:
        """Write an object, over an older one."""
        self._call(key, lambda: self._client.put_object(**self._at(key), **self._body(data)))

    def put_new(self, key: str, data: bytes) -> None:
        """Write an object that is not there yet. Raises AlreadyExists."""
        try:
            self._call(key, lambda: self._client.put_object(**self._at(key), **self._body(data), IfNoneMatch="*"))
        except AlreadyExists:
            if self.get(key) != data:
                raise

    def get_file(self, key: str, path: Path) -> None:
        """Write an object to a file. Raises KeyMissing."""

        def fetch() -> None:
            with _appearing(path) as stream:
                body = self._client.get_object(**self._at(key))["Body"]
                for block in body.iter_chunks(READ_BYTES):
                    stream.write(block)

        self._call(key, fetch)

    def put_file(self, key: str, path: Path) -> None:
        """Write a file's content, in parts where it is large."""
        from boto3.s3.transfer import TransferConfig

        extra = {} if self._config.request_checksum_calculation == "when_required" else {"ChecksumAlgorithm": "SHA256"}
        transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
        at = self._at(key)
        self._call(
            key, lambda: self._client.upload_file(str(path), at["Bucket"], at["Key"], ExtraArgs=extra, Config=transfer)
        )

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        try:
            self.size(key)
        except KeyMissing:
            return False
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose keys begin with a prefix."""
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            page = self._call(prefix, partial(self._client.list_objects_v2, **request))
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._prefix)
                if not key.endswith("/"):
                    yield Entry(key, item["Size"], item.get("ETag", "").strip('"'))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def size(self, key: str) -> int:
        """Return an object's size in bytes. Raises KeyMissing."""
        return int(self._call(key, lambda: self._client.head_object(**self._at(key))["ContentLength"]))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + _checked(key)}

    def _body(self, data: bytes) -> dict[str, Any]:
        if self._config.request_checksum_calculation == "when_required":
            return {"Body": data}
        from base64 import b64encode

        return {"Body": data, "ChecksumSHA256": b64encode(hashlib.sha256(data).digest()).decode()}

    def _call(self, key: str, action: Callable[[], T]) -> T:
        for attempt in Retrying(
            retry=retry_if_exception_type(OutsideError),
            stop=stop_after_attempt(S3_TRIES),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            reraise=True,
        ):
            with attempt:
                return self._once(key, action)
        raise AssertionError("unreachable: Retrying ends with a result or an error")

    def _once(self, key: str, action: Callable[[], T]) -> T:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        place = f"s3://{self._bucket}/{self._prefix}{key}"
        try:
            return action()
        except ClientError as error:
            raise _s3_error(place, self._bucket, key, error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise ConfigError(
                f"{place}: no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        except Boto3Error as error:
            if isinstance(error.__cause__, ClientError):
                raise _s3_error(place, self._bucket, key, error.__cause__) from error
            raise OutsideError(f"{place}: {error}") from error
        except (BotoCoreError, OSError) as error:
            raise OutsideError(f"{place}: {' '.join(str(error).split())}") from error


def _s3_error(place: str, bucket: str, key: str, error: Any) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return ConfigError(f"{place}: no such bucket: {bucket}; make it, or correct the URL")
    if code in ("NoSuchKey", "404", "NotFound") or status == 404:
        return KeyMissing(key)
    if status == 412 or code == "PreconditionFailed":
        return AlreadyExists(key)
    if status in (401, 403):
        return ConfigError(
            f"{place}: not permitted ({code}); the credentials need GetObject, PutObject and ListBucket on this prefix"
        )
    if status in (409, 429) or status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "InternalError"):
        return OutsideError(f"{place}: {code or status}")
    return ConfigError(f"{place}: the server refused the request: {code or status} {error}")


def _make_client(config: StorageConfig) -> Any:
    import boto3
    from botocore.config import Config

    settings = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=min(config.timeout_s, 10),
        read_timeout=config.timeout_s,
        max_pool_connections=S3_CONNECTIONS,
        request_checksum_calculation=config.request_checksum_calculation,
        s3={"addressing_style": "path" if config.path_style else "auto"},
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=config.endpoint,
        region_name=config.region,
        verify=None if config.ca_bundle is None else str(config.ca_bundle),
        config=settings,
    )
