"""Records to a final: check what the plan names, decide whether it is enough, let the recipe write, publish last."""

import hashlib
import io
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import duckdb
import msgspec
import pyarrow as pa
import structlog

from mill_jobs.config import RunConfig
from mill_jobs.final import FileEntry, Manifest, file_sha256, publish_ref, read_manifest
from mill_jobs.flat import FlatWriter, create_views
from mill_jobs.recipes.base import RecordTable, Summary
from mill_jobs.recipes.choose import finalize_recipe
from mill_jobs.trainer.bundle import gather_inputs, write_trainer_part
from mill_jobs.trainer.check import check_bundle
from mill_jobs.trainer.classes import ClassList
from mill_jobs.trainer.config import TrainerConfig
from mill_shared.coco import CocoBase, annotations_per_class, open_base
from mill_shared.errors import ConfigError, CorruptError, CoverageError, InvariantError, KeyMissing
from mill_shared.keys import RunKeys
from mill_shared.models.weights import content_digest
from mill_shared.plan import RunPlan, check_chunk_of, code_version, digest_of, read_images, read_passes
from mill_shared.storage import LocalStore, Store, open_store

log = structlog.get_logger()

T = TypeVar("T")
R = TypeVar("R")

CHUNKS_IN_FLIGHT = 64
NAMED_IN_ERRORS = 10
NOT_CONTENT: dict[str, Any] = {"base": True, "trainer": {"embeddings": {"clip", "plain", "attn12"}}}
"""Paths of the finalize part whose content goes into the digest in their place."""
DUCKDB_MEMORY = "512MB"
LARGE_BASE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Finalized:
    """A published final."""

    digest: str
    manifest: Manifest
    summary: Summary
    is_latest: bool


@dataclass(frozen=True)
class _Chunk:
    pass_index: int
    chunk: int
    digest: str
    path: Path


@dataclass(frozen=True)
class Gathered:
    """The chunks of a run on local disk, and those that are missing or damaged."""

    chunks: list[_Chunk]
    missing: list[tuple[int, int, str]]
    """(pass, chunk, why)."""
    passes: int

    def files(self) -> dict[int, list[Path]]:
        """Return pass -> its chunk files, in plan order."""
        found: dict[int, list[Path]] = {}
        for item in self.chunks:
            found.setdefault(item.pass_index, []).append(item.path)
        return found


class _HashedFile(io.FileIO):
    """A new file that is hashed while it is written, from its start to its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write some of the data and return how much."""
        count = super().write(data)
        assert count is not None, "files never block"
        self.sha256.update(memoryview(data)[:count])
        return count


class ScratchWriter:
    """Files of a final, in a scratch folder until they are published."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Open a new file of the final for writing."""
        with _HashedFile(self.path(name)) as file, io.BufferedWriter(file) as stream:
            yield cast(BinaryIO, stream)
        self._digests[name] = file.sha256.hexdigest()

    def path(self, name: str) -> Path:
        """Return where a file of the final is to be written by another writer."""
        return self.folder / name

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file of the final, as hex."""
        return self._digests.get(name) or file_sha256(self.path(name))


def gather_chunks(store: Store, plan: RunPlan, scratch: Path, flat: FlatWriter | None = None) -> Gathered:
    """Bring every chunk that the plan names to local disk and check each byte; nothing is taken from a listing.

    Args:
        store: the run's store.
        plan: the run's plan.
        scratch: where chunks go that do not lie on a disk.
        flat: also gets what it needs of each chunk, while the bytes are at hand.
    """
    keys = RunKeys(plan.run)
    passes = read_passes(store, plan)
    wanted = [(p.index, chunk) for p in passes for chunk in range(p.chunks)]

    def fetch(place: tuple[int, int]) -> tuple[_Chunk, pa.Table | None] | tuple[int, int, str]:
        pass_index, chunk = place
        key = keys.chunk(pass_index, chunk)
        try:
            data = store.get(key)
            meta = check_chunk_of(data, plan, pass_index, chunk)
        except KeyMissing:
            return (pass_index, chunk, "missing")
        except CorruptError as error:
            log.warning("damaged chunk counts as missing", key=key, error=str(error))
            return (pass_index, chunk, str(error))
        leaves = None if flat is None else flat.read(data)
        if isinstance(store, LocalStore):
            return _Chunk(pass_index, chunk, meta.digest, store.path_of(key)), leaves
        path = scratch / f"{pass_index}-{chunk:06d}.parquet"
        path.write_bytes(data)
        return _Chunk(pass_index, chunk, meta.digest, path), leaves

    gathered = Gathered([], [], len(passes))
    workers = 2 if isinstance(store, LocalStore) else CHUNKS_IN_FLIGHT
    with ThreadPoolExecutor(workers, thread_name_prefix="gather") as pool:
        for found in _in_order(pool, fetch, wanted, CHUNKS_IN_FLIGHT):
            match found:
                case (_Chunk() as chunk, leaves):
                    gathered.chunks.append(chunk)
                    if flat is not None and leaves is not None:
                        flat.add(chunk.pass_index, leaves)
                case (pass_index, index, why):
                    gathered.missing.append((pass_index, index, why))
    return gathered


def _in_order(pool: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield the result of each item, in order, with at most `ahead` of them waiting in memory."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def record_table(
    gathered: Gathered, plan: RunPlan, scratch: Path, flat: FlatWriter | None = None
) -> Iterator[RecordTable]:
    """Open the records of a run: an image's newest `ok` or `empty` record, else its newest `failed`.

    Args:
        gathered: the chunks.
        plan: the run's plan.
        scratch: for what does not fit in memory.
        flat: with what it wrote, the narrow views are there at once, and the view `records` only after `open_records`.
    """
    connection = duckdb.connect(
        config={
            "memory_limit": DUCKDB_MEMORY,
            "temp_directory": str(scratch / "duckdb"),
            "autoinstall_known_extensions": False,
        }
    )
    try:
        by_pass = gathered.files()
        if not by_pass:
            raise CoverageError(f"run {plan.run}: none of its chunks is there; label it first")
        table = RecordTable(connection, plan.images, lambda: _create_records(connection, by_pass))
        if flat is None:
            table.open_records()
        else:
            create_views(connection, list(by_pass), flat.folder)
        yield table
    finally:
        connection.close()


def _create_records(connection: duckdb.DuckDBPyConnection, by_pass: Mapping[int, Sequence[Path]]) -> None:
    for pass_index, paths in by_pass.items():
        connection.read_parquet([str(path) for path in paths]).create_view(f"pass_{pass_index}")
    if list(by_pass) == [0]:
        connection.execute("create view records as select * from pass_0")
        return
    union = " union all ".join(
        f"select row, status, {p} as pass from pass_{p}"
        + (" where row in (select row from relabelled)" if p == 0 else "")
        for p in by_pass
    )
    later = " union all ".join(f"select row from pass_{p}" for p in by_pass if p > 0)
    connection.execute(f"create temp table relabelled as select distinct row from ({later})")
    connection.execute(
        "create temp table newest_pass as select row, "
        "coalesce(max(pass) filter (status <> 'failed'), max(pass)) as pass "
        f"from ({union}) group by row"
    )
    parts = [
        f"select p.* from pass_{p} p join newest_pass c on c.row = p.row and c.pass = {p}" for p in by_pass if p > 0
    ]
    if 0 in by_pass:
        parts.insert(
            0,
            "select * from pass_0 where row not in (select row from relabelled) or "
            "row in (select row from newest_pass where pass = 0)",
        )
    connection.execute("create view records as " + " union all ".join(parts))


def count_outcomes(table: RecordTable) -> tuple[dict[str, int], dict[str, int]]:
    """Return (images by outcome with `missing`, failed images by reason).

    Raises:
        CorruptError: an image has two records.
    """
    rows = table.connection.execute("select status, reason, count(*) from images group by all order by all").fetchall()
    outcomes = {"ok": 0, "empty": 0, "failed": 0}
    failed: dict[str, int] = {}
    for status, reason, count in rows:
        outcomes[status] += count
        if reason is not None:
            failed[reason] = failed.get(reason, 0) + count
    total, distinct = table.connection.execute("select count(*), count(distinct row) from images").fetchall()[0]
    if total != distinct:
        raise CorruptError(f"{total - distinct} images have more than one record; run `mill verify`")
    outcomes["missing"] = table.images - total
    return outcomes, failed


def check_coverage(
    config: RunConfig, plan: RunPlan, store: Store, gathered: Gathered, table: RecordTable, base: CocoBase | None,
    outcomes: dict[str, int], failed: dict[str, int],
) -> None:  # fmt: skip
    """Refuse a run that lacks too much.

    Raises:
        CoverageError: names images, reasons, the effect per class and what to do.
    """
    limits = config.limits
    problems = []
    coverage = 1 - outcomes["missing"] / plan.images
    if coverage < limits.min_coverage:
        missing = ", ".join(f"{chunk} ({why})" for _, chunk, why in gathered.missing[:NAMED_IN_ERRORS])
        more = len(gathered.missing) - NAMED_IN_ERRORS
        problems.append(
            f"{outcomes['missing']} of {plan.images} images have no record (coverage {coverage:.4f}, "
            f"limits.min_coverage {limits.min_coverage:g}); chunks {missing}"
            f"{f' and {more} more' if more > 0 else ''}: label them, with --repair where they are damaged"
        )
    share = outcomes["failed"] / plan.images
    if share > limits.max_failed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(failed.items()))
        named = table.connection.execute(
            "select key, reason from images where status = 'failed' order by row limit ?", [NAMED_IN_ERRORS]
        ).fetchall()
        images = ", ".join(f"{key} ({reason})" for key, reason in named)
        more = outcomes["failed"] - len(named)
        problems.append(
            f"{outcomes['failed']} of {plan.images} images failed (share {share:.4f}, limits.max_failed "
            f"{limits.max_failed:g}): {reasons}; {images}{f' and {more} more' if more > 0 else ''}: mend them and run "
            "`mill plan --again`, or raise limits.max_failed"
        )
    if not problems:
        return
    if base is not None:
        recorded = "select image_id from images where status <> 'failed'"
        present = {row[0] for row in table.connection.execute(recorded).fetchall()}
        lost = {image.image_id for _, image in read_images(store, plan)} - present
        effect = annotations_per_class(base, lost)
        total = annotations_per_class(base, None)
        worst = sorted(effect, key=lambda name: (-effect[name] / total[name], name))[:NAMED_IN_ERRORS]
        problems.append(
            "base annotations on these images: "
            + (", ".join(f"{name} {effect[name]} of {total[name]}" for name in worst) or "none")
        )
    raise CoverageError(f"run {plan.run}: " + "; ".join(problems))


def local_file(url: str, config: RunConfig, scratch: Path, what: str) -> Path:
    """Return a local path of a file that is named by a path or an `s3://` URL.

    Raises:
        ConfigError: there is no such file.
    """
    if not url.startswith("s3://"):
        if not Path(url).is_file():
            raise ConfigError(f"{what}: no such file: {url}")
        return Path(url)
    parent, _, name = url.rpartition("/")
    path = scratch / name
    try:
        open_store(parent, config.storage).get_file(name, path)
    except KeyMissing as error:
        raise ConfigError(f"{what}: no such object: {url}") from error
    return path


def finalize_run(config: RunConfig, plan: RunPlan, store: Store) -> Finalized:
    """Make and publish a final of a run; the same input gives the same digest and the same bytes.

    Raises:
        CoverageError: too few records, or too many failed ones.
        InvariantError: the bundle would break a rule of the trainer.
        ConfigError: the base file or the finalize part of the config is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="mill-finalize-", dir=_scratch_parent(store)) as name:
        scratch = Path(name)
        settings = config.finalize
        base_path = None if settings.base is None else local_file(settings.base, config, scratch, "finalize.base")
        with _base_reader(base_path) as pool:
            opening = pool.submit(open_base, base_path, settings.taxonomy, settings.base_classes)
            with FlatWriter(scratch / "flat") as flat:
                gathered = gather_chunks(store, plan, scratch, flat)
            base = opening.result()
        base_sha256 = None if base is None or base.file is None else base.file.sha256
        inputs = gather_inputs(
            settings.trainer, lambda url, what: local_file(url, config, scratch, what), content_digest
        )
        finalize_part = {
            "finalize": settings.model_dump(mode="json", exclude=NOT_CONTENT),
            "recipe": config.recipe.finalize.model_dump(mode="json"),
        }
        chunks = [(item.pass_index, item.chunk, item.digest) for item in gathered.chunks]
        digest = digest_of(
            {
                "config": finalize_part,
                "plan": plan.label_digest,
                "chunks": chunks,
                "base": base_sha256,
                "trainer": dict(inputs.digests),
                "code": code_version(),
            }
        )[:16]
        with record_table(gathered, plan, scratch, flat) as table:
            outcomes, failed = count_outcomes(table)
            check_coverage(config, plan, store, gathered, table, base, outcomes, failed)
            existing = read_manifest(store, plan.run, digest)
            if existing is not None:
                log.info("this final exists already", final=digest)
                summary = msgspec.json.decode(store.get(RunKeys(plan.run).final(digest, "summary.json")), type=Summary)
                return Finalized(digest, existing, summary, publish_ref(store, plan.run, existing))
            writer = ScratchWriter(scratch / "final")
            summary = finalize_recipe(config, table, base, writer)
        classes = ClassList.from_json(writer.path("classes.json").read_bytes())
        notes, missing = write_trainer_part(settings.trainer, inputs, classes, writer, store)
        lacks = [f"incomplete: {line}" for line in missing]
        summary = msgspec.structs.replace(summary, notes=(*summary.notes, *notes, *lacks))
        with writer.create("summary.json") as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(summary), indent=1))
        require_whole(plan.run, writer.folder, settings.trainer)
        manifest = Manifest(
            run=plan.run, final=digest, label_digest=plan.label_digest, recipe=plan.recipe, code=code_version(),
            finalize=finalize_part, base_sha256=base_sha256, passes=gathered.passes, images=plan.images,
            records=outcomes, failed=failed, chunks=chunks,
            files=_publish_files(store, plan.run, digest, writer), missing=missing,
        )  # fmt: skip
        store.put_new(RunKeys(plan.run).manifest(digest), msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        return Finalized(digest, manifest, summary, publish_ref(store, plan.run, manifest))


def require_whole(run: str, folder: Path, trainer: TrainerConfig) -> None:
    """Refuse a bundle that would mislead a trainer, before anybody can see it.

    Raises:
        InvariantError: names every fault.
    """
    checked = check_bundle(folder, trainer)
    for line in checked.warnings:
        log.warning("left alone", what=line)
    if checked.faults:
        raise InvariantError(
            f"run {run}: nothing was published, the bundle would be wrong: {'; '.join(checked.faults)}"
        )


def _base_reader(base_path: Path | None) -> Executor:
    """Parsing a large base file would hold the interpreter's lock for seconds, so it gets a process of its own."""
    if base_path is None or base_path.stat().st_size < LARGE_BASE_BYTES:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def _scratch_parent(store: Store) -> Path | None:
    """Scratch lies on the store's own disk where the store is a path, so that finals move instead of being copied."""
    return store.scratch_folder() if isinstance(store, LocalStore) else None


def _publish_files(store: Store, run: str, digest: str, written: ScratchWriter) -> list[FileEntry]:
    keys = RunKeys(run)

    def publish(path: Path) -> FileEntry:
        entry = FileEntry(path.name, path.stat().st_size, written.sha256(path.name))
        store.put_file(keys.final(digest, path.name), path)
        return entry

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(publish, sorted(written.folder.iterdir())))
