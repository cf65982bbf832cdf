"""The records of a run without their nesting, for what has to look at every region.

A chunk holds a row an image, and its masks and answers are most of it. Reading only the wanted leaves of each file, all
files once, costs half of what a query over the nested columns does. The result lies on scratch disk, in plan order, and
is read from there as often as needed: memory does not grow with the number of regions.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

pc: Any = pyarrow.compute
"""Untyped: its stubs refuse plain values as arguments, which its documentation offers."""

IMAGES_AT_ONCE = 2048
READERS = 2

_IMAGE: dict[str, pa.DataType] = {
    "row": pa.int64(), "image_id": pa.int64(), "key": pa.string(), "width": pa.int32(), "height": pa.int32(),
    "status": pa.string(), "reason": pa.string(),
}  # fmt: skip
_CORE: dict[str, pa.DataType] = {
    "x0": pa.float64(), "y0": pa.float64(), "x1": pa.float64(), "y1": pa.float64(), "score": pa.float64(),
    "label": pa.string(), "fate": pa.string(), "reason": pa.string(),
}  # fmt: skip
_DROPPED: dict[str, pa.DataType] = {"row": pa.int64(), "reason": pa.string(), "count": pa.int64()}
_OF_IMAGE = ("row", "image_id", "width", "height")
SCHEMAS = {
    "images": pa.schema(_IMAGE),
    "regions": pa.schema({**{name: _IMAGE[name] for name in _OF_IMAGE}, "region": pa.int64(), **_CORE}),
    "dropped": pa.schema(_DROPPED),
}
_LEAVES = [*_IMAGE, *(f"regions.list.element.{name}" for name in _CORE), "dropped.list.element.reason"]


def flatten_records(
    connection: duckdb.DuckDBPyConnection, chunks: Mapping[int, Sequence[Path]], folder: Path, *, chunk_size: int
) -> None:
    """Make three views of the records, an image's newest `ok` or `empty` one, else its newest `failed`.

    `images` has a row an image; `regions` one a region that was asked about, with the columns of its image, its place
    in the record (`region`) and its place among all (`place`); `dropped` the numbers of candidates by image and reason.
    The first two come in plan order.

    Args:
        connection: where the views are made.
        chunks: pass -> its chunk files in plan order.
        folder: scratch; is made.
        chunk_size: images a chunk.
    """
    folder.mkdir(parents=True)
    for index, files in chunks.items():
        _flatten_pass(files, folder, str(index), files_at_once=max(1, IMAGES_AT_ONCE // chunk_size))
    if len(chunks) > 1:
        _choose(connection, sorted(chunks), folder)
    newest = "all" if len(chunks) > 1 else str(next(iter(chunks)))
    for name in SCHEMAS:
        place = ", file_row_number as place" if name == "regions" else ""
        columns = ", ".join(f'"{column}"' for column in SCHEMAS[name].names)
        connection.execute(
            f"create view {name} as select {columns}{place} from "
            f"read_parquet('{_quoted(folder / f'{name}-{newest}.parquet')}', file_row_number = true)"
        )


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _flatten_pass(files: Sequence[Path], folder: Path, name: str, *, files_at_once: int) -> None:
    groups = [files[start : start + files_at_once] for start in range(0, len(files), files_at_once)]
    writers = {
        table: pq.ParquetWriter(folder / f"{table}-{name}.parquet", schema, compression="lz4", write_statistics=False)
        for table, schema in SCHEMAS.items()
    }
    try:
        with ThreadPoolExecutor(READERS, thread_name_prefix="flatten") as pool:
            for tables in pool.map(_flatten_files, groups):
                for table, rows in tables.items():
                    writers[table].write_table(rows)
    finally:
        for writer in writers.values():
            writer.close()


def _flatten_files(files: Sequence[Path]) -> dict[str, pa.Table]:
    read = [pq.ParquetFile(path).read(columns=_LEAVES, use_threads=False) for path in files]
    table = pa.concat_tables(read).combine_chunks()
    flat = {"images": table.select(list(_IMAGE))}
    parents, regions = _unnested(table["regions"])
    starts = np.searchsorted(parents, parents)
    columns = {name: table[name].take(pa.array(parents)) for name in _OF_IMAGE}
    columns["region"] = pa.array(np.arange(len(parents)) - starts)
    flat["regions"] = pa.table({**columns, **{name: pc.struct_field(regions, name) for name in _CORE}})
    parents, dropped = _unnested(table["dropped"])
    reasons = pa.table({"row": table["row"].take(pa.array(parents)), "reason": pc.struct_field(dropped, "reason")})
    counts = reasons.group_by(["row", "reason"], use_threads=False).aggregate([([], "count_all")])
    flat["dropped"] = counts.rename_columns(["row", "reason", "count"])
    return {name: rows.cast(SCHEMAS[name]) for name, rows in flat.items()}


def _unnested(lists: Any) -> tuple[Any, Any]:
    """Return (index of its list, value) of each element."""
    return pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists)


def _choose(connection: duckdb.DuckDBPyConnection, passes: Sequence[int], folder: Path) -> None:
    """Bring the newest records of several passes together."""

    def union(name: str) -> str:
        return " union all ".join(
            f"select *, {index} as pass from read_parquet('{_quoted(folder / f'{name}-{index}.parquet')}')"
            for index in passes
        )

    connection.execute(
        "create temp table flat_newest as "
        "select row, coalesce(max(pass) filter (status <> 'failed'), max(pass)) as pass "
        f"from ({union('images')}) group by row"
    )
    for name, order in (("images", "row"), ("regions", "row, region"), ("dropped", "row, reason")):
        target = _quoted(folder / f"{name}-all.parquet")
        connection.execute(
            f"copy (select * exclude (pass) from ({union(name)}) join flat_newest using (row, pass) order by {order}) "
            f"to '{target}' (format parquet)"
        )
    connection.execute("drop table flat_newest")
