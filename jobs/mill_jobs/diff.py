"""What one final has that another has not."""

from pathlib import Path

import duckdb
import msgspec

from mill_jobs.finalize import DUCKDB_MEMORY
from mill_jobs.trainer.classes import ClassList


class ClassDiff(msgspec.Struct, frozen=True):
    """One class whose boxes or weight differ: after = before + added - removed + renamed_to - renamed_from."""

    name: str
    before: int
    after: int
    added: int
    """Boxes written as this class that were not written before."""
    removed: int
    """Boxes of this class that are no longer written."""
    renamed_to: int
    """Boxes that were written as another class before."""
    renamed_from: int
    """Boxes that are written as another class now."""
    weight_before: float | None
    """None where the class list has no such class."""
    weight_after: float | None


class BoxDiff(msgspec.Struct, frozen=True, gc=False):
    """One box that is written by one final alone, or as different classes."""

    image_id: int
    box_xyxy: tuple[float, float, float, float]
    before: str
    """The class that it is written as; in brackets why it is not written, with the name that it has."""
    after: str


class Diff(msgspec.Struct, frozen=True):
    """All that differs; empty lists where nothing does."""

    classes: list[ClassDiff]
    boxes: list[BoxDiff]


_OUTCOME = (
    "case when fate = 'kept' then name "
    "else '(' || replace(fate, '_', ' ') || coalesce(': ' || coalesce(name, reason), '') || ')' end"
)


def diff_finals(before: Path, after: Path) -> Diff:
    """Compare two finals by image and box; finals of one run have the same boxes, whatever became of them.

    Args:
        before: folder with regions.parquet and classes.json of a final.
        after: the same of the other.

    Returns:
        Classes in the order of their names, boxes in the order of image and corners.
    """
    with duckdb.connect(config={"memory_limit": DUCKDB_MEMORY}) as connection:
        for side, folder in (("a", before), ("b", after)):
            connection.read_parquet(str(folder / "regions.parquet")).create_view(f"regions_{side}")
            # Two regions of an image may have one box; they are told apart by their order.
            connection.execute(
                f"create view side_{side} as select image_id, x0, y0, x1, y1, fate = 'kept' as kept, name, "
                f"{_OUTCOME} as outcome, "
                "row_number() over (partition by image_id, x0, y0, x1, y1 order by region) as n "
                f"from regions_{side}"
            )
        connection.execute(
            "create temp table changed as select image_id, x0, y0, x1, y1, "
            "coalesce(a.outcome, '(no such region)') as before, coalesce(b.outcome, '(no such region)') as after, "
            "case when a.kept then a.name end as old, case when b.kept then b.name end as new "
            "from side_a a full join side_b b using (image_id, x0, y0, x1, y1, n) "
            "where old is distinct from new"
        )
        counts = connection.execute(
            "select name, count(*) filter (side = 'a'), count(*) filter (side = 'b') from "
            "(select 'a' as side, name from regions_a where fate = 'kept' union all "
            "select 'b', name from regions_b where fate = 'kept') group by name"
        ).fetchall()
        changes = connection.execute(
            "select name, count(*) filter (old is null), count(*) filter (new is null), "
            "count(*) filter (old <> new and name = new), count(*) filter (old <> new and name = old) from "
            "(select new as name, old, new from changed where new is not null union all "
            "select old, old, new from changed where old is not null) group by name"
        ).fetchall()
        boxes = connection.execute(
            "select image_id, x0, y0, x1, y1, before, after from changed order by all"
        ).fetchall()
    of_name = {name: (old, new) for name, old, new in counts}
    changes_of = {name: tuple(numbers) for name, *numbers in changes}
    weights = [_weights(folder) for folder in (before, after)]
    rows = []
    for name in sorted(of_name.keys() | weights[0].keys() | weights[1].keys()):
        row = ClassDiff(
            name, *of_name.get(name, (0, 0)), *changes_of.get(name, (0, 0, 0, 0)), *(side.get(name) for side in weights)
        )
        if name in changes_of or row.weight_before != row.weight_after:
            rows.append(row)
    return Diff(rows, [BoxDiff(image, (x0, y0, x1, y1), old, new) for image, x0, y0, x1, y1, old, new in boxes])


def _weights(folder: Path) -> dict[str, float]:
    path = folder / "classes.json"
    return {entry.name: entry.weight for entry in ClassList.from_json(path.read_bytes(), str(path)).classes}
