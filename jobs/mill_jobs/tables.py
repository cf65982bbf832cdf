"""What a person sees: summaries, evaluations and differences as tables that also read well in a plain log."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from mill_jobs.diff import Diff
from mill_jobs.evaluate import Evaluation, Scores
from mill_jobs.finalize import Finalized
from mill_jobs.recipes.base import Summary

ROWS = 25
"""Longer lists are cut, and say so."""


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _more(console: Console, total: int) -> None:
    if total > ROWS:
        console.print(f"and {total - ROWS} more")


def print_final(console: Console, final: Finalized, where: str) -> None:
    """Print what a final holds and where it lies."""
    manifest = final.manifest
    console.print()
    console.print(f"images: {_counts(manifest.records)} of {manifest.images}", highlight=False)
    if manifest.failed:
        console.print(f"failed: {_counts(manifest.failed)}")
    print_summary(console, final.summary)
    console.print()
    console.print(f"final {final.digest} of run {manifest.run} in {where}{' (latest)' if final.is_latest else ''}")


def print_summary(console: Console, summary: Summary) -> None:
    """Print the steps with their losses, which add up, and the classes with the reason for each."""
    table = _table("steps", "step", "in", "lost", "left", "lost to")
    table.columns[-1].justify = "left"
    for step in summary.steps:
        lost = sum(step.lost.values())
        table.add_row(step.name, str(step.entered), str(lost), str(step.left), _counts(step.lost))
    console.print(table)
    table = _table("classes", "name", "boxes", "images", "id", "weight", "why")
    table.columns[-1].justify = "left"
    for row in summary.classes[:ROWS]:
        table.add_row(
            row.name if row.kept else f"({row.name})",
            str(row.boxes),
            str(row.images),
            "" if row.category_id is None else str(row.category_id),
            "" if row.weight is None else f"{row.weight:g}",
            row.why,
        )
    console.print()
    console.print(table)
    _more(console, len(summary.classes))
    for note in summary.notes:
        console.print(f"note: {note}")


def _score_row(table: Table, name: str, scores: Scores) -> None:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    table.add_row(
        name, str(scores.instances), str(scores.labels), shown(scores.ap), shown(scores.ap50), shown(scores.precision),
        shown(scores.recall), shown(scores.any_class_recall),
    )  # fmt: skip


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print the scores overall, on the declared subsets and per class, and what each step costs."""
    table = _table(
        f"scores on {evaluation.images} images", "", "truth", "labels", "AP", "AP50", "precision", "recall", "any name"
    )
    for name, scores in evaluation.subsets.items():
        _score_row(table, name, scores)
    for name, scores in list(evaluation.classes.items())[:ROWS]:
        _score_row(table, f"  {name}", scores)
    console.print()
    console.print(table)
    _more(console, len(evaluation.classes))
    table = _table("what each step costs", "truth instances that are", "count", "share")
    for step, count in evaluation.funnel.items():
        table.add_row(step, str(count), f"{count / max(1, evaluation.funnel['in the truth']):.3f}")
    console.print()
    console.print(table)
    for note in evaluation.notes:
        console.print(f"note: {note}")


def print_diff(console: Console, diff: Diff) -> None:
    """Print what the second final has that the first has not, per class and box by box."""
    table = _table("classes", "name", "boxes before", "after", "added", "removed", "weight before", "after")
    for row in diff.classes[:ROWS]:
        weights = ["-" if weight is None else f"{weight:g}" for weight in (row.weight_before, row.weight_after)]
        table.add_row(row.name, str(row.before), str(row.after), str(row.added), str(row.removed), *weights)
    console.print(table if diff.classes else "the classes are the same")
    _more(console, len(diff.classes))
    table = _table("boxes", "image", "box", "before", "after")
    for box in diff.boxes[:ROWS]:
        corners = " ".join(f"{value:g}" for value in box.box_xyxy)
        table.add_row(str(box.image_id), corners, box.before, box.after)
    console.print()
    console.print(table if diff.boxes else "the boxes are the same")
    _more(console, len(diff.boxes))
