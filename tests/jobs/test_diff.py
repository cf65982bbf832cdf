"""What `mill diff` tells about two finals."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mill_jobs.diff import BoxDiff, ClassDiff, Diff, diff_finals
from mill_jobs.final import fetch_final
from mill_jobs.finalize import finalize_run
from mill_jobs.recipes.cotpl.config import CotplConfig
from mill_jobs.recipes.settled import REGIONS_SCHEMA
from mill_jobs.trainer.classes import ClassEntry, ClassList
from oracle_run import OracleRun

A, B, C = (0.0, 0.0, 10.0, 10.0), (5.0, 5.0, 20.0, 20.5), (1.0, 2.0, 3.0, 4.0)
Row = tuple[int, int, tuple[float, float, float, float], str | None, str, str | None]
"""Image, region, box, name, fate, reason."""


def final(folder: Path, rows: list[Row], weights: dict[str, int]) -> Path:
    folder.mkdir()
    sides = ("x0", "y0", "x1", "y1")
    pq.write_table(
        pa.Table.from_pylist(
            [
                {"row": image, "image_id": image, "region": region, "name": name, "fate": fate, "reason": reason}
                | dict(zip(sides, box, strict=True))
                for image, region, box, name, fate, reason in rows
            ],
            schema=REGIONS_SCHEMA,
        ),
        folder / "regions.parquet",
    )
    entries = tuple(ClassEntry(name, 1 + n, "extra", weight, 0, 0) for n, (name, weight) in enumerate(weights.items()))
    (folder / "classes.json").write_bytes(ClassList(entries, (), ()).to_json())
    return folder


def test_boxes_are_added_removed_or_renamed_and_the_numbers_add_up(tmp_path: Path) -> None:
    before = final(
        tmp_path / "a",
        [
            (1, 0, A, "cat", "kept", None),
            (1, 1, B, "cat", "kept", None),
            (1, 2, C, "lamp", "not_selected", None),
            (2, 0, A, "cat", "kept", None),
            (2, 1, B, None, "absent", "no"),
            (3, 0, A, "fern", "excluded", "plant"),
        ],
        {"cat": 1, "rug": 1},
    )
    after = final(
        tmp_path / "b",
        [
            (1, 0, A, "cat", "kept", None),
            (1, 1, B, "lynx", "kept", None),
            (1, 2, C, "lamp", "kept", None),
            (2, 0, A, "cat", "base_duplicate", None),
            (2, 1, B, "rug", "not_selected", None),
            (3, 0, A, "fern", "kept", None),
        ],
        {"cat": 0, "lynx": 1, "lamp": 1, "fern": 1},
    )
    found = diff_finals(before, after)
    assert found.classes == [
        ClassDiff("cat", 3, 1, 0, 1, 0, 1, 1, 0),
        ClassDiff("fern", 0, 1, 1, 0, 0, 0, None, 1),
        ClassDiff("lamp", 0, 1, 1, 0, 0, 0, None, 1),
        ClassDiff("lynx", 0, 1, 0, 0, 1, 0, None, 1),
        ClassDiff("rug", 0, 0, 0, 0, 0, 0, 1, None),
    ]
    assert found.boxes == [
        BoxDiff(1, C, "(not selected: lamp)", "lamp"),
        BoxDiff(1, B, "cat", "lynx"),
        BoxDiff(2, A, "cat", "(base duplicate: cat)"),
        BoxDiff(3, A, "(excluded: fern)", "fern"),
    ]
    for row in found.classes:
        assert row.after == row.before + row.added - row.removed + row.renamed_to - row.renamed_from


def test_boxes_of_another_run_are_known_by_their_corners(tmp_path: Path) -> None:
    before = final(tmp_path / "a", [(1, 0, A, "cat", "kept", None), (1, 1, B, "cat", "kept", None)], {"cat": 1})
    after = final(tmp_path / "b", [(1, 0, C, "cat", "kept", None), (1, 1, A, "cat", "kept", None)], {"cat": 1})
    assert diff_finals(before, after).boxes == [
        BoxDiff(1, C, "(no such region)", "cat"),
        BoxDiff(1, B, "cat", "(no such region)"),
    ]


def test_two_regions_with_one_box_are_told_apart(tmp_path: Path) -> None:
    before = final(
        tmp_path / "a", [(1, 0, A, "cat", "kept", None), (1, 1, A, "rug", "kept", None)], {"cat": 1, "rug": 1}
    )
    after = final(
        tmp_path / "b", [(1, 0, A, "cat", "kept", None), (1, 1, A, "mat", "kept", None)], {"cat": 1, "rug": 1}
    )
    assert diff_finals(before, after).boxes == [BoxDiff(1, A, "rug", "mat")]


def test_a_name_in_brackets_is_still_a_name(tmp_path: Path) -> None:
    before = final(tmp_path / "a", [(1, 0, A, "(absent: no)", "kept", None)], {})
    after = final(tmp_path / "b", [(1, 0, A, None, "absent", "no")], {})
    assert diff_finals(before, after).classes == [ClassDiff("(absent: no)", 1, 0, 0, 1, 0, 0, None, None)]


def test_another_selection_of_one_run(oracle_run: OracleRun, tmp_path: Path) -> None:
    run = oracle_run
    assert isinstance(run.config.recipe, CotplConfig)
    recipe = run.config.recipe.finalize
    fewer = recipe.model_copy(update={"selection": recipe.selection.model_copy(update={"count": 2})})
    config = run.config.model_copy(update={"recipe": run.config.recipe.model_copy(update={"finalize": fewer})})
    digests = (run.final, finalize_run(config, run.plan, run.store).digest)
    for digest in digests:
        fetch_final(run.store, run.plan.run, digest, tmp_path / digest, ("regions.parquet", "classes.json"))
    a, b = (tmp_path / digest for digest in digests)
    assert diff_finals(a, a) == Diff([], [])
    there, back = diff_finals(a, b), diff_finals(b, a)
    lost = [row for row in there.classes if row.weight_after == 0]
    assert sum(row.before for row in lost) == len(there.boxes) > 1
    assert all((row.after, row.removed) == (0, row.before) for row in lost)
    assert {box.after for box in there.boxes} == {f"(not selected: {row.name})" for row in lost if row.before}
    assert [(box.before, box.after) for box in back.boxes] == [(box.after, box.before) for box in there.boxes]
