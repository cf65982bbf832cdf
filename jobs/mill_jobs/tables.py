"""What a person sees: summaries, evaluations and differences as tables.

On a terminal they fit its width. Elsewhere every row is one line whatever its length, so that a log can be searched.
"""

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mill_jobs.diff import Diff
from mill_jobs.evaluate import Evaluation, Scores
from mill_jobs.finalize import Finalized
from mill_jobs.recipes.base import Summary

ROWS = 25
"""Longer lists are cut, and say so."""
NAMED = 8
"""Names in a note."""
LOG_COLUMNS = 1000
"""Width of what is no terminal."""


def _clean(text: str) -> str:
    """Names come from a model: what cannot be printed is shown as a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _print(console: Console, text: str) -> None:
    console.print(_clean(text), markup=False, highlight=False, soft_wrap=True)


def _print_table(
    console: Console, title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, words: tuple[int, ...]
) -> None:
    """Print a table; `words` are the columns that hold words, the others hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if place in words else "right", overflow="fold")
    total = 0
    for row in rows:
        total += 1
        if total <= ROWS:
            table.add_row(*(Text(_clean(cell)) for cell in row))
    console.print()
    console.print(Text(title, style="bold"), soft_wrap=True)
    if console.is_terminal:
        console.print(table)
    else:
        for line in console.render_lines(table, console.options.update(width=LOG_COLUMNS), pad=False):
            _print(console, "".join(segment.text for segment in line).rstrip())
    if total > ROWS:
        _print(console, f"and {total - ROWS} more")


def _counts(counts: Mapping[str, int], most: int | None = None) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = 0 if most is None else max(0, len(ordered) - most)
    return ", ".join(f"{count} {name}" for name, count in ordered[:most]) + (f" and {more} more" if more else "")


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Print names and values, one a line."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        _print(console, f"{name:<{width}}  {value}")


def print_final(console: Console, final: Finalized, where: str) -> None:
    """Print what a final holds and where it lies."""
    manifest = final.manifest
    print_summary(console, final.summary)
    console.print()
    facts = {
        "run": manifest.run,
        "images": f"{manifest.images}: {_counts({k: v for k, v in manifest.records.items() if v})}",
        "failed": _counts(manifest.failed),
        "final": f"{final.digest} in {where}" + (", the latest" if final.is_latest else ""),
    }
    print_facts(console, {name: value for name, value in facts.items() if value})


def print_summary(console: Console, summary: Summary) -> None:
    """Print the steps with their losses, which add up, and the classes with the reason for each."""
    steps = (
        (step.name, str(step.entered), str(sum(step.lost.values())), str(step.left), _counts(step.lost))
        for step in summary.steps
    )
    _print_table(console, "steps", ("step", "in", "lost", "left", "lost to"), steps, words=(0, 4))
    for title, kept in (("classes", True), ("names that are no class", False)):
        rows = [
            (
                row.name,
                str(row.boxes),
                str(row.images),
                *((_number(row.category_id, "d"), _number(row.weight, "g")) if kept else ()),
                row.why,
            )
            for row in summary.classes
            if row.kept is kept
        ]
        columns = ("name", "boxes", "images", *(("id", "weight") if kept else ()), "why")
        if rows:
            _print_table(console, f"{len(rows)} {title}", columns, rows, words=(0, len(columns) - 1))
    for note in summary.notes:
        _print(console, f"note: {note}")


_SCORE_COLUMNS = ("truth", "labels", "AP", "AP50", "prec.", "recall", "any name")


def _score_row(name: str, scores: Scores) -> tuple[str, ...]:
    shown = (scores.ap, scores.ap50, scores.precision, scores.recall, scores.any_class_recall)
    return (name, str(scores.instances), str(scores.labels), *(_number(value) for value in shown))


def print_comparison(console: Console, title: str, scores: Mapping[str, Scores]) -> None:
    """Print the scores of several label sets on the same truth, a row each."""
    rows = [_score_row(name, found) for name, found in scores.items()]
    _print_table(console, title, ("labels of", *_SCORE_COLUMNS), rows, words=(0,))


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print the scores overall, on the declared subsets and per class, and what each step costs."""
    subsets = (_score_row(name, scores) for name, scores in evaluation.subsets.items())
    _print_table(
        console,
        f"scores on {evaluation.images} images, IoU 0.5 but for AP",
        ("instances", *_SCORE_COLUMNS),
        subsets,
        words=(0,),
    )
    ordered = sorted(evaluation.classes.items(), key=lambda item: (-item[1].instances, item[0]))
    classes = (_score_row(name, scores) for name, scores in ordered)
    _print_table(console, "scores by class", ("class", *_SCORE_COLUMNS), classes, words=(0,))
    steps, before, whole = [], None, max(1, evaluation.funnel["in the truth"])
    for name, count in evaluation.funnel.items():
        steps.append((name, str(count), "" if before is None else str(before - count), f"{count / whole:.3f}"))
        before = count
    _print_table(console, "what each step costs", ("truth instances", "left", "lost", "share"), steps, words=(0,))
    notes = []
    if evaluation.unknown:
        notes.append(
            f"{sum(evaluation.unknown.values())} labels have names that are not scored, since the truth does not know "
            f"them or they are base classes: {_counts(evaluation.unknown, NAMED)}"
        )
    if evaluation.labels_without_score:
        notes.append(f"{evaluation.labels_without_score} labels have no score and are ranked as if it were 1")
    if evaluation.images_without_record or evaluation.images_without_truth:
        notes.append(
            f"left out: {evaluation.images_without_record} images of the truth that are not labelled or failed, "
            f"{evaluation.images_without_truth} labelled images that the truth does not list"
        )
    for note in notes:
        _print(console, f"note: {note}")


def print_diff(console: Console, diff: Diff) -> None:
    """Print what the second final has that the first has not, per class and box by box."""
    columns = ("class", "before", "added", "removed", "to", "from", "after", "weight")
    classes = []
    for row in diff.classes:
        old, new = _number(row.weight_before, "g"), _number(row.weight_after, "g")
        changes = (row.added, -row.removed, row.renamed_to, -row.renamed_from)
        classes.append(
            (
                row.name, str(row.before), *(f"{change:+d}" if change else "" for change in changes), str(row.after),
                old if old == new else f"{old} > {new}",
            )
        )  # fmt: skip
    title = "classes: boxes before and after; to and from are boxes renamed"
    if classes:
        _print_table(console, title, columns, classes, words=(0,))
    else:
        _print(console, "the classes are the same")
    rows = (
        (str(box.image_id), " ".join(f"{side:g}" for side in box.box_xyxy), box.before, box.after) for box in diff.boxes
    )
    if diff.boxes:
        _print_table(
            console, f"{len(diff.boxes)} boxes", ("image", "x0 y0 x1 y1", "before", "after"), rows, words=(1, 2, 3)
        )
    else:
        _print(console, "the boxes are the same")
