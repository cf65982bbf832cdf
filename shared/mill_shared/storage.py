"""Objects under keys, on a path or in a bucket, with the same promises: writes are atomic, put_new is create-once."""

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
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
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""What link(2) answers where a file system has no hard links."""
WRONG_FOR_EVER = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
        errno.ELOOP, errno.EINVAL,
    }
)  # fmt: skip
"""Errors of a file system that no waiting mends; a full disk or a lost mount may come back."""
WRONG_SOURCE = WRONG_FOR_EVER | {errno.ENOENT}
"""The same for a file that is to be read and whose path a caller gave."""
S3_MAY_PASS = frozenset(
    {"SlowDown", "RequestTimeout", "Throttling", "InternalError", "BadDigest", "IncompleteBody", "NoSuchUpload"}
)
"""Error codes that another try may not meet, whatever their status."""


@dataclass(frozen=True)
class Entry:
    """An object in a listing."""

    key: str
    size_bytes: int
    etag: str
    """The store's own; empty for a path."""


class Store(Protocol):
    """Objects under keys relative to the store's root. For use from many threads.

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
        """Write an object to a file, which appears whole or not at all. Raises KeyMissing.

        A file that cannot be written is a ConfigError, on a full disk an OutsideError; both name the file.
        """
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Write a file's content as an object, over an older one. A file that cannot be read is a ConfigError."""
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
    if not url or "://" in url:
        raise ConfigError(f"{url!r}: unknown kind of store; expected s3://bucket/prefix or a path")
    return LocalStore(Path(url))


def _checked(key: str) -> str:
    if not key or key.startswith("/") or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"unsafe key: {key!r}")
    return key


def _checked_prefix(prefix: str) -> str:
    if prefix.startswith("/") or "\\" in prefix or any(part in (".", "..") for part in prefix.split("/")):
        raise ValueError(f"unsafe prefix: {prefix!r}")
    return prefix


class LocalStore:
    """A folder. Objects are written beside, flushed to disk and then linked or renamed into place.

    Create-once needs hard links; a file system without them is refused at the first write, of whatever kind.
    """

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self._root = root
        self._has_links = False
        self._flushed: set[Path] = set()

    def path_of(self, key: str) -> Path:
        """Return the file of an object, to be read only."""
        return self._root / _checked(key)

    def scratch_folder(self) -> Path:
        """Return a folder on the same file system for unfinished files; it is made where it is missing."""
        folder = self._root / SCRATCH
        with self._failing(folder):
            self._make_folder(folder)
            if not self._has_links:
                self._require_links(folder)
                self._has_links = True
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

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object to a file. Raises KeyMissing."""
        with self._reading(key):
            source = self.path_of(key).open("rb")
        with self._failing(self.path_of(key)), source:
            _write_whole(path, iter(partial(source.read, READ_BYTES), b""))

    def put_file(self, key: str, path: Path) -> None:
        """Write a file's content; one in the scratch folder is linked instead of copied."""
        target = self.path_of(key)
        with self._failing(target):
            temporary = self.scratch_folder() / uuid.uuid4().hex
            try:
                with _reading_source(path):
                    if path.is_relative_to(self._root / SCRATCH):
                        os.link(path, temporary)
                    else:
                        with path.open("rb") as source, temporary.open("wb") as copy:
                            while block := source.read(READ_BYTES):
                                copy.write(block)
                self._make_folder(target.parent)
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
        parent = self._root / _checked_prefix(prefix).rpartition("/")[0]
        with self._failing(parent):
            if self._root.exists() and not self._root.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder")
            found = [entry for entry in self._walk(parent, ()) if entry.key.startswith(prefix)]
        yield from sorted(found, key=lambda entry: entry.key)

    def _walk(self, folder: Path, above: tuple[Path, ...]) -> Iterator[Entry]:
        real = folder.resolve()
        if real in above:  # a link back to a folder that we are in
            return
        try:
            with os.scandir(folder) as scan:
                children = [child for child in scan if child.name != SCRATCH]
        except (FileNotFoundError, NotADirectoryError):
            return
        relative = folder.relative_to(self._root).as_posix()
        start = "" if relative == "." else f"{relative}/"
        for child in children:
            if child.is_dir():
                yield from self._walk(folder / child.name, (*above, real))
            elif child.is_file():
                with contextlib.suppress(FileNotFoundError):
                    yield Entry(start + child.name, child.stat().st_size, "")

    def size(self, key: str) -> int:
        """Return an object's size in bytes. Raises KeyMissing."""
        path = self.path_of(key)
        with self._reading(key):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder")
            return path.stat().st_size

    def _require_links(self, folder: Path) -> None:
        name, second = folder / uuid.uuid4().hex, folder / uuid.uuid4().hex
        try:
            name.touch()
            os.link(name, second)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            raise ConfigError(
                f"{self._root}: this file system has no hard links, which create-once writes need ({error.strerror}); "
                "use another folder or a bucket"
            ) from error
        finally:
            name.unlink(missing_ok=True)
            second.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder of the store. No name on the way to it can be lost with the power.

        The first time, also names that were there are flushed: another process may have made them a moment ago.
        """
        if folder in self._flushed and folder.is_dir():
            return
        names = [each for each in (folder, *folder.parents) if self._root in each.parents or not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            _flush(name.parent)
        self._flushed.add(folder)

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
            self._make_folder(path.parent)
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


def _write_whole(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file that gets its name only when it is complete; its folder is made where it is missing.

    What the blocks raise passes through.

    Raises:
        ConfigError: the file cannot be written.
        OutsideError: not now, e.g. on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = temporary.open("xb", buffering=0)
    except OSError as error:
        raise _local_error(path, error) from error
    try:
        with stream:
            for block in blocks:
                rest = memoryview(block)
                try:
                    while rest:
                        rest = rest[stream.write(rest) :]
                except OSError as error:
                    raise _local_error(path, error) from error
        try:
            temporary.replace(path)
        except OSError as error:
            raise _local_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _reading_source(path: Path) -> Iterator[None]:
    """Tell a fault of the file that is read from all others, by the name that the error carries."""
    try:
        yield
    except OSError as error:
        if str(error.filename) != str(path) or error.errno not in WRONG_SOURCE:
            raise
        raise ConfigError(f"{path}: {error.strerror}; name a file that this user may read") from error


def _local_error(path: Path, error: OSError) -> ConfigError | OutsideError:
    text = f"{path}: {error.strerror or error}"
    if error.errno in WRONG_FOR_EVER:
        return ConfigError(f"{text}; choose a folder that this user may use")
    return OutsideError(text)


class S3Store:
    """A bucket. Credentials come from the SDK's chain; one retry layer; every error is one of ours."""

    def __init__(self, url: str, bucket: str, prefix: str, config: StorageConfig, client: Any = None) -> None:
        self.url = url
        self._bucket, self._prefix, self._config = bucket, f"{prefix}/" if prefix else "", config
        self._client = client or _make_client(url, config)
        self._bucket_answered = False

    def get(self, key: str) -> bytes:
        """Return an object. Raises KeyMissing."""
        return self._call(key, lambda: self._read(key))

    def _read(self, key: str) -> bytes:
        return bytes(self._client.get_object(**self._at(key))["Body"].read())

    def put(self, key: str, data: bytes) -> None:
        """Write an object, over an older one."""
        self._call(key, lambda: self._client.put_object(**self._at(key), **self._body(data)))

    def put_new(self, key: str, data: bytes) -> None:
        """Write an object that is not there yet. Raises AlreadyExists."""

        def write() -> None:
            try:
                self._once(key, lambda: self._client.put_object(**self._at(key), **self._body(data), IfNoneMatch="*"))
            except AlreadyExists:
                try:
                    there = self._once(key, lambda: self._read(key))
                except KeyMissing as error:
                    raise OutsideError(f"{self._place(key)}: was there and is gone again") from error
                if there != data:
                    raise

        self._call(key, write)

    def get_file(self, key: str, path: Path) -> None:
        """Write an object to a file. Raises KeyMissing."""

        def fetch() -> None:
            body = self._client.get_object(**self._at(key))["Body"]
            with contextlib.closing(body):
                _write_whole(path, body.iter_chunks(READ_BYTES))

        self._call(key, fetch)

    def put_file(self, key: str, path: Path) -> None:
        """Write a file's content, in parts where it is large."""
        from boto3.s3.transfer import TransferConfig

        extra = {} if self._config.request_checksum_calculation == "when_required" else {"ChecksumAlgorithm": "SHA256"}
        # "classic": the other client, chosen by what is installed, has retries and errors of its own.
        transfer = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, preferred_transfer_client="classic"
        )
        at = self._at(key)

        def send() -> None:
            with _reading_source(path):
                self._client.upload_file(str(path), at["Bucket"], at["Key"], ExtraArgs=extra, Config=transfer)

        self._call(key, send)

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        try:
            self.size(key)
        except KeyMissing:
            return False
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose keys begin with a prefix."""
        request = {"Bucket": self._bucket, "Prefix": self._prefix + _checked_prefix(prefix)}
        found = []
        while True:
            page = self._call(prefix, partial(self._client.list_objects_v2, **request))
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._prefix)
                if not key.endswith("/"):
                    found.append(Entry(key, item["Size"], item.get("ETag", "").strip('"')))
            if not page.get("IsTruncated"):
                break
            request["ContinuationToken"] = page["NextContinuationToken"]
        # Not every server lists in the order of keys: SeaweedFS goes folder by folder, "a/b" before "a-b".
        yield from sorted(found, key=lambda entry: entry.key)

    def size(self, key: str) -> int:
        """Return an object's size in bytes. Raises KeyMissing."""
        try:
            return int(self._call(key, lambda: self._client.head_object(**self._at(key))["ContentLength"]))
        except KeyMissing:
            self._require_bucket()
            raise

    def _require_bucket(self) -> None:
        # HEAD answers a plain 404 for a missing bucket too.
        if not self._bucket_answered:
            self._call("", lambda: self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1))
            self._bucket_answered = True

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + _checked(key)}

    def _place(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

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
        from botocore.exceptions import BotoCoreError, ClientError

        place = self._place(key)
        try:
            return action()
        except ClientError as error:
            raise _refusal(place, self._bucket, key, error) from error
        except Boto3Error as error:  # raised while a ClientError is handled, which alone knows what happened
            if isinstance(error.__context__, ClientError):
                raise _refusal(place, self._bucket, key, error.__context__) from error
            raise OutsideError(f"{place}: {_one_line(error)}") from error
        except BotoCoreError as error:
            raise _no_answer(place, error) from error
        except OSError as error:
            raise OutsideError(f"{place}: {_one_line(error)}") from error


def _refusal(place: str, bucket: str, key: str, error: Any) -> Exception:
    """Return our error for an answer of the server (a botocore ClientError)."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", "")) or str(status)
    if code == "NoSuchBucket":
        return ConfigError(f"{place}: no such bucket: {bucket}; make it, or correct the URL")
    if status == 412 or code == "PreconditionFailed":
        return AlreadyExists(key)
    if status in (409, 429) or status >= 500 or code in S3_MAY_PASS:
        return OutsideError(f"{place}: the server answered {code}")
    if code in ("NoSuchKey", "NotFound") or status == 404:
        return KeyMissing(key)
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return ConfigError(f"{place}: not permitted ({code}); correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
        return ConfigError(f"{place}: not permitted ({code}); the session's credentials have run out, get new ones")
    if code == "RequestTimeTooSkewed":
        return ConfigError(f"{place}: not permitted ({code}); set this machine's clock")
    if status in (401, 403):
        return ConfigError(
            f"{place}: not permitted ({code}); the credentials need GetObject, PutObject and ListBucket on this prefix"
        )
    return ConfigError(f"{place}: the server refused the request: {_one_line(error)}")


def _no_answer(place: str, error: Any) -> ConfigError | OutsideError:
    """Return our error for a request that did not come to an answer (a botocore BotoCoreError)."""
    from botocore import exceptions as botocore

    text = f"{place}: {_one_line(error)}"
    if isinstance(error, (botocore.NoCredentialsError, botocore.PartialCredentialsError)):
        return ConfigError(f"{place}: no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, botocore.SSLError) and "CERTIFICATE_VERIFY_FAILED" in text:
        return ConfigError(f"{text}; set storage.ca_bundle to the authority that signed the server's certificate")
    passing = (
        botocore.HTTPClientError, botocore.ConnectionError, botocore.ChecksumError, botocore.IncompleteReadError,
        botocore.CredentialRetrievalError, botocore.MetadataRetrievalError, botocore.TokenRetrievalError,
        botocore.FlexibleChecksumError,
    )  # fmt: skip
    return OutsideError(text) if isinstance(error, passing) else ConfigError(text)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _make_client(url: str, config: StorageConfig) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    if config.ca_bundle is not None and not config.ca_bundle.is_file():
        raise ConfigError(f"storage.ca_bundle: no such file: {config.ca_bundle}")
    settings = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=min(config.timeout_s, 10),
        read_timeout=config.timeout_s,
        max_pool_connections=S3_CONNECTIONS,
        request_checksum_calculation=config.request_checksum_calculation,
        s3={"addressing_style": "path" if config.path_style else "auto"},
    )
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=config.endpoint,
            region_name=config.region,
            verify=None if config.ca_bundle is None else str(config.ca_bundle),
            config=settings,
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"{url}: {_one_line(error)}; see the `storage` section") from error
