"""Records to a final without a store: for tests of finalize."""

from collections.abc import Sequence
from pathlib import Path

import duckdb

from mill_jobs.finalize import ScratchWriter
from mill_jobs.flat import FlatWriter, create_views
from mill_jobs.recipes.base import RecordTable, Summary
from mill_jobs.recipes.cotpl.config import CotplFinalizeConfig
from mill_jobs.recipes.cotpl.evidence import EVIDENCE
from mill_jobs.recipes.cotpl.finalize import finalize
from mill_shared.coco import CocoBase
from mill_shared.presets import COCO_80
from mill_shared.records import ChunkMeta, ImageRecord, encode_chunk

COCO_IDS = (
    *range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91)
)  # fmt: skip
"""Source: specs/cotpl.md 4, category ids in brackets."""
COCO_CATEGORIES = [
    {"supercategory": "thing", "id": id_, "name": name} for id_, name in zip(COCO_IDS, COCO_80, strict=True)
]


def finalize_records(
    records: Sequence[ImageRecord], config: CotplFinalizeConfig, base: CocoBase | None, folder: Path, *,
    images: int | None = None, chunk_size: int = 3, threads: int = 2, backwards: bool = False,
) -> Summary:  # fmt: skip
    """Write a final to a folder.

    Args:
        records: in any order.
        config: what to do.
        base: the truth that is kept.
        folder: is made, for the final's files.
        images: of the plan; default: the records.
        chunk_size: records a chunk file.
        threads: of duckdb.
        backwards: the first half of the chunks comes from a second pass, behind the others.
    """
    chunks = folder.parent / f"{folder.name}-chunks"
    chunks.mkdir(parents=True)
    files = []
    for chunk, start in enumerate(range(0, max(1, len(records)), chunk_size)):
        meta = ChunkMeta(label_digest="0" * 64, pass_index=0, chunk=chunk)
        files.append(chunks / f"{chunk:06d}.parquet")
        files[-1].write_bytes(encode_chunk(records[start : start + chunk_size], meta, EVIDENCE))
    half = len(files) // 2 if backwards else 0
    passes = {0: files[half:], 1: files[:half]} if half else {0: files}
    with duckdb.connect(config={"threads": threads}) as connection:
        paths = [str(path) for index in sorted(passes) for path in passes[index]]
        with FlatWriter(chunks / "flat") as flat:
            for index, written in passes.items():
                for path in written:
                    flat.add(index, flat.read(path.read_bytes()))
        create_views(connection, list(passes), flat.folder)

        def open_records() -> None:
            connection.read_parquet(paths).create_view("records")

        table = RecordTable(connection, len(records) if images is None else images, open_records)
        return finalize(config, table, base, ScratchWriter(folder))
