"""What a recipe is: a config, a labeller and a finalize function. Nothing is registered anywhere."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mill_shared.records import ImageRecord


@dataclass(frozen=True)
class Sample:
    """One image as a labeller gets it."""

    row: int
    image_id: int
    key: str
    image_rgb: NDArray[np.uint8]
    """(H, W, 3), upright, the labelled frame: longer side at most `dataset.max_side`."""
    width: int
    """Pixels of the upright original."""
    height: int
    scale: float
    """Labelled pixels / original pixels."""
    texts: tuple[tuple[int, str, str], ...] = ()
    """(id, kind, text) of the image's texts."""
    previous: ImageRecord | None = None
    """The image's record in an earlier run."""


@dataclass(frozen=True)
class Outcome:
    """The record of one image, boxes in the frame that was labelled, and results that are not rows."""

    record: ImageRecord
    files: Mapping[str, bytes] = field(default_factory=dict)


class Labeller(Protocol):
    """Labels the images of a chunk at once, so that it can batch across them."""

    evidence: pa.StructType
    """Type of `Region.evidence`."""

    def label(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Return one outcome a sample, in order. Boxes are in the labelled frame; the loop maps them back.

        Raises:
            ImageError: the fault lies in one image; the loop then works image by image.
            OutsideError: something outside is unavailable; nothing is committed.
            DeviceMemoryError: the device is out of memory; the loop calls `halve_batch` and starts the chunk again.
        """
        ...

    def halve_batch(self) -> bool:
        """Use half of the device memory from now on; False where nothing is left to halve."""
        ...


@dataclass(frozen=True)
class RecordTable:
    """All records of a run in plan order, one an image, re-readable.

    For finalize the connection has the narrow views of `mill_jobs.flat`, in plan order.
    """

    connection: duckdb.DuckDBPyConnection
    images: int
    """Images of the plan, with and without a record."""
    open_records: Callable[[], None]
    """Makes the view `records` with the columns of `mill_shared.records.chunk_schema`, once. It costs a look at every
    chunk, so ask for it only where masks or evidence are wanted. Its rows come in file order; order by (row, position
    of the region) wherever the order matters."""


class Step(msgspec.Struct, frozen=True):
    """One step of the pipeline: entered = sum(lost) + left, always."""

    name: str
    entered: int
    lost: dict[str, int]
    left: int


class ClassRow(msgspec.Struct, frozen=True):
    """One name that the labels hold, kept or not."""

    name: str
    kept: bool
    why: str
    boxes: int
    images: int
    category_id: int | None = None
    weight: float | None = None


class Summary(msgspec.Struct, frozen=True):
    """What finalize made, in numbers; goes into summary.json and onto the terminal."""

    steps: tuple[Step, ...]
    classes: tuple[ClassRow, ...]
    notes: tuple[str, ...] = ()
    """One line each: what the reader should know."""


class FinalWriter(Protocol):
    """Takes the files of a final. Each is hashed and stored; nothing counts before the manifest."""

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a new file of the final for writing."""
        ...

    def path(self, name: str) -> Path:
        """Return where a file of the final is to be written by another writer, e.g. duckdb."""
        ...
