"""The outcome of one image, and chunks of them as parquet objects that know their own digest.

A chunk is one parquet file: a row an image, its regions nested. The footer holds the chunk's metadata with a SHA-256
over the whole file in which the digest itself stands as zeros, so any changed byte is seen in one pass over the bytes.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from mill_shared.errors import CorruptError

Status = Literal["ok", "empty", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1: pixels of the upright original, x right, y down; half-open unless the recipe says otherwise."""


@dataclass(frozen=True)
class RegionMask:
    """A mask in COCO's compressed run-length form, in the frame that was labelled."""

    height: int
    width: int
    counts: bytes


@dataclass(frozen=True)
class Region:
    """A candidate that was asked about: where, what, how sure, what became of it, and the evidence."""

    box_xyxy: Box
    fate: str
    label: str | None = None
    score: float | None = None
    reason: str | None = None
    mask: RegionMask | None = None
    text_id: int | None = None
    view: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Values of the Arrow struct that the recipe declares."""


@dataclass(frozen=True)
class Dropped:
    """A candidate that was never asked about."""

    box_xyxy: Box
    score: float
    reason: str


@dataclass(frozen=True)
class ImageRecord:
    """The outcome of one image. `reason` is a short key and set exactly where the status is `failed`."""

    row: int
    image_id: int
    key: str
    status: Status
    width: int | None = None
    height: int | None = None
    reason: str | None = None
    detail: str | None = None
    regions: tuple[Region, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> SHA-256 of results that are not rows, stored as blobs."""

    def __post_init__(self) -> None:
        assert (self.reason is not None) == (self.status == "failed"), "a reason belongs to a failed record"
        assert self.status == "ok" or not self.regions, "only an ok record has regions"


class ChunkMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk says of itself."""

    label_digest: str
    pass_index: int
    chunk: int
    batch_halvings: int = 0
    """How often the batch was halved after out-of-memory; 0 where the plan's batch was used."""
    digest: str = "0" * 64


_META_KEY = "labelmill"
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"\}')
_FOOTER_TAIL_BYTES = 8
_COMPRESSED = (
    "regions.list.element.mask.counts",
    *(f"dropped.list.element.{name}" for name in ("x0", "y0", "x1", "y1", "score")),
)
"""Most of a chunk's bytes. Each zstd page costs a decompression context, so compressing the other thirty small columns
would make chunks 5 % smaller and reading them half as fast again."""


def _box_fields() -> list[tuple[str, pa.DataType]]:
    return [(name, pa.float64()) for name in ("x0", "y0", "x1", "y1")]


def chunk_schema(evidence: pa.StructType) -> pa.Schema:
    """Return the Arrow schema of a chunk whose recipe keeps `evidence` with each region."""
    mask = pa.struct([("height", pa.int32()), ("width", pa.int32()), ("counts", pa.binary())])
    region = pa.struct(
        [
            *_box_fields(),
            ("score", pa.float64()),
            ("label", pa.string()),
            ("fate", pa.string()),
            ("reason", pa.string()),
            ("text_id", pa.int64()),
            ("view", pa.string()),
            ("mask", mask),
            ("evidence", evidence),
        ]
    )
    columns: dict[str, pa.DataType] = {
        "row": pa.int64(),
        "image_id": pa.int64(),
        "key": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "status": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "files": pa.list_(pa.struct([("name", pa.string()), ("sha256", pa.string())])),
        "regions": pa.list_(region),
        "dropped": pa.list_(pa.struct([*_box_fields(), ("score", pa.float64()), ("reason", pa.string())])),
    }
    return pa.schema(columns)


def _box_dict(box: Box) -> dict[str, float]:
    return dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))


def _record_dict(record: ImageRecord) -> dict[str, Any]:
    return {
        "row": record.row,
        "image_id": record.image_id,
        "key": record.key,
        "width": record.width,
        "height": record.height,
        "status": record.status,
        "reason": record.reason,
        "detail": record.detail,
        "files": [{"name": name, "sha256": sha256} for name, sha256 in sorted(record.files.items())],
        "regions": [
            {
                **_box_dict(region.box_xyxy),
                "score": region.score,
                "label": region.label,
                "fate": region.fate,
                "reason": region.reason,
                "text_id": region.text_id,
                "view": region.view,
                "mask": None
                if region.mask is None
                else {"height": region.mask.height, "width": region.mask.width, "counts": region.mask.counts},
                "evidence": dict(region.evidence),
            }
            for region in record.regions
        ],
        "dropped": [
            {**_box_dict(item.box_xyxy), "score": item.score, "reason": item.reason} for item in record.dropped
        ],
    }


def encode_table(table: pa.Table, meta: ChunkMeta) -> bytes:
    """Write a table with a chunk's schema as the bytes of a chunk. Equal input gives equal bytes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression=dict.fromkeys(_COMPRESSED, "zstd"),
        write_page_checksum=True,
        write_statistics=False,
        store_schema=False,
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(
            {_META_KEY: msgspec.json.encode(msgspec.structs.replace(meta, digest="0" * 64)).decode()}
        )
    data = bytearray(sink.getvalue())
    start = _digest_start(data)
    data[start : start + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def encode_chunk(records: Sequence[ImageRecord], meta: ChunkMeta, evidence: pa.StructType) -> bytes:
    """Write records as the bytes of a chunk, in ascending row order.

    Args:
        records: one an image.
        meta: what the chunk says of itself; its digest is filled in here.
        evidence: type of `Region.evidence`.
    """
    ordered = sorted(records, key=lambda record: record.row)
    table = pa.Table.from_pylist([_record_dict(record) for record in ordered], schema=chunk_schema(evidence))
    return encode_table(table, meta)


def _digest_start(data: bytes | bytearray) -> int:
    if len(data) < _FOOTER_TAIL_BYTES or data[-4:] != b"PAR1":
        raise CorruptError("not a complete parquet file")
    footer_bytes = int.from_bytes(data[-8:-4], "little")
    found = list(_DIGEST.finditer(data, max(0, len(data) - _FOOTER_TAIL_BYTES - footer_bytes)))
    if not found:
        raise CorruptError("no chunk digest in the parquet footer")
    return found[-1].start(1)


def check_chunk(data: bytes) -> ChunkMeta:
    """Return what a chunk says of itself, after checking every byte against its digest.

    Raises:
        CorruptError: a byte changed, or this is no chunk.
    """
    start = _digest_start(data)
    digest = hashlib.sha256(data[:start])
    digest.update(b"0" * 64)
    digest.update(memoryview(data)[start + 64 :])
    if digest.hexdigest().encode() != data[start : start + 64]:
        raise CorruptError("the chunk's bytes do not match its digest")
    meta_start = data.rfind(b'{"label_digest"', 0, start)
    try:
        return msgspec.json.decode(data[meta_start : start + 66], type=ChunkMeta)
    except msgspec.DecodeError as error:
        raise CorruptError(f"the chunk's metadata cannot be read: {error}") from error


def decode_chunk(data: bytes) -> list[ImageRecord]:
    """Read the records of a chunk. Call `check_chunk` first where the bytes come from a store."""
    return decode_rows(pq.read_table(io.BytesIO(data)).to_pylist())


def decode_rows(rows: Sequence[Mapping[str, Any]]) -> list[ImageRecord]:
    """Turn rows of a chunk's table into records."""
    return [
        ImageRecord(
            row=row["row"],
            image_id=row["image_id"],
            key=row["key"],
            status=row["status"],
            width=row["width"],
            height=row["height"],
            reason=row["reason"],
            detail=row["detail"],
            files={item["name"]: item["sha256"] for item in row["files"]},
            regions=tuple(
                Region(
                    box_xyxy=(region["x0"], region["y0"], region["x1"], region["y1"]),
                    fate=region["fate"],
                    label=region["label"],
                    score=region["score"],
                    reason=region["reason"],
                    mask=None if region["mask"] is None else RegionMask(**region["mask"]),
                    text_id=region["text_id"],
                    view=region["view"],
                    evidence=region["evidence"] or {},
                )
                for region in row["regions"]
            ),
            dropped=tuple(
                Dropped((item["x0"], item["y0"], item["x1"], item["y1"]), item["score"], item["reason"])
                for item in row["dropped"]
            ),
        )
        for row in rows
    ]
