"""Which labels are shown, and their outlines."""

import re

import cv2
import duckdb
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from mill_jobs.report.sample import (
    FAILED_PICTURES,
    MOST_PICTURES,
    PATH_CHARS,
    PICTURES,
    choose_failed,
    choose_labels,
    outline_path,
)

Line = tuple[int, int, str, str | None, float | None]
"""Row, region, fate, name, score."""


def settled(*lines: Line) -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    columns = ("row", "region", "fate", "name", "score")
    table = pa.Table.from_pylist([dict(zip(columns, line, strict=True)) for line in lines])
    con.register("settled_rows", table)
    con.execute("create table settled as select * from settled_rows")
    return con


def chosen(con: duckdb.DuckDBPyConnection) -> list[tuple[int, int]]:
    return [(place.row, place.region) for place in choose_labels(con)]


def many(classes: int, each: int) -> list[Line]:
    """Labels of many classes, an image each; the scores of a class rise with the image."""
    lines: list[Line] = []
    for row in range(classes * each):
        lines.append((row, 0, "kept", f"class {row % classes}", row // classes / each))
    return lines


def test_the_best_the_worst_and_the_middle_of_every_class_and_fate_are_there() -> None:
    rare: list[Line] = [(100_000 + n, 0, "background", None, n / 10) for n in range(11)]
    rare += [(200_000, 0, "undecided", None, None), (300_000, 0, "not_selected", "lamp", 0.5)]
    found = chosen(settled(*many(60, 101), *rare))
    rows = {row for row, _ in found}
    assert len(rows) <= PICTURES
    assert {100_000, 100_005, 100_010, 200_000, 300_000} <= rows
    for name in range(60):
        assert {name, 100 * 60 + name, 50 * 60 + name} <= rows, f"class {name}"


def test_many_classes_get_a_picture_each_and_there_is_an_end() -> None:
    found = {row % 900 for row, _ in chosen(settled(*many(900, 3)))}
    assert found == set(range(900))
    assert len({row for row, _ in chosen(settled(*many(MOST_PICTURES + 500, 2)))}) == MOST_PICTURES


def test_the_sample_does_not_depend_on_the_order_of_rows() -> None:
    lines = [*many(70, 31), *[(9000 + n, 0, "excluded", f"fern {n}", None) for n in range(50)]]
    assert chosen(settled(*lines)) == chosen(settled(*lines[::-1]))


def test_few_regions_are_all_shown() -> None:
    lines: list[Line] = [(n % 4, n // 4, "kept", "cat", n / 10) for n in range(8)]
    assert sorted(chosen(settled(*lines))) == [(row, region) for row in range(4) for region in range(2)]


def test_failed_images_come_from_every_reason() -> None:
    con = duckdb.connect()
    con.execute(
        "create table images as select range as row, 'failed' as status, "
        "case when range = 999 then 'decode' else 'truncated' end as reason from range(1000)"
    )
    rows = choose_failed(con)
    assert len(rows) == FAILED_PICTURES
    assert 999 in rows


def filled(path: str, view: tuple[int, int]) -> NDArray[np.bool_]:
    """Fill a path as a browser would, even-odd."""
    canvas = np.zeros((view[1], view[0]), np.uint8)
    rings = []
    for start, steps in re.findall(r"M([\d -]+)l([\d -]+)z", path):
        numbers = [[int(n) for n in text.split()] for text in (start, steps)]
        offsets = np.array(numbers[1]).reshape(-1, 2).cumsum(axis=0)
        rings.append(np.vstack([np.array(numbers[0]), np.array(numbers[0]) + offsets]).astype(np.int32))
    cv2.fillPoly(canvas, rings, (1,))
    return canvas > 0


def disc(size: int = 300, hole: int = 0) -> NDArray[np.bool_]:
    y, x = np.mgrid[:size, :size]
    distance = np.hypot(x - size / 2, y - size / 2)
    found: NDArray[np.bool_] = (distance < size * 0.4) & (distance >= hole)
    return found


@pytest.mark.parametrize("hole", [0, 40])
def test_an_outline_is_the_mask_holes_included(hole: int) -> None:
    mask = disc(hole=hole)
    drawn = filled(outline_path(mask, (1000, 1000)), (1000, 1000))
    whole = cv2.resize(mask.astype(np.uint8), (1000, 1000), interpolation=cv2.INTER_NEAREST) > 0
    assert (drawn & whole).sum() / (drawn | whole).sum() > 0.97
    assert drawn[500, 500] == (hole == 0)


def test_outlines_of_noise_are_short_and_of_nothing_empty() -> None:
    noise = np.random.default_rng(0).random((600, 800)) < 0.5
    assert len(outline_path(noise, (1000, 750))) <= PATH_CHARS
    assert outline_path(np.zeros((4, 4), bool), (1000, 1000)) == ""
