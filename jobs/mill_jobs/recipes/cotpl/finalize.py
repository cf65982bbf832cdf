"""CoT-PL's finalize: names, classes, duplicates of base boxes, a COCO file. Source: specs/cotpl.md 2.3 and 3.

Every region that was asked about ends with exactly one fate. What the labeller left in the foreground becomes
`base_class`, `excluded`, `not_selected`, `base_duplicate`, `degenerate` (less than a pixel wide or high inside the
image) or `kept`; the kept ones are written. Fates are settled once, in regions.parquet; all numbers are counted there.

The records are scanned by duckdb into one narrow table in plan order, and everything is written in batches of it, so
memory does not grow with the number of regions.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mill_jobs.recipes.base import ClassRow, FinalWriter, RecordTable, Step, Summary
from mill_jobs.recipes.cotpl.config import CotplFinalizeConfig, SelectionConfig
from mill_jobs.recipes.cotpl.legacy import write_legacy
from mill_jobs.recipes.cotpl.names import COTPL_64, exclusions, normalise_names
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
from mill_jobs.trainer.classes import ClassList, make_classes, make_weights
from mill_shared.coco import CocoBase, CocoCopy, CocoFile, annotations_per_class, write_coco
from mill_shared.errors import ConfigError
from mill_shared.geometry import Rle, decode_mask, encode_masks, mask_areas

pc: Any = pyarrow.compute
"""Untyped: its stubs refuse plain values as arguments, which its documentation offers."""

MEANINGS_SCHEMA = pa.schema([REGIONS_SCHEMA.field(name) for name in ("label", "name", "fate", "reason", "category_id")])
"""What each raw label of the foreground comes to."""


@dataclass(frozen=True)
class NameCount:
    """A name that foreground regions have."""

    name: str
    boxes: int
    images: int
    first: int
    """Place of its first region among all."""
    fate: str | None = None
    """`base_class` or `excluded`; None for what may become a class."""
    reason: str | None = None
    """The word for which it is excluded."""


@dataclass(frozen=True)
class Selection:
    """The classes, and by which rule."""

    names: tuple[str, ...]
    rule: str
    missed: str
    """Why another name is no class."""
    printed: tuple[str, ...]
    """What the original's stage 3 prints."""


def finalize(config: CotplFinalizeConfig, table: RecordTable, base: CocoBase | None, out: FinalWriter) -> Summary:
    """Write the files of a final: instances.json, classes.json, weights.json, regions.parquet, the original's.

    Raises:
        InvariantError: labels lie on images that the base file does not list.
        ConfigError: the selection needs a base file with annotations.
    """
    con, reference = table.connection, config.profile == "reference"
    base_file = None if base is None else base.file
    load_regions(table, masks=config.masks and not reference, float_boxes=reference or config.legacy_files)
    with out.create("instances.json") as stream, ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        copy = None if base is None or base_file is None else CocoCopy(base_file, stream, base.kept())
        begun = None if copy is None else pool.submit(copy.begin)
        names, counts = count_names(con, config, base)
        candidates = [count for count in counts if count.fate is None]
        selection = select_classes(config.selection, candidates, base, images=table.images, by_appearance=reference)
        classes = make_classes(base, selection.names)
        meanings = settle_labels(names, counts, classes, selection)
        duplicates = np.zeros(0, np.int64)
        if base is not None and base_file is not None and not reference and config.base_duplicate_iou < 1:
            duplicates = find_duplicates(con, meanings, base, config.base_duplicate_iou)
        batches = Batches(con, meanings, duplicates, base_file, reference)
        annotations = write_regions(batches, out.path("regions.parquet"), pool)
        if copy is not None and begun is not None:
            begun.result()
            copy.finish(annotations, classes.new_categories)
        else:
            known = () if base is None else base.categories
            write_coco(stream, listed_images(con), annotations, [*known, *classes.new_categories])
    classes = make_classes(base, selection.names, _read_written(con, out))
    for name, text in (("classes.json", classes.to_json()), ("weights.json", make_weights(classes).to_json())):
        with out.create(name) as stream:
            stream.write(text)
    if config.legacy_files:
        labelled = con.execute("select row, image_id from images where status <> 'failed' order by row").fetchall()
        write_legacy(labelled, batches, classes, selection.printed, out, keep_names=not reference)
    return summarize(config, table, base, out, counts, selection, classes)


# From records to a row a region


def load_regions(table: RecordTable, *, masks: bool, float_boxes: bool) -> None:
    """Make `asked`, a row a region in plan order: the narrow view, or a table where masks or evidence are wanted."""
    con = table.connection
    if not masks and not float_boxes:
        con.execute("create temp view asked as select * from regions")
        return
    table.open_records()
    con.execute(
        "create temp table nested as select row, image_id, width, height, place - 1 as region, "
        "r.x0 as x0, r.y0 as y0, r.x1 as x1, r.y1 as y1, r.score as score, r.label as label, r.fate as fate, "
        "r.reason as reason"
        + (", coalesce(r.evidence.float_box, false) as float_box" if float_boxes else "")
        + (", case when r.fate = 'foreground' then r.mask end as mask" if masks else "")
        + " from (select row, image_id, width, height, unnest(regions) as r, "
        "generate_subscripts(regions, 1) as place from records) order by row, region"
    )
    con.execute("create temp view asked as select *, rowid as place from nested")


# Names and classes


def count_names(
    con: duckdb.DuckDBPyConnection, config: CotplFinalizeConfig, base: CocoBase | None
) -> tuple[dict[str, str], list[NameCount]]:
    """Return (raw label -> name, the names with their counts) of the foreground.

    Base classes and excluded words have their fate here. Source: specs/cotpl.md 3, stage 2.
    """
    foreground = "(select row, place, coalesce(label, '') as label from asked where fate = 'foreground')"
    rows = con.execute(f"select label, count(*), min(place) from {foreground} group by label order by label").fetchall()
    labels = [label for label, _, _ in rows]
    listed = config.selection.names if config.selection.by == "list" else ()
    known = [*(() if base is None else base.taxonomy), *(COTPL_64 if listed == "cotpl-64" else listed)]
    if config.profile == "reference":
        names = {label: label for label in labels}
    else:
        names = normalise_names(labels, known, config.synonyms)
    by_name: dict[str, NameCount] = {}
    for label, boxes, first in rows:
        count = by_name.get(names[label], NameCount(names[label], 0, 0, first))
        by_name[names[label]] = replace(count, boxes=count.boxes + boxes, first=min(count.first, first))
    images = images_per_name(read_batches(con, f"select row, label from {foreground}"), names, list(by_name))
    base_names = frozenset(() if base is None else base.base)
    by = "substring" if config.profile == "reference" else config.exclude_by
    excluded = exclusions(by_name, config.excluded, by)
    counts = []
    for count in sorted(by_name.values(), key=lambda count: (-count.boxes, count.name)):
        count = replace(count, images=images[count.name])
        if count.name in base_names:
            count = replace(count, fate="base_class")
        elif count.name in excluded:
            count = replace(count, fate="excluded", reason=excluded[count.name])
        elif not count.name and config.profile == "fixed":
            count = replace(count, fate="excluded", reason="no name")
        counts.append(count)
    return names, counts


def images_per_name(batches: Iterator[pa.Table], meaning: Mapping[str, str], names: Sequence[str]) -> dict[str, int]:
    """Count the images of each name; batches have row and label, in plan order."""
    place = {name: index for index, name in enumerate(names)}
    labels = pa.array(list(meaning), pa.string())
    name_of = np.array([place[name] for name in meaning.values()], np.int64)
    counts = np.zeros(len(names), np.int64)
    before = np.zeros(0, np.int64)
    for batch in batches:
        found = name_of[pc.index_in(batch["label"], value_set=labels).to_numpy()]
        # An image may begin in one batch and end in the next.
        pairs = np.setdiff1d(batch["row"].to_numpy() * len(names) + found, before)
        counts += np.bincount(pairs % len(names), minlength=len(names))
        rows = np.concatenate([before, pairs]) // len(names)
        before = np.concatenate([before, pairs])[rows == rows.max()]
    return dict(zip(names, counts.tolist(), strict=True))


def select_classes(
    selection: SelectionConfig, counts: Sequence[NameCount], base: CocoBase | None, *, images: int, by_appearance: bool
) -> Selection:
    """Choose the classes. Source: specs/cotpl.md 3, stage 3.

    Args:
        selection: the rule.
        counts: names that may become classes.
        base: the truth that is kept.
        images: of the plan.
        by_appearance: names with equally many boxes come in the order of their first regions, else of the alphabet.

    Raises:
        ConfigError: `base_minimum` without a base file that has annotations of base classes.
    """
    ordered = sorted(counts, key=lambda count: (-count.boxes, count.first if by_appearance else 0, count.name))

    def at_least(boxes: int) -> tuple[str, ...]:
        return tuple(count.name for count in ordered if count.boxes >= boxes)

    match selection.by:
        case "list":
            names = COTPL_64 if selection.names == "cotpl-64" else selection.names
            rule = f"the given list of {len(names)} names"
            return Selection(tuple(names), rule, "not in the list", at_least(selection.count))
        case "top_k":
            names = tuple(count.name for count in ordered[: selection.k])
            return Selection(names, f"the {selection.k} most frequent names", f"not in the first {selection.k}", names)
        case "count":
            threshold, why = selection.count, "selection.count"
        case "image_share":
            # The product of a share such as 1294 / 118287 may lie a rounding error above a whole number.
            threshold = max(selection.at_least, ceil(round(selection.image_share * images, 6)))
            why = f"{selection.image_share:.6g} x {images} images, at least {selection.at_least}"
        case "base_minimum":
            of_base = {} if base is None else annotations_per_class(base, None)
            if not of_base:
                raise ConfigError(
                    "recipe.finalize.selection.by: base_minimum needs finalize.base with annotations of base classes"
                )
            rarest = min(of_base, key=lambda name: (of_base[name], name))
            threshold, why = of_base[rarest], f"annotations of {rarest}, the rarest base class"
    names = at_least(threshold)
    return Selection(names, f"names with {threshold} boxes or more ({why})", f"under {threshold} boxes", names)


def settle_labels(
    names: dict[str, str], counts: Sequence[NameCount], classes: ClassList, selection: Selection
) -> pa.Table:
    """Return what each raw label comes to, before duplicates: a table with MEANINGS_SCHEMA."""
    ids = {entry.name: entry.category_id for entry in classes.classes}
    selected = frozenset(selection.names)
    of_name: dict[str, tuple[str, str | None, int | None]] = {}
    for count in counts:
        if count.fate is not None:
            of_name[count.name] = (count.fate, count.reason, None)
        elif count.name in selected:
            of_name[count.name] = ("kept", None, ids[count.name])
        else:
            of_name[count.name] = ("not_selected", None, None)
    rows = [(label, name, *of_name[name]) for label, name in names.items()]
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * 5, schema=MEANINGS_SCHEMA)


def find_duplicates(
    con: duckdb.DuckDBPyConnection, meanings: pa.Table, base: CocoBase, iou: float
) -> NDArray[np.int64]:
    """Return the places of the regions above this IoU with a kept base box; in a crowd, their covered share counts."""
    file = base.file
    assert file is not None, "only a file has boxes"
    use = base.kept() & ~np.isnan(file.boxes_xyxy[:, 0])
    boxes = {f"b{side}": file.boxes_xyxy[use, index] for index, side in enumerate(("x0", "y0", "x1", "y1"))}
    con.register("base_boxes", pa.table({"image_id": file.image_of[use], "crowd": file.crowd[use], **boxes}))
    con.register("chosen", meanings.filter(pc.equal(meanings["fate"], "kept")).select(["label"]))
    found = con.sql(
        "select distinct place from (select place, area, (bx1 - bx0) * (by1 - by0) as b_area, crowd, "
        "greatest(0, least(x1, bx1) - greatest(x0, bx0)) * greatest(0, least(y1, by1) - greatest(y0, by0)) as shared "
        "from (select place, image_id, x0, y0, x1, y1, (x1 - x0) * (y1 - y0) as area from asked "
        "where fate = 'foreground' and label in (select label from chosen)) join base_boxes using (image_id)) "
        f"where shared > 0 and shared / (case when crowd then area else area + b_area - shared end) > {iou!r}"
    ).to_arrow_table()
    con.unregister("base_boxes")
    con.unregister("chosen")
    return np.sort(found["place"].to_numpy())


# Fates, settled batch by batch


@dataclass(frozen=True)
class Batches:
    """All regions with their final fates, in plan order; may be read again."""

    con: duckdb.DuckDBPyConnection
    meanings: pa.Table
    """With MEANINGS_SCHEMA."""
    duplicates: NDArray[np.int64]
    """Places of the regions that repeat a base box, ascending."""
    base_file: CocoFile | None
    reference: bool

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield tables with the columns of REGIONS_SCHEMA and more: x, y, w, h as written; float_box, mask if loaded.

        Raises:
            InvariantError: a region to be written lies on an image that the base file does not list.
        """
        next_id, place = first_annotation_id(self.base_file), 0
        for batch in read_batches(self.con, "select * from asked"):
            first, last = np.searchsorted(self.duplicates, (place, place + len(batch)))
            settled = self._settle(batch, self.duplicates[first:last] - place)
            kept = _is_kept(settled)
            ids = next_id + np.cumsum(kept) - 1
            yield settled.append_column("annotation_id", pa.array(ids, mask=~kept))
            place, next_id = place + len(batch), next_id + int(kept.sum())

    def _settle(self, batch: pa.Table, duplicates: NDArray[np.int64]) -> pa.Table:
        is_foreground = pc.equal(batch["fate"], "foreground")
        index = pc.index_in(pc.fill_null(batch["label"], ""), value_set=self.meanings["label"])
        index = pc.if_else(is_foreground, index, pa.scalar(None, index.type))
        found = {name: self.meanings[name].take(index) for name in MEANINGS_SCHEMA.names}
        fate = pc.coalesce(found["fate"], batch["fate"])
        x, y, w, h = self._boxes(batch, pc.equal(fate, "kept").to_numpy())
        is_duplicate = np.zeros(len(batch), bool)
        is_duplicate[duplicates] = True
        is_degenerate = ((w < 1) | (h < 1)) & (not self.reference)
        for lost, where in (("base_duplicate", is_duplicate), ("degenerate", is_degenerate)):
            fate = pc.if_else(pc.and_(pc.equal(fate, "kept"), pa.array(where)), lost, fate)
        settled = {
            **{name: batch[name] for name in batch.column_names},
            "name": found["name"],
            "fate": fate,
            "reason": pc.if_else(is_foreground, found["reason"], batch["reason"]),
            "category_id": pc.if_else(pc.equal(fate, "kept"), found["category_id"], pa.scalar(None, pa.int64())),
            "x": x, "y": y, "w": w, "h": h,
        }  # fmt: skip
        return pa.table(settled)

    def _boxes(self, batch: pa.Table, kept: NDArray[np.bool_]) -> tuple[NDArray[np.float64], ...]:
        """Return x, y, w, h as they are written: in the fixed profile inside the image and with two decimals."""
        x0, y0, x1, y1 = (batch[side].to_numpy() for side in ("x0", "y0", "x1", "y1"))
        if self.reference:
            return x0, y0, x1 - x0, y1 - y0
        width, height = (pc.fill_null(batch[side], 0).to_numpy() for side in ("width", "height"))
        if self.base_file is not None:
            at = image_places(self.base_file, batch["image_id"].to_numpy())
            require_listed(self.base_file, batch["image_id"].to_numpy()[kept & (at < 0)])
            sizes = np.append(self.base_file.image_sizes, [[0, 0]], axis=0)[at]
            width, height = np.where(width > 0, width, sizes[:, 0]), np.where(height > 0, height, sizes[:, 1])
        limits = [np.where(side > 0, side, np.inf) for side in (width, height)]
        x0, x1 = (np.round(np.clip(side, 0, limits[0]), 2) for side in (x0, x1))
        y0, y1 = (np.round(np.clip(side, 0, limits[1]), 2) for side in (y0, y1))
        return x0, y0, np.round(x1 - x0, 2), np.round(y1 - y0, 2)


def _is_kept(batch: pa.Table) -> NDArray[np.bool_]:
    kept: NDArray[np.bool_] = pc.equal(batch["fate"], "kept").to_numpy()
    return kept


# Writing


def write_regions(batches: Batches, path: Path, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Write regions.parquet and, in passing, yield the annotations of what is kept as `CocoCopy.finish` takes them."""
    with pq.ParquetWriter(path, REGIONS_SCHEMA, compression="zstd") as writer:
        for batch in batches:
            written = pool.submit(writer.write_table, batch.select(REGIONS_SCHEMA.names).cast(REGIONS_SCHEMA))
            yield annotation_texts(batch.filter(pa.array(_is_kept(batch))), reference=batches.reference)
            written.result()


def annotation_texts(kept: pa.Table, *, reference: bool) -> bytes:
    """Return COCO annotations as JSON text, a comma before each. Source: specs/cotpl.md 2.3."""
    x, y, w, h = (kept[side].to_numpy() for side in ("x", "y", "w", "h"))
    floats = kept["float_box"] if reference else None
    parts: list[object] = [',{"id":', _whole(kept["annotation_id"]), ',"image_id":', _whole(kept["image_id"])]
    parts += [',"category_id":', _whole(kept["category_id"]), ',"bbox":[']
    for side, end in ((x, ","), (y, ","), (w, ","), (h, '],"area":')):
        parts += [_number(side, floats), end]
    if "mask" in kept.column_names:
        areas, outlines = _outlines(kept)
    else:
        areas, outlines = w * h, None
    parts += [_number(areas if reference else np.round(areas, 2), floats), ',"iscrowd":0']
    if not reference:
        score = pc.binary_join_element_wise(',"score":', pc.cast(pc.round(kept["score"], 6), pa.string()), "")
        parts.append(pc.fill_null(score, ""))
    if outlines is not None:
        parts.append(outlines)
    return _in_one(pc.binary_join_element_wise(*parts, "}", ""))


def _whole(values: Any) -> Any:
    return pc.cast(values, pa.string())


def _number(values: NDArray[np.float64], floats: Any) -> Any:
    """Write numbers as short as they are exact; where `floats` says so, whole ones as Python writes floats (`12.0`)."""
    texts = pc.cast(pa.array(values + 0.0), pa.string())  # + 0.0: no -0
    if floats is None:
        return texts
    as_float = pc.and_(floats, pa.array(values == np.trunc(values)))
    return pc.if_else(as_float, pc.binary_join_element_wise(texts, ".0", ""), texts)


def _in_one(texts: Any) -> bytes:
    """Return the strings of a column one after another, as they lie in its buffers."""
    found = []
    for chunk in texts.chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        found.append(memoryview(data)[ends[0] : ends[-1]] if len(chunk) else b"")
    return b"".join(found)


def _outlines(kept: pa.Table) -> tuple[NDArray[np.float64], list[str]]:
    """Return area and `segmentation` of each region in its image's own size; box area and nothing without a mask."""
    areas = kept["w"].to_numpy() * kept["h"].to_numpy()
    texts = [""] * len(kept)
    found: list[tuple[int, Rle]] = []
    rows: Any = zip(*(kept[name].to_pylist() for name in ("mask", "width", "height")), strict=True)
    for index, (mask, width, height) in enumerate(rows):
        if mask is not None:
            rle = Rle((mask["height"], mask["width"]), mask["counts"])
            found.append((index, rle if width is None else scale_mask(rle, width, height)))
    for (index, rle), area in zip(found, mask_areas([rle for _, rle in found]), strict=True):
        areas[index] = area
        counts = msgspec.json.encode(rle.counts.decode("ascii")).decode()
        texts[index] = f',"segmentation":{{"size":[{rle.size[0]},{rle.size[1]}],"counts":{counts}}}'
    return areas, texts


def scale_mask(rle: Rle, width: int, height: int) -> Rle:
    """Return a mask in another size; a pixel belongs to it where at least half of the interpolated mask does."""
    if rle.size == (height, width):
        return rle
    import cv2  # 40 MB that only masks of another size need

    shades = decode_mask(rle).astype(np.uint8) * 255
    scaled = cv2.resize(shades, (width, height), interpolation=cv2.INTER_LINEAR) >= 128
    return encode_masks(scaled[None])[0]


# The summary


def _count(con: duckdb.DuckDBPyConnection, query: str) -> dict[str, int]:
    """Return reason -> rows of a query for (what, reason or None, rows), in its order."""
    rows = con.execute(query).fetchall()
    return {what if reason is None else f"{what} ({reason})": count for what, reason, count in rows}


def _read_written(con: duckdb.DuckDBPyConnection, out: FinalWriter) -> dict[str, tuple[int, int]]:
    """Return name -> (pseudo-labels, images with one)."""
    rows = con.execute(
        "select name, count(*), count(distinct row) from read_parquet(?) where fate = 'kept' group by name",
        [str(out.path("regions.parquet"))],
    ).fetchall()
    return {name: (boxes, images) for name, boxes, images in rows}


def summarize(
    config: CotplFinalizeConfig, table: RecordTable, base: CocoBase | None, out: FinalWriter,
    counts: Sequence[NameCount], selection: Selection, classes: ClassList,
) -> Summary:  # fmt: skip
    """Count every step and say what the reader should know."""
    con = table.connection
    images = _count(con, "select status, reason, count(*) from images group by all order by all")
    asked = _count(con, "select fate, reason, count(*) from asked group by all order by all")
    dropped = _count(
        con,
        "select reason, null, sum(count)::bigint from dropped group by all order by all",
    )
    settled = con.execute(
        "select fate, count(*) from read_parquet(?) where name is not null group by fate",
        [str(out.path("regions.parquet"))],
    )
    fates = dict(settled.fetchall())
    steps = [
        _step("images with regions", table.images, {"missing": table.images - sum(images.values())} | images, "ok"),
        _step("asked", sum(dropped.values()) + sum(asked.values()), dropped),
        _step("foreground", sum(asked.values()), asked, "foreground"),
    ]
    for name, lost in (
        ("not a base class", ("base_class", "excluded")),
        ("of a class", ("not_selected",)),
        ("written", ("base_duplicate", "degenerate")),
    ):
        steps.append(_step(name, steps[-1].left, {fate: fates.get(fate, 0) for fate in lost}))
    assert steps[1].left == steps[2].entered, "every candidate is dropped or asked"
    assert steps[-1].left == fates.get("kept", 0), "every region has one fate"
    notes = tuple(_notes(config, con, base, selection, classes))
    return Summary(tuple(steps), tuple(_class_rows(counts, selection, classes)), notes)


def _step(name: str, entered: int, counts: dict[str, int], stays: str = "") -> Step:
    """Return a step that is named after what is left; `stays` is no loss."""
    lost = {reason: count for reason, count in counts.items() if count and reason != stays}
    return Step(name, entered, lost, entered - sum(lost.values()))


def _class_rows(counts: Sequence[NameCount], selection: Selection, classes: ClassList) -> Iterator[ClassRow]:
    """Yield the classes in their order, then the other names, the most frequent first."""
    by_name = {count.name: count for count in counts}
    entries = {entry.name: entry for entry in classes.classes}
    for name in selection.names:
        count, entry = by_name.get(name, NameCount(name, 0, 0, 0)), entries[name]
        if count.fate is None:
            why = f"{entry.boxes} written"
            yield ClassRow(name, True, why, count.boxes, count.images, entry.category_id, entry.weight)
    for count in counts:
        if count.fate == "base_class":
            entry = entries[count.name]
            why = "base class"
            yield ClassRow(count.name, False, why, count.boxes, count.images, entry.category_id, entry.weight)
        elif count.fate is not None:
            yield ClassRow(count.name, False, f"excluded: {count.reason}", count.boxes, count.images)
        elif count.name not in selection.names:
            yield ClassRow(count.name, False, selection.missed, count.boxes, count.images)


def _notes(
    config: CotplFinalizeConfig, con: duckdb.DuckDBPyConnection, base: CocoBase | None, selection: Selection,
    classes: ClassList,
) -> Iterator[str]:  # fmt: skip
    yield f"classes: {selection.rule}; {len(selection.names)} selected, {len(classes.extras)} of them new"
    idle = [entry.name for entry in classes.classes if entry.name in selection.names and not entry.boxes]
    if idle:
        yield f"{len(idle)} selected classes have no pseudo-label: {named(idle)}"
    sizes = con.sql("select image_id, width, height from images where width is not null").to_arrow_table()
    if base is None or base.file is None:
        unsized = _count(con, "select status, null, count(*) from images where width is null group by all order by all")
        failed = unsized.pop("failed", 0)
        if failed:
            yield f"{failed} images that could not be read are not in the list of images"
        if unsized:
            yield f"{sum(unsized.values())} images are listed without width and height: their labels were imported"
        return
    file = base.file
    dropped = annotations_left_out(base)
    kept = len(file.ids) - sum(dropped.values())
    yield f"base file: {kept} annotations of {len(base.base)} base classes kept"
    if dropped:
        each = ", ".join(f"{name} {count}" for name, count in dropped.items())
        yield f"base file: {sum(dropped.values())} annotations of other classes left out: {each}"
    for what, count in file.faults.items():
        yield f"base file: {count} {what}; left as they are"
    at = image_places(file, sizes["image_id"].to_numpy())
    theirs = file.image_sizes[at[at >= 0]]
    ours = np.stack([sizes[side].to_numpy()[at >= 0] for side in ("width", "height")], axis=1)
    differ = ((theirs > 0) & (theirs != ours)).any(axis=1)
    if differ.any():
        some = named(sizes["image_id"].to_numpy()[at >= 0][differ].tolist())
        yield (
            f"{int(differ.sum())} images have another size than the base file says (turned by EXIF?), so their base "
            f"boxes may lie elsewhere: {some}"
        )
    if config.profile == "reference" and (at < 0).any():
        yield f"{int((at < 0).sum())} labelled images are not in the base file; accepted as in the original"
