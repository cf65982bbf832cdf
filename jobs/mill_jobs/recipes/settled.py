"""What every recipe's finalize needs: settled regions, batches of them, lists of images, facts of the base file."""

from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mill_shared.coco import CocoBase, CocoFile, CocoImage
from mill_shared.errors import InvariantError

BATCH_ROWS = 16_384
NAMED = 5
"""How many images or classes a message names."""
FIRST_ANNOTATION_ID = 909_000_554_146
"""Least id of a pseudo-label beside a base file. Source: specs/cotpl.md 2.3."""

_COLUMNS: dict[str, pa.DataType] = {
    "row": pa.int64(), "image_id": pa.int64(), "region": pa.int64(), "label": pa.string(), "name": pa.string(),
    "x0": pa.float64(), "y0": pa.float64(), "x1": pa.float64(), "y1": pa.float64(), "score": pa.float64(),
    "fate": pa.string(), "reason": pa.string(), "category_id": pa.int64(), "annotation_id": pa.int64(),
}  # fmt: skip
REGIONS_SCHEMA = pa.schema(_COLUMNS)
"""regions.parquet: every region that was asked about, by row and region (its place in the record). `label` is the raw
answer, `name` what it means, where that is known; the two ids are set for what is kept."""


def read_batches(con: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.Table]:
    """Yield the rows of a query in tables of BATCH_ROWS, the last one smaller."""
    waiting: list[pa.Table] = []
    rows = 0
    for batch in con.sql(query).to_arrow_reader(BATCH_ROWS):
        waiting.append(pa.Table.from_batches([batch]))
        rows += batch.num_rows
        while rows >= BATCH_ROWS:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, BATCH_ROWS)
            waiting, rows = [whole.slice(BATCH_ROWS)], rows - BATCH_ROWS
    if rows:
        yield pa.concat_tables(waiting)


def listed_images(con: duckdb.DuckDBPyConnection) -> Iterator[CocoImage]:
    """Yield the images that were decoded, or have labels from elsewhere; `con` has the view `images`."""
    query = "select image_id, key, width, height from images where width is not null or status <> 'failed'"
    for batch in read_batches(con, query):
        for values in zip(*(batch[name].to_pylist() for name in batch.column_names), strict=True):
            yield CocoImage(*values)


def image_places(file: CocoFile, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the file lists each image; -1 for what it does not list."""
    order = np.argsort(file.image_ids, kind="stable")
    at = np.searchsorted(file.image_ids, image_ids, sorter=order)
    places = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(len(image_ids), np.int64)
    found: NDArray[np.int64] = np.where(file.image_ids[places] == image_ids if len(order) else False, places, -1)
    return found


def require_listed(file: CocoFile, unlisted_ids: NDArray[np.int64]) -> None:
    """Refuse labels on images that the base file does not list.

    Args:
        file: the base file.
        unlisted_ids: ids of images that have labels and no place in it, each any number of times.

    Raises:
        InvariantError: there is one.
    """
    unknown = np.unique(unlisted_ids)
    if len(unknown):
        raise InvariantError(
            f"{file.path}: does not list {len(unknown)} images that have pseudo-labels, e.g. "
            f"{named(unknown.tolist())}; is it the base file of this dataset?"
        )


def first_annotation_id(file: CocoFile | None) -> int:
    """Return the id of the first pseudo-label: behind all ids of the base file, and recognisably ours."""
    if file is None:
        return 1
    return max(FIRST_ANNOTATION_ID, int(file.ids.max(initial=0)) + 1)


def annotations_left_out(base: CocoBase) -> dict[str, int]:
    """Return class -> annotations of the base file that are not of a base class, the most first."""
    assert base.file is not None, "only a file has annotations"
    names = {category.id: category.name for category in base.categories}
    ids, counts = np.unique_counts(base.file.category_of[~base.kept()])
    found = {names.get(id_, f"category {id_}"): n for id_, n in zip(ids.tolist(), counts.tolist(), strict=True)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def named(names: Sequence[object]) -> str:
    """Return the first few, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(str(name) for name in names[:NAMED]) + (f" and {more} more" if more > 0 else "")
