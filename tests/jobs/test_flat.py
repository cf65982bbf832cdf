from pathlib import Path
from typing import Any

import duckdb
import pytest

from mill_jobs import flat as flat_module
from mill_jobs.flat import FlatWriter, create_views
from mill_jobs.recipes.cotpl.evidence import EVIDENCE
from mill_shared.records import ChunkMeta, Dropped, ImageRecord, Region, Status, encode_chunk


def record(row: int, *labels: str, status: Status = "ok", dropped: tuple[str, ...] = ()) -> ImageRecord:
    return ImageRecord(
        row=row, image_id=row + 100, key=f"{row}.jpg", status=status, width=64 + row, height=48,
        reason="decode" if status == "failed" else None,
        regions=tuple(Region((row, 1, 2.5, 3), "foreground", label=label, score=0.25) for label in labels),
        dropped=tuple(Dropped((0, 0, 1, 1), 0.1, reason) for reason in dropped),
    )  # fmt: skip


@pytest.fixture
def flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Flatten passes of chunks of records; returns what a query on the views answers."""

    def run(passes: dict[int, list[list[ImageRecord]]], query: str, at_once: int = 4) -> list[tuple[Any, ...]]:
        monkeypatch.setattr(flat_module, "IMAGES_AT_ONCE", at_once)
        with FlatWriter(tmp_path / f"it's {len(list(tmp_path.iterdir()))}") as writer:
            for index, chunks in passes.items():
                for chunk, records in enumerate(chunks):
                    meta = ChunkMeta(label_digest="0", pass_index=index, chunk=chunk)
                    writer.add(index, writer.read(encode_chunk(records, meta, EVIDENCE)))
        with duckdb.connect() as connection:
            create_views(connection, list(passes), writer.folder)
            return connection.execute(query).fetchall()

    return run


@pytest.mark.parametrize("at_once", [1, 100_000])
def test_regions_come_in_plan_order_with_their_places(flat: Any, at_once: int) -> None:
    chunks = [[record(0, "a", "b"), record(1, status="empty")], [record(2), record(3, "c")]]
    query = "select row, image_id, width, region, label, x0, x1, score, fate, reason, place from regions"
    assert flat({0: chunks}, query, at_once) == [
        (0, 100, 64, 0, "a", 0, 2.5, 0.25, "foreground", None, 0),
        (0, 100, 64, 1, "b", 0, 2.5, 0.25, "foreground", None, 1),
        (3, 103, 67, 0, "c", 3, 2.5, 0.25, "foreground", None, 2),
    ]  # fmt: skip


def test_images_come_with_their_outcome(flat: Any) -> None:
    chunks = [[record(0, "a"), record(1, status="empty")], [record(2, status="failed")]]
    assert flat({0: chunks}, "select row, key, status, reason from images") == [
        (0, "0.jpg", "ok", None), (1, "1.jpg", "empty", None), (2, "2.jpg", "failed", "decode"),
    ]  # fmt: skip


def test_dropped_candidates_are_counted_by_image_and_reason(flat: Any) -> None:
    chunks = [
        [record(0, dropped=("small", "inner", "small"))],
        [record(1, dropped=("other",)), record(2, dropped=("small",))],
    ]
    found = flat({0: chunks}, "select row, reason, count from dropped order by all")
    assert found == [(0, "inner", 1), (0, "small", 2), (1, "other", 1), (2, "small", 1)]


def test_a_run_without_regions_has_empty_views(flat: Any) -> None:
    for view, rows in (("regions", 0), ("dropped", 0), ("images", 1)):
        assert flat({0: [[record(0, status="empty")]]}, f"select count(*) from {view}") == [(rows,)]


def test_of_several_passes_the_newest_good_record_counts(flat: Any) -> None:
    passes = {
        0: [
            [record(0, "first", dropped=("old",)), record(1, status="failed", dropped=("old",))],
            [record(2, "kept"), record(3, status="failed")],
            [record(4, status="failed"), record(5, "untouched")],
        ],
        1: [
            [record(0, "second"), record(1, "mended", dropped=("new",))],
            [record(2, status="failed"), record(3, status="failed")],
        ],
        2: [[record(3, status="empty")]],
    }
    assert flat(passes, "select row, status from images") == [
        (0, "ok"), (1, "ok"), (2, "ok"), (3, "empty"), (4, "failed"), (5, "ok"),
    ]  # fmt: skip
    assert flat(passes, "select row, label, place from regions") == [
        (0, "second", 0), (1, "mended", 1), (2, "kept", 2), (5, "untouched", 3),
    ]  # fmt: skip
    assert flat(passes, "select row, reason, count from dropped") == [(1, "new", 1)]
