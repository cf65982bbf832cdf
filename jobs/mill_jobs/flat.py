"""The records of a run without their nesting, for what has to look at every region.

A chunk holds a row an image, and its masks and answers are most of it. Reading only the wanted leaves of each file, all
files once, costs half of what a query over the nested columns does. The result lies on scratch disk, in plan order, and
is read from there as often as needed: memory does not grow with the number of regions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from pyarrow.parquet.core import ParquetReader

pc: Any = pyarrow.compute
"""Untyped: its stubs refuse plain values as arguments, which its documentation offers."""

IMAGES_AT_ONCE = 1024

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
_REASON = "dropped.list.element.reason"
_LEAVES = [*_IMAGE, *(f"regions.list.element.{name}" for name in _CORE), _REASON]


class FlatWriter:
    """Writes the images, the regions and the counts of dropped candidates of each pass to a folder.

    Chunks are read in any order, and added pass by pass in plan order.
    """

    def __init__(self, folder: Path) -> None:
        # The default pool keeps 100 MB of what it was given for many small tables; the system's gives them back.
        pa.set_memory_pool(pa.system_memory_pool())
        folder.mkdir(parents=True)
        self.folder = folder
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._pass: int | None = None
        self._waiting: list[pa.Table] = []
        self._wanted: list[int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_pass()

    def read(self, data: bytes) -> pa.Table:
        """Return what the views need of a chunk's bytes, a small part of them. Any thread may do this.

        The reader inside ParquetFile is used: its outside costs half as much again for files this small. All chunks of
        a run have one schema, so that the columns are looked up once.
        """
        reader = ParquetReader()
        reader.open(pa.BufferReader(data), read_dictionary=[_REASON])
        if self._wanted is None:
            schema = reader.metadata.schema
            self._wanted = [index for index in range(len(schema)) if schema.column(index).path in _LEAVES]
        return reader.read_all(column_indices=self._wanted, use_threads=False)

    def add(self, pass_index: int, leaves: pa.Table) -> None:
        """Write what was read of a chunk."""
        if pass_index != self._pass:
            self._close_pass()
            self._pass = pass_index
            self._writers = {
                name: pq.ParquetWriter(
                    _file(self.folder, name, pass_index), schema, compression="lz4", write_statistics=False
                )
                for name, schema in SCHEMAS.items()
            }
        self._waiting.append(leaves)
        if sum(map(len, self._waiting)) >= IMAGES_AT_ONCE:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            for name, rows in _flatten(pa.concat_tables(self._waiting).combine_chunks()).items():
                self._writers[name].write_table(rows)
            self._waiting = []

    def _close_pass(self) -> None:
        self._write()
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


def create_views(connection: duckdb.DuckDBPyConnection, passes: Sequence[int], folder: Path) -> None:
    """Make views of what `FlatWriter` wrote: an image's newest `ok` or `empty` record, else its newest `failed`.

    `images` has a row an image; `regions` one a region that was asked about, with the columns of its image, its place
    in the record (`region`) and its place among all (`place`); `dropped` the numbers of candidates by image and reason.
    The first two come in plan order.

    Args:
        connection: where the views are made.
        passes: those that were written.
        folder: where.
    """
    newest: int | str = passes[0]
    if len(passes) > 1:
        newest = "newest"
        _choose(connection, passes, folder)
    for name, schema in SCHEMAS.items():
        columns = [f'"{column}"' for column in schema.names]
        if name == "regions":
            columns.append("file_row_number as place")
        connection.execute(
            f"create view {name} as select {', '.join(columns)} from "
            f"read_parquet({_literal(_file(folder, name, newest))}, file_row_number = true)"
        )


def _file(folder: Path, name: str, index: int | str) -> Path:
    return folder / f"{name}-{index}.parquet"


def _literal(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def _flatten(table: pa.Table) -> dict[str, pa.Table]:
    flat = {"images": table.select(list(_IMAGE))}
    parents, regions = _unnested(table["regions"])
    columns = {name: table[name].take(pa.array(parents)) for name in _OF_IMAGE}
    columns["region"] = pa.array(np.arange(len(parents)) - np.searchsorted(parents, parents))
    flat["regions"] = pa.table({**columns, **{name: pc.struct_field(regions, name) for name in _CORE}})
    parents, dropped = _unnested(table["dropped"])
    reasons = pc.struct_field(dropped, "reason").combine_chunks()
    kinds = len(reasons.dictionary)
    counts = np.bincount(parents * kinds + reasons.indices.to_numpy(), minlength=len(table) * kinds)
    found = np.flatnonzero(counts)
    flat["dropped"] = pa.table(
        {
            "row": table["row"].take(found // kinds),
            "reason": reasons.dictionary.take(found % kinds),
            "count": pa.array(counts[found]),
        }
    )
    return {name: rows.cast(SCHEMAS[name]) for name, rows in flat.items()}


def _unnested(lists: Any) -> tuple[Any, Any]:
    """Return (index of its list, value) of each element."""
    return pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists)


def _choose(connection: duckdb.DuckDBPyConnection, passes: Sequence[int], folder: Path) -> None:
    """Bring the newest records of several passes together."""

    def union(name: str) -> str:
        return " union all ".join(
            f"select *, {index} as pass from read_parquet({_literal(_file(folder, name, index))})" for index in passes
        )

    connection.execute(
        "create temp table flat_newest as "
        "select row, coalesce(max(pass) filter (status <> 'failed'), max(pass)) as pass "
        f"from ({union('images')}) group by row"
    )
    for name, order in (("images", "row"), ("regions", "row, region"), ("dropped", "row, reason")):
        connection.execute(
            f"copy (select * exclude (pass) from ({union(name)}) join flat_newest using (row, pass) order by {order}) "
            f"to {_literal(_file(folder, name, 'newest'))} (format parquet)"
        )
    connection.execute("drop table flat_newest")
