"""What one final has that another has not."""

from pathlib import Path

import duckdb
import msgspec

from mill_jobs.trainer.classes import ClassList


class ClassDiff(msgspec.Struct, frozen=True):
    """One class whose boxes or weight differ."""

    name: str
    before: int
    after: int
    added: int
    removed: int
    weight_before: float | None
    weight_after: float | None


class BoxDiff(msgspec.Struct, frozen=True):
    """One box whose outcome differs: the class that it is written as, or in brackets why it is not written."""

    image_id: int
    box_xyxy: tuple[float, float, float, float]
    before: str
    after: str


class Diff(msgspec.Struct, frozen=True):
    """All that differs; empty lists where nothing does."""

    classes: list[ClassDiff]
    boxes: list[BoxDiff]


_OUTCOME = "case when r.fate = 'kept' then r.name else '(' || coalesce(r.reason, r.fate) || ')' end"


def diff_finals(before: Path, after: Path) -> Diff:
    """Compare two finals by image and box.

    Args:
        before: folder with regions.parquet and classes.json of a final.
        after: the same of the other.

    Returns:
        Classes in order of their names, boxes in order of image and corners.
    """
    with duckdb.connect() as connection:
        for side, folder in (("a", before), ("b", after)):
            connection.read_parquet(str(folder / "regions.parquet")).create_view(f"regions_{side}")
            connection.execute(
                f"create view side_{side} as select image_id, x0, y0, x1, y1, fate = 'kept' as kept, name, "
                f"{_OUTCOME} as outcome, "
                "row_number() over (partition by image_id, x0, y0, x1, y1 order by region) as n "
                f"from regions_{side} r"
            )
        joined = (
            "from side_a a full join side_b b using (image_id, x0, y0, x1, y1, n) "
            "where a.outcome is distinct from b.outcome and (coalesce(a.kept, false) or coalesce(b.kept, false))"
        )
        boxes = connection.execute(
            "select image_id, x0, y0, x1, y1, coalesce(a.outcome, '(no such region)'), "
            f"coalesce(b.outcome, '(no such region)') {joined} order by all"
        ).fetchall()
        counts: dict[str, list[int]] = {}
        for position, side in enumerate("ab"):
            kept = f"select name, count(*) from side_{side} where kept group by name"
            for name, count in connection.execute(kept).fetchall():
                counts.setdefault(name, [0, 0])[position] = count
    changed: dict[str, list[int]] = {}
    for _, _, _, _, _, old, new in boxes:
        if not new.startswith("("):
            changed.setdefault(new, [0, 0])[0] += 1
        if not old.startswith("("):
            changed.setdefault(old, [0, 0])[1] += 1
    weights = [
        {item.name: float(item.weight) for item in ClassList.from_json((folder / "classes.json").read_bytes()).classes}
        for folder in (before, after)
    ]
    names = sorted(counts.keys() | weights[0].keys() | weights[1].keys())
    rows = []
    for name in names:
        old_count, new_count = counts.get(name, [0, 0])
        added, removed = changed.get(name, [0, 0])
        row = ClassDiff(name, old_count, new_count, added, removed, weights[0].get(name), weights[1].get(name))
        if added or removed or row.weight_before != row.weight_after:
            rows.append(row)
    return Diff(rows, [BoxDiff(image, (x0, y0, x1, y1), old, new) for image, x0, y0, x1, y1, old, new in boxes])
