"""What a run is: the image list, the chunk table and the digests. Created once, then only read.

The image table is stored under its own digest before the plan names it, so that a planner that loses the race, or dies
between the two writes, leaves nothing that could be mistaken for the run.
"""

import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mill_shared.errors import AlreadyExists, ConfigError, CorruptError, KeyMissing, PlanMismatch
from mill_shared.keys import RunKeys
from mill_shared.records import ChunkMeta, check_chunk
from mill_shared.storage import Store

IMAGE_ROW_GROUP = 65_536
PATH_ID_BITS = 53
"""Ids made from paths fit into the integers that JSON readers keep exact."""

_IMAGE_COLUMNS: dict[str, pa.DataType] = {
    "image_id": pa.int64(), "key": pa.string(), "size_bytes": pa.int64(), "etag": pa.string()
}  # fmt: skip
_IMAGE_SCHEMA = pa.schema(_IMAGE_COLUMNS)


@dataclass(frozen=True)
class ImageRow:
    """One image of the dataset; its row is its position in the plan."""

    image_id: int
    key: str
    size_bytes: int
    """0 where the listing lacks the image."""
    etag: str
    """The store's own; empty for a path."""


class RunPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is, as plan.json holds it."""

    run: str
    recipe: str
    images: int
    chunk_size: int
    images_digest: str
    label_digest: str
    code: str
    """Version of Labelmill that labels."""
    identity: dict[str, Any]
    """Every identity field of the run file by its dotted path."""
    content: dict[str, str]
    """SHA-256 of what the labels depend on beside the run file: weights, prompts."""


@dataclass(frozen=True)
class LabelPass:
    """The rows that one pass labels, cut into chunks."""

    index: int
    rows: Sequence[int]
    chunk_size: int

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self.rows) // self.chunk_size)

    def chunk_rows(self, chunk: int) -> Sequence[int]:
        """Return the plan rows of one chunk, ascending."""
        return self.rows[chunk * self.chunk_size : (chunk + 1) * self.chunk_size]


def code_version() -> str:
    """Return the version that goes into the digests."""
    return version("labelmill")


def digest_of(value: object) -> str:
    """SHA-256 of a JSON value in canonical form, as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def images_digest(images: Sequence[ImageRow]) -> str:
    """SHA-256 over ids, keys, sizes and etags in order, as hex."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.image_id}\t{image.key}\t{image.size_bytes}\t{image.etag}\n".encode())
    return digest.hexdigest()


def build_plan(
    *, run: str | None, recipe: str, identity: Mapping[str, Any], content: Mapping[str, str],
    chunk_size: int, images: Sequence[ImageRow],
) -> RunPlan:  # fmt: skip
    """Return the plan of a run; the default run id is the recipe's name and 8 digits of the label digest."""
    listed = images_digest(images)
    label_digest = digest_of(
        {"recipe": recipe, "identity": identity, "content": content, "code": code_version(), "images": listed}
    )
    return RunPlan(
        run=run or f"{recipe}-{label_digest[:8]}",
        recipe=recipe,
        images=len(images),
        chunk_size=chunk_size,
        images_digest=listed,
        label_digest=label_digest,
        code=code_version(),
        identity=dict(identity),
        content=dict(content),
    )


def path_image_id(key: str) -> int:
    """Return an id made from an image's relative path; other images never shift it."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> (64 - PATH_ID_BITS)


def assign_ids(keys: Sequence[str], ids: str) -> list[int]:
    """Give each image its id.

    Args:
        keys: image keys relative to the dataset's root.
        ids: `stem` for the integer in the file name, `path` for a hash of the relative path, `auto` for stems where all
            are integers and else paths.

    Raises:
        ConfigError: two images with one id, or a stem that is no integer under `stem`.
    """
    stems = [PurePosixPath(key).stem for key in keys]
    numeric = [stem.isascii() and stem.isdigit() for stem in stems]
    if ids == "stem" and not all(numeric):
        raise ConfigError(f"image {keys[numeric.index(False)]}: the file name is no number; set dataset.ids to path")
    by_stem = ids == "stem" or (ids == "auto" and all(numeric))
    found = [int(stem) for stem in stems] if by_stem else [path_image_id(key) for key in keys]
    seen: dict[int, str] = {}
    for image_id, key in zip(found, keys, strict=True):
        if image_id in seen:
            raise ConfigError(
                f"images {seen[image_id]} and {key} have one id, {image_id}; rename one or set dataset.ids to path"
            )
        seen[image_id] = key
    return found


def list_images(store: Store, extensions: Collection[str], ids: str) -> list[ImageRow]:
    """List the pictures below a store's root in ascending order of their keys. Hidden files are passed over.

    Raises:
        ConfigError: there is none, or two have one id.
    """
    entries = [
        entry
        for entry in store.list("")
        if PurePosixPath(entry.key).suffix.lower() in extensions and not PurePosixPath(entry.key).name.startswith(".")
    ]
    if not entries:
        raise ConfigError(f"{store.url}: no pictures there that end in {', '.join(sorted(extensions))}")
    entries.sort(key=lambda entry: entry.key)
    found = assign_ids([entry.key for entry in entries], ids)
    return [ImageRow(i, entry.key, entry.size_bytes, entry.etag) for i, entry in zip(found, entries, strict=True)]


class _CocoImage(msgspec.Struct):
    id: int
    file_name: str


class _CocoImages(msgspec.Struct):
    images: list[_CocoImage]


def list_coco_images(coco: bytes, name: str, store: Store) -> list[ImageRow]:
    """Take the images of a COCO file, in ascending order of their file names.

    Args:
        coco: the file.
        name: what the file is called in errors.
        store: where the pictures are; one that is absent there becomes a failed record when it is labelled.

    Raises:
        ConfigError: not a COCO file, no images, or two with one id or file name.
    """
    try:
        listed = msgspec.json.decode(coco, type=_CocoImages).images
    except msgspec.DecodeError as error:
        raise ConfigError(f"{name}: not a COCO file with images: {error}") from error
    if not listed:
        raise ConfigError(f"{name}: its list of images is empty")
    by_id: dict[int, str] = {}
    names: set[str] = set()
    for image in listed:
        if image.id in by_id:
            raise ConfigError(f"{name}: images {by_id[image.id]} and {image.file_name} have one id, {image.id}")
        if image.file_name in names:
            raise ConfigError(f"{name}: file {image.file_name} is listed twice")
        by_id[image.id] = image.file_name
        names.add(image.file_name)
    present = {entry.key: entry for entry in store.list("") if entry.key in names}
    if not present:
        raise ConfigError(
            f"{store.url}: none of the {len(listed)} images of {name} is there, e.g. {listed[0].file_name}"
        )
    rows = []
    for image in sorted(listed, key=lambda image: image.file_name):
        entry = present.get(image.file_name)
        rows.append(ImageRow(image.id, image.file_name, entry.size_bytes if entry else 0, entry.etag if entry else ""))
    return rows


def compare_identity(plan: RunPlan, identity: Mapping[str, Any], content: Mapping[str, str] | None) -> None:
    """Check that a run file still means the run that the plan describes.

    Args:
        plan: the run's plan.
        identity: identity fields of the run file.
        content: digests of weights and prompts, or None where they are not at hand (finalize needs none).

    Raises:
        PlanMismatch: names every field that differs, with both values.
    """
    pairs: list[tuple[str, Any, Any]] = [
        (name, plan.identity.get(name), identity.get(name)) for name in sorted(plan.identity.keys() | identity.keys())
    ]
    if content is not None:
        pairs += [
            (f"{name} (SHA-256)", plan.content.get(name), content.get(name))
            for name in sorted(plan.content.keys() | content.keys())
        ]
        pairs.append(("version of labelmill", plan.code, code_version()))
    differing = [
        f"{name}: {planned!r} in the plan, {given!r} now" for name, planned, given in pairs if planned != given
    ]
    if differing:
        raise PlanMismatch(
            f"run {plan.run} exists with another identity: {'; '.join(differing)}. "
            "Restore these, or choose another run id"
        )


def read_plan(store: Store, run: str) -> RunPlan:
    """Read a run's plan.

    Raises:
        ConfigError: there is no such run.
        CorruptError: the plan cannot be read.
    """
    try:
        data = store.get(RunKeys(run).plan)
    except KeyMissing as error:
        raise ConfigError(f"run {run}: no plan in {store.url}; make one with `mill plan`") from error
    try:
        return msgspec.json.decode(data, type=RunPlan)
    except msgspec.DecodeError as error:
        raise CorruptError(f"run {run}: plan.json cannot be read: {error}") from error


def write_plan(store: Store, plan: RunPlan, images: Sequence[ImageRow]) -> RunPlan:
    """Store a new plan, create-once, and return the plan that holds: the winner's, where another came first."""
    keys = RunKeys(plan.run)
    sink = io.BytesIO()
    table = pa.Table.from_pydict(
        {name: [getattr(image, name) for image in images] for name in _IMAGE_SCHEMA.names}, schema=_IMAGE_SCHEMA
    )
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, row_group_size=IMAGE_ROW_GROUP)
    store.put(keys.images(plan.images_digest), sink.getvalue())
    try:
        store.put_new(keys.plan, msgspec.json.format(msgspec.json.encode(plan, order="sorted"), indent=1))
    except AlreadyExists:
        return read_plan(store, plan.run)
    return plan


def read_images(store: Store, plan: RunPlan, rows: Collection[int] | None = None) -> Iterator[tuple[int, ImageRow]]:
    """Yield (row, image) of the plan's image table in order.

    Args:
        store: the run's store.
        plan: the run's plan.
        rows: the wanted rows; default: all.

    Raises:
        CorruptError: the table is missing or damaged.
    """
    key = RunKeys(plan.run).images(plan.images_digest)
    try:
        table = pq.ParquetFile(io.BytesIO(store.get(key)), page_checksum_verification=True)
    except (KeyMissing, pa.ArrowInvalid) as error:
        raise CorruptError(f"{key}: the image table is missing or damaged: {error}") from error
    wanted = np.arange(plan.images) if rows is None else np.sort(np.fromiter(rows, np.int64, len(rows)))
    first = 0
    for batch in table.iter_batches(IMAGE_ROW_GROUP):
        begin, end = np.searchsorted(wanted, (first, first + len(batch)))
        some = batch.take(wanted[begin:end] - first)
        columns = (some.column(name).to_pylist() for name in _IMAGE_SCHEMA.names)
        for row, *values in zip(wanted[begin:end].tolist(), *columns, strict=True):
            yield row, ImageRow(*values)
        first += len(batch)


class PassList(msgspec.Struct, frozen=True):
    """The rows that a later pass relabels."""

    label_digest: str
    reasons: list[str]
    """The reasons that were chosen; empty for all."""
    rows: list[int]


def read_pass(store: Store, plan: RunPlan, index: int) -> LabelPass | None:
    """Return a pass of a run, or None where it was never made. Pass 0 always exists."""
    if index == 0:
        return LabelPass(0, range(plan.images), plan.chunk_size)
    key = RunKeys(plan.run).pass_list(index)
    try:
        listed = msgspec.json.decode(store.get(key), type=PassList)
    except KeyMissing:
        return None
    except msgspec.DecodeError as error:
        raise CorruptError(f"{key}: cannot be read: {error}") from error
    if listed.label_digest != plan.label_digest:
        raise CorruptError(f"{key}: belongs to another plan")
    return LabelPass(index, listed.rows, plan.chunk_size)


def read_passes(store: Store, plan: RunPlan) -> list[LabelPass]:
    """Return all passes of a run, in order."""
    passes: list[LabelPass] = []
    while (found := read_pass(store, plan, len(passes))) is not None:
        passes.append(found)
    return passes


def write_pass(store: Store, plan: RunPlan, index: int, rows: Sequence[int], reasons: Sequence[str]) -> None:
    """Store the list of a new pass, create-once.

    Raises:
        AlreadyExists: another list of that pass exists.
    """
    listed = PassList(label_digest=plan.label_digest, reasons=sorted(reasons), rows=sorted(rows))
    store.put_new(RunKeys(plan.run).pass_list(index), msgspec.json.encode(listed))


def check_chunk_of(data: bytes, plan: RunPlan, pass_index: int, chunk: int) -> ChunkMeta:
    """Check that bytes are a whole, undamaged chunk of this plan in this place.

    Raises:
        CorruptError: they are not; the message says why.
    """
    meta = check_chunk(data)
    if (meta.label_digest, meta.pass_index, meta.chunk) != (plan.label_digest, pass_index, chunk):
        raise CorruptError(
            f"belongs to pass {meta.pass_index}, chunk {meta.chunk} of label digest {meta.label_digest[:8]}, "
            f"expected pass {pass_index}, chunk {chunk} of {plan.label_digest[:8]}"
        )
    return meta
