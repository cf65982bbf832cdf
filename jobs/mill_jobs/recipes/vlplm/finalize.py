"""VL-PLM's stage 2: fuse, threshold, suppress, write. Source: specs/vlplm.md 1.3 and 2.3.

Every scored proposal ends with exactly one fate: `low_score`, `suppressed` (a better box of its class), `duplicate` (a
better box of any class), `base_overlap` or `kept`. Fates are settled once, in regions.parquet, image by image in
batches; of what is kept, 80 bytes a label stay in memory.

instances.json obeys the rules of every bundle; pseudo_labels.json holds the same labels as the original writes them,
in its own order of images.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mill_jobs.recipes.base import ClassRow, FinalWriter, RecordTable, Step, Summary
from mill_jobs.recipes.settled import (
    REGIONS_SCHEMA,
    annotations_left_out,
    first_annotation_id,
    image_places,
    listed_images,
    named,
    read_batches,
    require_listed,
)
from mill_jobs.recipes.vlplm.config import VlplmConfig, VlplmFinalizeConfig
from mill_jobs.recipes.vlplm.legacy import (
    IMAGES_A_FILE,
    ScoreLine,
    file_names,
    label_text,
    reading_order,
    trainer_file,
    trainer_file_without_base,
    write_score_file,
)
from mill_jobs.recipes.vlplm.scores import fuse, suppress
from mill_jobs.trainer.classes import ClassList, make_classes, make_weights
from mill_shared.coco import CocoBase, CocoCopy, write_coco
from mill_shared.errors import ConfigError
from mill_shared.geometry import box_iou

TRAINER_FILE = "pseudo_labels.json"
SIDES = ("x0", "y0", "x1", "y1")
FATES = ("low_score", "suppressed", "duplicate", "base_overlap", "kept")
LOW_SCORE, SUPPRESSED, DUPLICATE, BASE_OVERLAP, KEPT = range(5)

_LABELS: dict[str, pa.DataType] = {
    "row": pa.int64(), "rank": pa.int64(), "image_id": pa.int64(), **{side: pa.float64() for side in SIDES},
    "category_id": pa.int64(), "confidence": pa.float64(), "clip": pa.float64(), "objectness": pa.float64(),
}  # fmt: skip


def finalize(config: VlplmConfig, table: RecordTable, base: CocoBase | None, out: FinalWriter) -> Summary:
    """Write the files of a final: instances.json, pseudo_labels.json, classes.json, weights.json, regions.parquet.

    Raises:
        ConfigError: imported scores name a category that is not among the targets, or that nobody knows.
        InvariantError: labels lie on images that the base file does not list.
    """
    con, settings = table.connection, config.finalize
    classes = make_classes(base, config.target_names)
    load_scores(table, classes, config.target_names)
    settled = Settled(con, settings, base)
    with out.create("instances.json") as stream:
        labels = settled.write(out.path("regions.parquet"))
        if base is not None and base.file is not None:
            copy = CocoCopy(base.file, stream, base.kept())
            copy.begin()
            copy.finish(labels, classes.new_categories)
        else:
            known = () if base is None else base.categories
            write_coco(stream, listed_images(con), labels, [*known, *classes.new_categories])
    written = settled.written()
    by_name = {entry.name: written.get(entry.category_id, (0, 0)) for entry in classes.classes}
    classes = make_classes(base, config.target_names, by_name)
    for name, text in (("classes.json", classes.to_json()), ("weights.json", make_weights(classes).to_json())):
        with out.create(name) as stream:
            stream.write(text)
    write_trainer_file(con, settings, classes, base, out)
    if settings.score_files:
        write_score_files(con, out)
    return summarize(config, table, base, settled, classes)


# From records to a row a proposal


def load_scores(table: RecordTable, classes: ClassList, targets: Sequence[str]) -> None:
    """Make `scored`, a row a proposal in plan order, with the name of its class.

    Raises:
        ConfigError: imported scores name a category that is not among the targets, or that nobody knows.
    """
    con = table.connection
    table.open_records()
    names = pa.table(
        {
            "known_id": pa.array([entry.category_id for entry in classes.classes], pa.int64()),
            "known": pa.array([entry.name for entry in classes.classes], pa.string()),
        }
    )
    con.register("known_classes", names)
    con.execute(
        "create temp table scored as select row, image_id, region, x0, y0, x1, y1, clip, objectness, position, whole, "
        "distractor_mass, label, known as name, coalesce(known_id, nested.category_id) as category_id from ("
        "select row, image_id, place - 1 as region, r.x0 as x0, r.y0 as y0, r.x1 as x1, r.y1 as y1, r.score as clip, "
        "r.label as label, r.evidence.objectness as objectness, r.evidence.position as position, "
        "r.evidence.whole as whole, r.evidence.distractor_mass as distractor_mass, "
        "r.evidence.category_id as category_id from (select row, image_id, unnest(regions) as r, "
        "generate_subscripts(regions, 1) as place from records)) nested left join known_classes "
        "on nested.label = known or (nested.label is null and nested.category_id = known_id) order by row, region"
    )
    con.unregister("known_classes")
    foreign = con.execute(
        "select category_id, coalesce(name, label), count(*) from scored "
        "where name is null or not list_contains(?, name) group by all order by all",
        [list(targets)],
    ).fetchall()
    if foreign:
        category_id, name, count = foreign[0]
        raise ConfigError(
            f"recipe.targets: {count} scores are of category {category_id} ({name or 'unknown to the base file'}), "
            "which is not among the targets; list every class that was scored, and name the base file in finalize.base"
        )


# Fates, settled batch by batch


class Settled:
    """Settles the fate of every proposal, once."""

    def __init__(self, con: duckdb.DuckDBPyConnection, settings: VlplmFinalizeConfig, base: CocoBase | None) -> None:
        self.fates: Counter[str] = Counter()
        self._con, self._settings, self._base = con, settings, base
        self._file = None if base is None else base.file
        self._base_boxes = (
            None if base is None or self._file is None or settings.base_overlap_iou is None else _BaseBoxes.of(base)
        )

    def write(self, path: Path) -> Iterator[bytes]:
        """Write regions.parquet, make the view `labels` and, in passing, yield annotations for `CocoCopy.finish`.

        Raises:
            InvariantError: a label lies on an image that the base file does not list.
        """
        next_id = first_annotation_id(self._file)
        labels = [pa.schema(_LABELS).empty_table()]
        with (
            pq.ParquetWriter(path, REGIONS_SCHEMA, compression="zstd", write_statistics=False) as writer,
            ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
        ):
            for batch in _whole_images(read_batches(self._con, "select * from scored")):
                fates, ranks, confidence = self.settle(batch)
                kept = np.flatnonzero(fates == KEPT)
                if self._file is not None:
                    image_ids = batch["image_id"].to_numpy()[kept]
                    require_listed(self._file, image_ids[image_places(self._file, image_ids) < 0])
                regions = _regions(batch, fates, confidence, kept, next_id)
                written = pool.submit(writer.write_table, regions)
                labels.append(self._labels(batch, kept, ranks, confidence))
                yield annotation_texts(regions.take(kept))
                next_id += len(kept)
                self.fates.update(dict(zip(FATES, np.bincount(fates, minlength=len(FATES)).tolist(), strict=True)))
                written.result()
        self._con.register("labels", pa.concat_tables(labels))

    def written(self) -> dict[int, tuple[int, int]]:
        """Return category id -> (labels, images with one)."""
        query = "select category_id, count(*), count(distinct row) from labels group by category_id"
        return {category_id: (boxes, images) for category_id, boxes, images in self._con.execute(query).fetchall()}

    def settle(self, batch: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Return (index of the fate, place among the labels of its image, score) of the proposals of whole images."""
        settings = self._settings
        boxes = np.stack([batch[side].to_numpy() for side in SIDES], axis=1)
        scores = fuse(batch["objectness"].to_numpy(), batch["clip"].to_numpy(), settings.weight)
        rows = batch["row"].to_numpy()
        fates, ranks = np.full(len(batch), LOW_SCORE), np.zeros(len(batch), np.int64)
        left = np.flatnonzero(scores > settings.least_score)
        categories = batch["category_id"].to_numpy()[left]
        _, groups = np.unique(np.stack([rows[left], categories], axis=1), axis=0, return_inverse=True)
        stands = suppress(boxes[left], scores[left], groups.reshape(-1), settings.nms_iou)
        fates[left[~stands]] = SUPPRESSED
        left = left[stands]
        if settings.duplicate_iou is not None:
            stands = suppress(boxes[left], scores[left], rows[left], settings.duplicate_iou)
            fates[left[~stands]] = DUPLICATE
            left = left[stands]
        if self._base_boxes is not None and settings.base_overlap_iou is not None:
            overlaps = self._base_boxes.overlaps(batch["image_id"].to_numpy()[left], boxes[left])
            fates[left[overlaps >= settings.base_overlap_iou]] = BASE_OVERLAP
            left = left[overlaps < settings.base_overlap_iou]
        fates[left] = KEPT
        order = left[np.lexsort((-scores[left], rows[left]))]
        ranks[order] = np.arange(len(order)) - np.searchsorted(rows[order], rows[order])
        return fates, ranks, np.minimum(scores, settings.max_confidence)

    def _labels(
        self, batch: pa.Table, kept: NDArray[np.int64], ranks: NDArray[np.int64], confidence: NDArray[np.float64]
    ) -> pa.Table:
        own = batch.take(kept)
        columns: dict[str, Any] = {name: own[name] for name in _LABELS if name in own.column_names}
        columns["rank"], columns["confidence"] = ranks[kept], confidence[kept]
        columns["clip"] = np.minimum(own["clip"].to_numpy(), self._settings.max_confidence)
        return pa.table({name: columns[name] for name in _LABELS}).cast(pa.schema(_LABELS))


def _regions(
    batch: pa.Table, fates: NDArray[np.int64], confidence: NDArray[np.float64], kept: NDArray[np.int64], next_id: int
) -> pa.Table:
    """Return rows of regions.parquet."""
    ids = np.zeros(len(batch), np.int64)
    ids[kept] = next_id + np.arange(len(kept))
    lost = fates != KEPT
    columns: dict[str, Any] = {name: batch[name] for name in ("row", "image_id", "region", "label", "name", *SIDES)}
    columns |= {
        "score": confidence,
        "fate": pa.DictionaryArray.from_arrays(fates, pa.array(FATES)).cast(pa.string()),
        "reason": pa.nulls(len(batch), pa.string()),
        "category_id": pa.array(batch["category_id"].to_numpy(), mask=lost),
        "annotation_id": pa.array(ids, mask=lost),
    }
    return pa.table({name: columns[name] for name in REGIONS_SCHEMA.names}).cast(REGIONS_SCHEMA)


@dataclass(frozen=True)
class _BaseBoxes:
    """The kept boxes of the base file, by image."""

    image_of: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float64]
    crowd: NDArray[np.bool_]

    @classmethod
    def of(cls, base: CocoBase) -> "_BaseBoxes":
        assert base.file is not None, "only a file has boxes"
        use = np.flatnonzero(base.kept() & ~np.isnan(base.file.boxes_xyxy[:, 0]))
        use = use[np.argsort(base.file.image_of[use], kind="stable")]
        return cls(base.file.image_of[use], base.file.boxes_xyxy[use], base.file.crowd[use])

    def overlaps(self, image_ids: NDArray[np.int64], boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the greatest overlap of each box with a base box of its image."""
        found = np.zeros(len(boxes_xyxy))
        for image_id in np.unique(image_ids).tolist():
            mine = image_ids == image_id
            first, last = np.searchsorted(self.image_of, (image_id, image_id + 1))
            overlaps = box_iou(boxes_xyxy[mine], self.boxes_xyxy[first:last], self.crowd[first:last])
            found[mine] = overlaps.max(axis=1, initial=0)
        return found


def _whole_images(batches: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield tables that begin and end with an image."""
    rest: pa.Table | None = None
    for batch in batches:
        table = (batch if rest is None else pa.concat_tables([rest, batch])).combine_chunks()
        rows = table["row"].to_numpy()
        cut = int(np.searchsorted(rows, rows[-1]))
        if cut:
            yield table.slice(0, cut)
        rest = table.slice(cut)
    if rest is not None and len(rest):
        yield rest


# Writing


def annotation_texts(kept: pa.Table) -> bytes:
    """Return the COCO annotations of kept regions as JSON text, a comma before each."""
    names = ("annotation_id", "image_id", "category_id", "score", *SIDES)
    rows = zip(*(kept[name].to_pylist() for name in names), strict=True)
    return "".join(
        f',{{"id":{id_},"image_id":{image},"category_id":{category},"bbox":[{x0!r},{y0!r},{x1 - x0!r},{y1 - y0!r}],'
        f'"area":{(x1 - x0) * (y1 - y0)!r},"iscrowd":0,"score":{score!r}}}'
        for id_, image, category, score, x0, y0, x1, y1 in rows
    ).encode()


def _positions(con: duckdb.DuckDBPyConnection) -> None:
    """Make `positions`: row -> where the original's stage 2 comes to its image."""
    found = con.execute("select row, image_id from images where status <> 'failed' order by row").fetchnumpy()
    places = reading_order(found["image_id"].astype(np.int64))
    con.register("by_id", pa.table({"row": found["row"].astype(np.int64), "place": places}))
    con.execute(
        "create temp table positions as select row, coalesce(imported, place) as position from by_id "
        "left join (select row, min(position) as imported from scored group by row) using (row)"
    )
    con.unregister("by_id")


def write_trainer_file(
    con: duckdb.DuckDBPyConnection, settings: VlplmFinalizeConfig, classes: ClassList, base: CocoBase | None,
    out: FinalWriter,
) -> None:  # fmt: skip
    """Write pseudo_labels.json: as the original's, byte for byte, where `categories` agree."""
    _positions(con)

    def labels() -> Iterator[str]:
        query = f"select {', '.join(_LABELS)} from labels join positions using (row) order by position, rank"
        next_id = -1
        for batch in read_batches(con, query):
            for label in batch.to_pylist():
                scores = (label["clip"], label["objectness"]) if settings.profile == "marvelovd" else None
                box = [label[side] for side in SIDES]
                yield label_text(next_id, label["image_id"], box, label["category_id"], label["confidence"], scores)
                next_id -= 1

    used = frozenset(entry.category_id for entry in classes.classes if entry.weight)
    if base is not None and base.file is not None:
        stay = used if settings.categories == "used" else None
        texts = trainer_file(base.file, base.kept(), labels(), stay, classes.new_categories)
    else:
        known = [category for category in (() if base is None else base.categories) if category.id in used]
        images = list(listed_images(con))
        texts = trainer_file_without_base(images, labels(), [*known, *classes.new_categories])
    with out.create(TRAINER_FILE) as stream:
        for text in texts:
            stream.write(text.encode())


def write_score_files(con: duckdb.DuckDBPyConnection, out: FinalWriter) -> None:
    """Write every score as the original's stage-1 files. Source: specs/vlplm.md 2.1 and 2.2."""
    listed = con.execute("select row, image_id from images where status <> 'failed' order by image_id").fetchall()
    names = file_names(len(listed))
    for start in range(0, len(listed), IMAGES_A_FILE):
        some = listed[start : start + IMAGES_A_FILE]
        lines: dict[int, list[ScoreLine]] = {row: [] for row, _ in some}
        found = con.execute(
            "select row, x0, y0, x1, y1, whole, objectness, clip, category_id from scored "
            "where list_contains(?, row) order by row, region",
            [list(lines)],
        ).fetchall()
        for row, x0, y0, x1, y1, whole, objectness, clip, category_id in found:
            lines[row].append(ScoreLine((x0, y0, x1, y1), whole or 0, objectness, clip, category_id))
        with out.create(names[start]) as stream:
            stream.write(write_score_file([(image_id, lines[row]) for row, image_id in some]))


# The summary


def summarize(
    config: VlplmConfig, table: RecordTable, base: CocoBase | None, settled: Settled, classes: ClassList
) -> Summary:
    """Count every step and say what the reader should know."""
    con = table.connection
    images: dict[str, int] = dict(
        con.execute(
            "select case when status = 'failed' then reason else status end, count(*) from images group by all "
            "order by all"
        ).fetchall()
    )
    with_regions = images.pop("ok", 0)
    missing = table.images - with_regions - sum(images.values())
    lost_images = {**({"missing": missing} if missing else {}), **images}
    dropped = dict(con.execute("select reason, sum(count)::bigint from dropped group by all order by all").fetchall())
    total = con.execute("select count(*) from scored").fetchall()[0][0]
    fates = settled.fates
    steps = [
        Step("images with proposals", table.images, lost_images, with_regions),
        Step("scored", total + sum(dropped.values()), dropped, total),
    ]
    for name, lost in (
        ("sure enough", ("low_score",)),
        ("best of their place", ("suppressed", "duplicate")),
        ("written", ("base_overlap",)),
    ):
        gone = {fate: fates[fate] for fate in lost if fates.get(fate)}
        steps.append(Step(name, steps[-1].left, gone, steps[-1].left - sum(gone.values())))
    assert steps[-1].left == fates.get("kept", 0), "every proposal has one fate"
    rows = con.execute("select name, count(*), count(distinct row) from scored group by name").fetchall()
    scored = {name: (boxes, images) for name, boxes, images in rows}
    entries = {entry.name: entry for entry in classes.classes}
    class_rows = []
    for name in config.target_names:
        entry = entries[name]
        boxes, on_images = scored.get(name, (0, 0))
        why = f"{entry.boxes} written"
        class_rows.append(ClassRow(name, True, why, boxes, on_images, entry.category_id, entry.weight))
    return Summary(tuple(steps), tuple(class_rows), tuple(_notes(config, con, base, classes)))


def _notes(
    config: VlplmConfig, con: duckdb.DuckDBPyConnection, base: CocoBase | None, classes: ClassList
) -> Iterator[str]:
    settings = config.finalize
    rule = "CLIP's probability" if settings.weight == 0 else f"{settings.weight:g} x objectness + the rest x CLIP's"
    yield f"profile {settings.profile}: {rule} above {settings.least_score:g}, then IoU above {settings.nms_iou:g}"
    idle = [name for name in config.target_names if not {e.name: e for e in classes.classes}[name].boxes]
    if idle:
        yield f"{len(idle)} target classes have no pseudo-label: {named(idle)}"
    if classes.extras:
        yield f"{len(classes.extras)} targets are new to the base file: {named([e.name for e in classes.extras])}"
    at_one = con.execute("select count(*) from labels where confidence >= 1").fetchall()[0][0]
    if at_one:
        yield (
            f"{at_one} labels have confidence 1, which MarvelOVD's trainer takes for human labels; "
            "set recipe.finalize.max_confidence to 0.999"
        )
    mass = con.execute("select avg(distractor_mass), count(distractor_mass) from scored").fetchall()[0]
    if mass[1]:
        yield f"distractors took {mass[0]:.3f} of the probability on average"
    if base is None or base.file is None:
        return
    yield f"base file: {int(base.kept().sum())} annotations of {len(base.base)} base classes kept"
    left_out = annotations_left_out(base)
    if left_out:
        each = ", ".join(f"{name} {count}" for name, count in left_out.items())
        yield f"base file: {sum(left_out.values())} annotations of other classes left out: {each}"
    for what, count in base.file.faults.items():
        yield f"base file: {count} {what}; left as they are"
    unused = [entry.name for entry in classes.classes if not entry.weight]
    if unused and settings.categories == "all":
        yield (
            f"{TRAINER_FILE} has {len(classes.classes)} categories, {len(unused)} of them neither base nor target: the "
            "method's trainers refuse it; set recipe.finalize.categories to used"
        )
