"""What a person reads: on a terminal of 80 columns, and in a log."""

import io
import re
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console

from mill_jobs.diff import BoxDiff, ClassDiff, Diff
from mill_jobs.evaluate import Evaluation, Scores
from mill_jobs.final import Manifest
from mill_jobs.finalize import Finalized
from mill_jobs.recipes.base import ClassRow, Step, Summary
from mill_jobs.tables import ROWS, print_diff, print_evaluation, print_final, print_summary

LONG = "an old wooden kitchen table with a white cloth and two candles on top of it"


def step(name: str, entered: int, lost: dict[str, int]) -> Step:
    return Step(name, entered, lost, entered - sum(lost.values()))


SUMMARY = Summary(
    (
        step("candidates", 9463, {"duplicate": 1200, "small": 6210, "inner": 1107}),
        step("asked", 946, {"undecided: parse_name": 12, "background": 190}),
        step("written", 744, {}),
    ),
    (
        ClassRow("keyboard", True, "66 boxes or more", 90, 70, 76, 1.0),
        ClassRow(LONG, True, "66 boxes or more", 66, 60, 91, 1.0),
        *(ClassRow(f"rare {n}", False, "fewer than 66 boxes", 60 - n, 50 - n) for n in range(ROWS + 7)),
    ),
    ("base file: 353 annotations kept",),
)


def scores(instances: int) -> Scores:
    return Scores(instances, 2 * instances, 0.12345, 0.3, 0.5, 0.25, 0.75)


EVALUATION = Evaluation(
    final="ab12", truth_sha256="cd", images=97, images_without_record=3, images_without_truth=1,
    subsets={"all": scores(34781), "occluded": Scores(80, 0, None, None, None, 0.2, 0.3)},
    classes={"cup": scores(5), "dog": scores(900), LONG: scores(10), **{f"c{n:02d}": scores(1) for n in range(ROWS)}},
    unknown={"curtain": 20, **{f"odd {n}": 1 for n in range(30)}}, labels_without_score=4,
    funnel={"in the truth": 34000, "box of 10000 px or more": 9000, "written": 3500},
)  # fmt: skip
DIFF = Diff(
    [ClassDiff("keyboard", 90, 95, 7, 3, 2, 1, 1.0, 1.0), ClassDiff(LONG, 0, 2, 2, 0, 0, 0, None, 1.0)],
    [BoxDiff(5, (1.0, 2.25, 300.0, 400.0), f"(not selected: {LONG})", LONG) for _ in range(ROWS + 2)],
)
FINAL = Finalized(
    "ab12" * 4,
    Manifest(
        run="demo-1", final="ab12" * 4, label_digest="x", recipe="cotpl", code="c", finalize={}, base_sha256=None,
        passes=1, images=100, records={"ok": 97, "empty": 2, "failed": 1, "missing": 0}, failed={"truncated": 1},
        chunks=[], files=[],
    ),
    SUMMARY,
    is_latest=True,
)  # fmt: skip

EVERYTHING: dict[str, Callable[[Console], None]] = {
    "final": lambda console: print_final(console, FINAL, "s3://bucket/labels"),
    "evaluation": lambda console: print_evaluation(console, EVALUATION),
    "diff": lambda console: print_diff(console, DIFF),
}


def in_log(show: Callable[[Console], None]) -> list[str]:
    """Return the lines that a pipe gets."""
    stream = io.StringIO()
    show(Console(file=stream, force_terminal=False))
    return stream.getvalue().splitlines()


def words(lines: list[str]) -> list[list[str]]:
    return [re.split(r" {2,}", line) for line in lines]


@pytest.mark.parametrize("name", EVERYTHING)
def test_tables_fit_a_terminal_of_80_columns(name: str) -> None:
    stream = io.StringIO()
    EVERYTHING[name](Console(file=stream, force_terminal=True, width=80, color_system="standard"))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    tables = [line for line in plain if not line.startswith(("note: ", "final "))]
    assert len(tables) > 10
    assert max(cell_len(line) for line in tables) <= 80


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_log_has_one_line_a_row_without_colours_or_frames(name: str) -> None:
    lines = in_log(EVERYTHING[name])
    text = "\n".join(lines)
    assert not re.search(r"[\x1b\u2500-\u257f]", text)
    assert all(line == line.rstrip() for line in lines)
    assert any(LONG in line for line in lines), "a long name is not cut or folded"


def test_losses_are_shown_with_their_reasons_and_add_up() -> None:
    rows = {row[0]: row[1:] for row in words(in_log(lambda console: print_summary(console, SUMMARY)))}
    assert rows["step"] == ["in", "lost", "left", "lost to"]
    assert rows["candidates"] == ["9463", "8517", "946", "6210 small, 1200 duplicate, 1107 inner"]
    assert rows["written"] == ["744", "0", "744"]
    shown = [rows[each.name] for each in SUMMARY.steps]
    assert all(int(entered) == int(lost) + int(left) for entered, lost, left, *_ in shown)


def test_classes_say_why_and_the_long_tail_is_cut_and_counted() -> None:
    lines = in_log(lambda console: print_summary(console, SUMMARY))
    rows = words(lines)
    assert ["keyboard", "90", "70", "76", "1", "66 boxes or more"] in rows
    assert ["rare 0", "60", "50", "fewer than 66 boxes"] in rows
    assert sum(row[0].startswith("rare ") for row in rows) == ROWS
    assert f"{ROWS + 7} names that are no class" in lines
    assert "and 7 more" in lines
    assert "note: base file: 353 annotations kept" in lines


def test_a_final_says_what_failed_and_where_it_lies() -> None:
    rows = words(in_log(EVERYTHING["final"]))
    assert ["images", "100: 97 ok, 2 empty, 1 failed"] in rows
    assert ["failed", "1 truncated"] in rows
    assert rows[-1] == ["final", f"{FINAL.digest} in s3://bucket/labels, the latest"]


def test_scores_come_with_what_was_left_out() -> None:
    lines = in_log(EVERYTHING["evaluation"])
    rows = words(lines)
    assert ["all", "34781", "69562", "0.123", "0.300", "0.500", "0.250", "0.750"] in rows
    assert ["occluded", "80", "0", "-", "-", "-", "0.200", "0.300"] in rows
    classes = [row[0] for row in rows if row[0] in EVALUATION.classes]
    assert classes[:3] == ["dog", LONG, "cup"], "the most frequent first"
    assert ["box of 10000 px or more", "9000", "25000", "0.265"] in rows
    notes = [line for line in lines if line.startswith("note: ")]
    assert [re.findall(r"\d+", note)[:1] for note in notes] == [["50"], ["4"], ["3"]]
    assert "20 curtain, 1 odd 0" in notes[0]
    assert notes[0].endswith("and 23 more")


def test_a_diff_shows_signs_and_weights_and_says_when_nothing_differs() -> None:
    lines = in_log(EVERYTHING["diff"])
    assert ["keyboard", "90", "+7", "-3", "+2", "-1", "95", "1"] in words(lines)
    assert [LONG, "0", "+2", "2", "- > 1"] in words(lines)
    assert f"{ROWS + 2} boxes" in lines
    assert "and 2 more" in lines
    assert in_log(lambda console: print_diff(console, Diff([], []))) == [
        "the classes are the same", "the boxes are the same",
    ]  # fmt: skip


def test_what_a_model_says_cannot_style_or_break_the_output() -> None:
    name = "[red]cat[/x]\x1b[31m\nnote: all is well"
    summary = Summary((), (ClassRow(name, True, "[bold]", 1, 1, 1, 1.0),))
    lines = in_log(lambda console: print_summary(console, summary))
    (row,) = [row for row in words(lines) if "cat" in row[0]]
    assert row == ["[red]cat[/x]?[31m?note: all is well", "1", "1", "1", "1", "[bold]"]
