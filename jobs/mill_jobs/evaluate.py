"""How good the labels are, against COCO ground truth, and what each step of the pipeline costs.

Truth of base classes is left out. Labels whose name the truth does not know are counted, but neither right nor wrong.
Labels are ranked by their score, stability x predicted IoU. The subsets are our own definitions:

* `large`: instances whose box is as large as the recipe asks about; smaller ones, and labels as small, are ignored
* `crowded`: images with 15 or more instances in the truth, base classes included
* `occluded`: instances whose box overlaps another one of the image at IoU 0.3 or more; recall only
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mill_jobs.config import RunConfig
from mill_jobs.finalize import fetch_final, file_sha256, gather_chunks, record_table
from mill_shared.coco import iterate_annotations, read_categories, read_images
from mill_shared.geometry import box_iou
from mill_shared.keys import RunKeys
from mill_shared.plan import RunPlan
from mill_shared.presets import base_class_names
from mill_shared.storage import Store

MATCH_IOU = 0.5
CROWDED_INSTANCES = 15
OCCLUDED_IOU = 0.3
DEFAULT_LEAST_AREA_PX = 10_000
TOP_LABELS = 100
"""Labels an image and class that AP looks at, as in COCO."""


class Scores(msgspec.Struct, frozen=True):
    """Scores of one subset or class; None where nothing can be said."""

    instances: int
    """Truth instances that count."""
    labels: int
    """Labels that are right or wrong."""
    ap: float | None
    """Mean over IoU 0.50 to 0.95 and classes."""
    ap50: float | None
    precision: float | None
    """At IoU 0.5, all labels whatever their score."""
    recall: float | None
    any_class_recall: float | None
    """Recall at IoU 0.5 of all labels, names ignored."""


class Evaluation(msgspec.Struct, frozen=True):
    """evaluation.json."""

    final: str
    truth_sha256: str
    images: int
    subsets: dict[str, Scores]
    classes: dict[str, Scores]
    funnel: dict[str, int]
    """Truth instances left after each step; each step counts only what the one before left."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Boxes:
    """Labels or truth of the evaluated images, in parallel arrays."""

    image: NDArray[np.int64]
    name: NDArray[np.str_]
    xyxy: NDArray[np.float64]
    """(N, 4), original image frame."""
    score: NDArray[np.float64]
    """1 for truth."""
    crowd: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.image)

    def take(self, mask: NDArray[np.bool_]) -> "Boxes":
        """Return the boxes that a mask selects."""
        return Boxes(self.image[mask], self.name[mask], self.xyxy[mask], self.score[mask], self.crowd[mask])

    @property
    def area_px(self) -> NDArray[np.float64]:
        """Width x height."""
        found: NDArray[np.float64] = (self.xyxy[:, 2:] - self.xyxy[:, :2]).prod(axis=1)
        return found


def same_name(name: str) -> str:
    """Return the form in which names are compared: without case and surplus white space."""
    return " ".join(name.casefold().split())


def _groups(boxes: Boxes, by_name: bool) -> dict[tuple[Any, ...], NDArray[np.int64]]:
    """Return positions by image, or by image and name, by descending score."""
    order = np.argsort(-boxes.score, kind="stable")
    keys = [boxes.image[order].tolist()] + ([boxes.name[order].tolist()] if by_name else [])
    found: dict[tuple[Any, ...], list[int]] = {}
    for position, key in zip(order.tolist(), zip(*keys, strict=True), strict=True):
        found.setdefault(key, []).append(position)
    return {key: np.array(positions) for key, positions in found.items()}


def match(
    labels: Boxes, truth: Boxes, ignored: NDArray[np.bool_], *, by_name: bool
) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """Match labels to truth one to one at IoU 0.5, the best score first, as COCO does.

    Args:
        labels: N labels.
        truth: M instances.
        ignored: (M,); a label that only fits one of these is neither right nor wrong. Crowds always are.
        by_name: only equal names match.

    Returns:
        (N,) 1 right, 0 wrong, -1 ignored; (M,) which instances were found.
    """
    state, found = np.zeros(len(labels), np.int8), np.zeros(len(truth), bool)
    ignored = ignored | truth.crowd
    instances = _groups(truth, by_name)
    for key, positions in _groups(labels, by_name).items():
        wanted = instances.get(key)
        if wanted is None:
            continue
        overlaps = box_iou(labels.xyxy[positions], truth.xyxy[wanted], truth.crowd[wanted])
        for label, row in zip(positions, overlaps, strict=True):
            free = np.where(found[wanted] | ignored[wanted], -1.0, row)
            best = int(free.argmax())
            if free[best] >= MATCH_IOU:
                state[label] = 1
                found[wanted[best]] = True
            elif np.where(ignored[wanted], row, -1.0).max() >= MATCH_IOU:
                state[label] = -1
    return state, found


def _average_precision(
    labels: Boxes, truth: Boxes, names: Sequence[str], least_area_px: float
) -> tuple[float | None, float | None, dict[str, tuple[float | None, float | None]]]:
    """Return (AP, AP50) over all names and by name, by faster-coco-eval."""
    from faster_coco_eval import COCO, COCOeval_faster

    number = {name: position + 1 for position, name in enumerate(names)}
    images = np.unique(np.concatenate([labels.image, truth.image])).tolist()
    if not len(truth) or not names:
        return None, None, {}
    xywh = np.concatenate([truth.xyxy[:, :2], truth.xyxy[:, 2:] - truth.xyxy[:, :2]], axis=1)
    annotations = [
        {
            "id": i + 1,
            "image_id": image,
            "category_id": number[name],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(crowd),
        }
        for i, (image, name, box, crowd) in enumerate(
            zip(truth.image.tolist(), truth.name.tolist(), xywh.tolist(), truth.crowd.tolist(), strict=True)
        )
    ]
    ground = COCO(
        {
            "images": [{"id": image, "width": 1, "height": 1} for image in images],
            "annotations": annotations,
            "categories": [{"id": position, "name": name} for name, position in number.items()],
        }
    )
    if not len(labels):
        return 0.0, 0.0, {}
    lengths = labels.xyxy[:, 2:] - labels.xyxy[:, :2]
    ids = np.array([number[name] for name in labels.name.tolist()], dtype=np.float64)
    results = np.concatenate(
        [labels.image[:, None].astype(np.float64), labels.xyxy[:, :2], lengths, labels.score[:, None], ids[:, None]],
        axis=1,
    )
    run = COCOeval_faster(ground, ground.loadRes(results), "bbox")
    run.params.areaRng = [[least_area_px, 1e12]]
    run.params.areaRngLbl = ["all"]
    run.params.maxDets = [TOP_LABELS]
    run.evaluate()
    run.accumulate()
    precision = np.asarray(run.eval["precision"])[..., 0, 0]  # thresholds, recalls, names

    def mean(values: NDArray[np.float64]) -> float | None:
        known = values[values > -1]
        return float(known.mean()) if known.size else None

    by_name = {name: (mean(precision[:, :, k]), mean(precision[:1, :, k])) for k, name in enumerate(names)}
    return mean(precision), mean(precision[:1]), by_name


def _scores(
    labels: Boxes, truth: Boxes, all_labels: Boxes, names: Sequence[str], least_area_px: float = 0
) -> tuple[Scores, dict[str, Scores]]:
    """Return the scores over all names and by name.

    Args:
        labels: labels whose names the truth knows.
        truth: the instances that count.
        all_labels: the same and those of other names, for the recall without names.
        names: the truth's names.
        least_area_px: smaller instances are ignored.
    """
    small = truth.area_px < least_area_px
    state, found = match(labels, truth, small, by_name=True)
    state[(state == 0) & (labels.area_px < least_area_px)] = -1
    _, found_by_any = match(all_labels, truth, small, by_name=False)
    ap, ap50, by_name = _average_precision(labels, truth, names, least_area_px)
    counted = ~small & ~truth.crowd

    def scores(these: NDArray[np.bool_], those: NDArray[np.bool_], aps: tuple[float | None, float | None]) -> Scores:
        instances, right, wrong = (
            int((counted & those).sum()),
            int((state[these] == 1).sum()),
            int((state[these] == 0).sum()),
        )
        return Scores(
            instances=instances,
            labels=right + wrong,
            ap=aps[0],
            ap50=aps[1],
            precision=right / (right + wrong) if right + wrong else None,
            recall=float(found[counted & those].mean()) if instances else None,
            any_class_recall=float(found_by_any[counted & those].mean()) if instances else None,
        )

    everything = scores(np.ones(len(labels), bool), np.ones(len(truth), bool), (ap, ap50))
    single = {
        name: scores(labels.name == name, truth.name == name, by_name.get(name, (None, None)))
        for name in names
        if (truth.name == name).any() or (labels.name == name).any()
    }
    return everything, single


def evaluate_labels(
    labels: Boxes, truth: Boxes, base_names: Sequence[str], known_names: Sequence[str], least_area_px: float
) -> tuple[dict[str, Scores], dict[str, Scores], tuple[str, ...]]:
    """Score labels of the evaluated images.

    Args:
        labels: the written labels, names in the form of `same_name`.
        truth: all instances of these images, base classes included.
        base_names: classes whose truth is left out.
        known_names: the names of the truth's categories.
        least_area_px: smallest box that the recipe asks about, width x height.

    Returns:
        Scores by subset; scores by class; notes.
    """
    base = frozenset(base_names)
    names = sorted(frozenset(known_names) - base)
    is_known = np.isin(labels.name, names)
    known, wanted = labels.take(is_known), truth.take(~np.isin(truth.name, sorted(base)))
    overall, classes = _scores(known, wanted, labels, names)
    large, _ = _scores(known, wanted, labels, names, least_area_px)
    images, counts = np.unique(truth.image[~truth.crowd], return_counts=True)
    busy = images[counts >= CROWDED_INSTANCES]
    crowded, _ = _scores(
        known.take(np.isin(known.image, busy)),
        wanted.take(np.isin(wanted.image, busy)),
        labels.take(np.isin(labels.image, busy)),
        names,
    )
    hidden = wanted.take(_occluded(truth)[~np.isin(truth.name, sorted(base))])
    whole, _ = _scores(known, hidden, labels, names)
    occluded = Scores(whole.instances, 0, None, None, None, whole.recall, whole.any_class_recall)
    notes = []
    if not is_known.all():
        notes.append(
            f"{int((~is_known).sum())} labels have names that the truth does not know: neither right nor wrong"
        )
    return {"all": overall, "large": large, "crowded": crowded, "occluded": occluded}, classes, tuple(notes)


def _occluded(truth: Boxes) -> NDArray[np.bool_]:
    """Return which instances overlap another one of their image at OCCLUDED_IOU or more; crowds neither way."""
    found = np.zeros(len(truth), bool)
    for positions in _groups(truth, by_name=False).values():
        single = positions[~truth.crowd[positions]]
        overlaps = box_iou(truth.xyxy[single], truth.xyxy[single])
        np.fill_diagonal(overlaps, 0)
        found[single] = (overlaps >= OCCLUDED_IOU).any(axis=1)
    return found


def read_truth(path: Path) -> tuple[Boxes, list[str], frozenset[int]]:
    """Return (instances, category names, image ids) of a COCO file, names in the form of `same_name`.

    Raises:
        ConfigError: not a COCO file.
    """
    names = {category.id: same_name(category.name) for category in read_categories(path)}
    found = [
        (item.image_id, names.get(item.category_id, ""), item.bbox, bool(item.iscrowd))
        for part in iterate_annotations(path)
        for item in part
        if item.bbox is not None
    ]
    xywh = np.array([box for _, _, box, _ in found], dtype=np.float64).reshape(-1, 4)
    return (
        Boxes(
            np.array([image for image, _, _, _ in found], dtype=np.int64),
            np.array([name for _, name, _, _ in found], dtype=np.str_),
            np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
            np.ones(len(found)),
            np.array([crowd for _, _, _, crowd in found], dtype=bool),
        ),
        sorted(names.values()),
        frozenset(image.id for image in read_images(path)),
    )


def read_labels(regions: Path) -> Boxes:
    """Return the written labels of a final's regions.parquet."""
    with duckdb.connect() as connection:
        columns = connection.execute(
            "select image_id, name, x0, y0, x1, y1, coalesce(score, 1) as score from read_parquet(?) "
            "where fate = 'kept' order by row, region",
            [str(regions)],
        ).fetchnumpy()
    return Boxes(
        np.asarray(columns["image_id"], dtype=np.int64),
        np.array([same_name(str(name)) for name in columns["name"]], dtype=np.str_),
        np.stack([np.asarray(columns[side], dtype=np.float64) for side in ("x0", "y0", "x1", "y1")], axis=1),
        np.asarray(columns["score"], dtype=np.float64),
        np.zeros(len(columns["name"]), bool),
    )


def _funnel(connection: duckdb.DuckDBPyConnection, truth: Boxes, regions: Path, least_area_px: float) -> dict[str, int]:
    """Return how many truth instances each step leaves; `records` is a view of the connection."""
    table = pa.table(
        {
            "i": np.arange(len(truth)), "image_id": truth.image,
            "truth_name": pa.array(truth.name.tolist(), pa.string()),
            **{side: truth.xyxy[:, k] for k, side in enumerate(("x0", "y0", "x1", "y1"))},
        }
    )  # fmt: skip
    connection.register("truth", table)
    connection.execute(
        "create temp table boxes as "
        "select image_id, d.x0, d.y0, d.x1, d.y1, 1 as step, '' as name "
        "from (select image_id, unnest(dropped) as d from records) "
        "union all "
        "select image_id, x0, y0, x1, y1, "
        "case when fate = 'kept' then 4 when name is not null then 3 else 2 end, coalesce(lower(trim(name)), '') "
        f"from read_parquet('{str(regions).replace(chr(39), chr(39) * 2)}')"
    )
    connection.execute(
        "create temp table hits as select t.i, b.step, b.name = t.truth_name as named from truth t join boxes b "
        "on b.image_id = t.image_id, "
        "lateral (select greatest(0, least(t.x1, b.x1) - greatest(t.x0, b.x0)) * "
        "greatest(0, least(t.y1, b.y1) - greatest(t.y0, b.y0)) as shared) "
        f"where shared >= {MATCH_IOU} * ((t.x1 - t.x0) * (t.y1 - t.y0) + (b.x1 - b.x0) * (b.y1 - b.y0) - shared)"
    )
    large = f"(x1 - x0) * (y1 - y0) >= {least_area_px}"
    steps = {
        "in the truth": "true",
        "large enough to be asked about": large,
        "found by a candidate": f"{large} and i in (select i from hits)",
        "asked about": f"{large} and i in (select i from hits where step >= 2)",
        "called foreground": f"{large} and i in (select i from hits where step >= 3)",
        "rightly named": f"{large} and i in (select i from hits where step >= 3 and named)",
        "written": f"{large} and i in (select i from hits where step = 4 and named)",
    }
    return {
        name: int(connection.execute(f"select count(*) from truth where {condition}").fetchall()[0][0])
        for name, condition in steps.items()
    }


def evaluate_final(config: RunConfig, plan: RunPlan, store: Store, digest: str, truth_path: Path) -> Evaluation:
    """Evaluate a final, and store the result beside it.

    Raises:
        ConfigError: no such final, or the truth is no COCO file.
    """
    label = config.recipe.label
    least_area_px = DEFAULT_LEAST_AREA_PX if label is None else label.min_box_area_px
    base_names = [same_name(name) for name in base_class_names(config.finalize.base_classes or ())]
    truth, known_names, truth_images = read_truth(truth_path)
    with tempfile.TemporaryDirectory(prefix="mill-evaluate-") as name:
        scratch = Path(name)
        fetch_final(store, plan.run, digest, scratch / "final", ("regions.parquet",))
        regions = scratch / "final" / "regions.parquet"
        labels = read_labels(regions)
        with record_table(gather_chunks(store, plan, scratch), plan, scratch) as table:
            recorded = table.connection.execute("select image_id from records where status <> 'failed'").fetchnumpy()
            images = np.array(sorted(truth_images.intersection(recorded["image_id"].tolist())), dtype=np.int64)
            truth_left, labels_left = len(truth_images) - len(images), len(recorded["image_id"]) - len(images)
            truth = truth.take(np.isin(truth.image, images))
            labels = labels.take(np.isin(labels.image, images))
            wanted = truth.take(~np.isin(truth.name, base_names) & ~truth.crowd)
            funnel = _funnel(table.connection, wanted, regions, least_area_px)
    subsets, classes, notes = evaluate_labels(labels, truth, base_names, known_names, least_area_px)
    if truth_left or labels_left:
        notes = (
            *notes,
            f"left out: {truth_left} images of the truth without a record, {labels_left} images without truth",
        )
    found = Evaluation(digest, file_sha256(truth_path), len(images), subsets, classes, funnel, notes)
    key = RunKeys(plan.run).evaluation(digest, found.truth_sha256[:8], "evaluation.json")
    store.put(key, msgspec.json.format(msgspec.json.encode(found), indent=1))
    return found
