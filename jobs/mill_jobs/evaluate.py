"""How good the labels are, against COCO ground truth, and what each step of the pipeline costs.

Truth of base classes is left out. Names are compared without case and surplus white space. Labels whose name is not
scored (the truth does not know it, or it is a base class) are counted, but neither right nor wrong. Labels are ranked
by their score, stability x predicted IoU. Crowds are ignored, as in COCO.

The subsets are our own definitions (Source: specs/cotpl.md 6, which found none published):

* `large`: instances whose box is as large as the recipe asks about; smaller ones, and unmatched labels as small, are
  ignored
* `crowded`: images with 15 or more instances in the truth, base classes included, crowds not
* `occluded`: instances whose box overlaps another one of its image, base classes included, at IoU 0.3 or more; recall
  only
"""

import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np
from numpy.typing import NDArray

from mill_jobs.config import RunConfig
from mill_jobs.final import fetch_final, read_manifest
from mill_jobs.finalize import Gathered, gather_chunks, record_table
from mill_jobs.trainer.classes import ClassList
from mill_shared.coco import scan_coco
from mill_shared.errors import ConfigError
from mill_shared.keys import RunKeys
from mill_shared.plan import RunPlan
from mill_shared.storage import Store

MATCH_IOU = 0.5
CROWDED_INSTANCES = 15
OCCLUDED_IOU = 0.3
DEFAULT_LEAST_AREA_PX = 10_000
"""Where the run has no labeller of its own. Source: specs/cotpl.md 1.5."""
TOP_LABELS = 100
"""Labels an image and class that AP looks at, as in COCO."""
BATCH_ROWS = 65_536

Places = NDArray[np.int64]
NOWHERE: Places = np.zeros(0, np.int64)


class Scores(msgspec.Struct, frozen=True):
    """Scores of one subset or class; None where nothing can be said."""

    instances: int
    """Truth instances that count."""
    labels: int
    """Labels that are right or wrong."""
    ap: float | None
    """Mean over IoU 0.50 to 0.95 and over the classes that the truth has."""
    ap50: float | None
    precision: float | None
    """At IoU 0.5, all labels whatever their score."""
    recall: float | None
    any_class_recall: float | None
    """Recall at IoU 0.5 of all labels, names ignored."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """evaluation.json."""

    final: str
    truth_sha256: str
    images: int
    """Images that have both a record, not a failed one, and a place in the truth. All else is left out."""
    images_without_record: int
    """Images of the truth that are left out."""
    images_without_truth: int
    """Labelled images that are left out."""
    subsets: dict[str, Scores]
    classes: dict[str, Scores]
    unknown: dict[str, int]
    """Labels by name that are neither right nor wrong: the truth does not know the name, or it is a base class."""
    labels_without_score: int
    """They are ranked as if their score were 1."""
    funnel: dict[str, int]
    """Truth instances left after each step."""


@dataclass(frozen=True)
class Boxes:
    """Labels or truth of some images, in parallel arrays."""

    image: NDArray[np.int64]
    name: NDArray[np.object_]
    """In the form of `same_name`."""
    xyxy: NDArray[np.float64]
    """(N, 4), original image frame."""
    score: NDArray[np.float64]
    """1 for truth."""
    crowd: NDArray[np.bool_]
    area_px: NDArray[np.float64]
    """Width x height in the frame that was labelled, where the recipe's size filter works."""

    def __len__(self) -> int:
        return len(self.image)

    def take(self, which: NDArray[np.bool_] | Places) -> "Boxes":
        """Return the boxes that a mask or places select."""
        return Boxes(
            self.image[which], self.name[which], self.xyxy[which], self.score[which], self.crowd[which],
            self.area_px[which],
        )  # fmt: skip

    def is_named(self, names: Collection[str]) -> NDArray[np.bool_]:
        """Return which boxes have one of these names."""
        return np.fromiter((name in names for name in self.name), np.bool_, len(self))

    def by_image(self) -> "Boxes":
        """Return the boxes in the order of images."""
        return self.take(np.argsort(self.image, kind="stable"))

    def by_name(self) -> dict[str, Places]:
        """Return the places of each name."""
        found: dict[str, list[int]] = {}
        for place, name in enumerate(self.name.tolist()):
            found.setdefault(name, []).append(place)
        return {name: np.array(places) for name, places in found.items()}


def box_areas(boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return width x height of (N, 4) boxes."""
    x0, y0, x1, y1 = boxes_xyxy.T
    found: NDArray[np.float64] = (x1 - x0) * (y1 - y0)
    return found


@dataclass(frozen=True)
class Pairs:
    """Labels and truth of one image each that overlap, as places in two `Boxes`, with their IoU."""

    label: Places
    truth: Places
    iou: NDArray[np.float64]

    def take(self, mask: NDArray[np.bool_]) -> "Pairs":
        """Return the pairs that a mask selects."""
        return Pairs(self.label[mask], self.truth[mask], self.iou[mask])


@cache
def same_name(name: str) -> str:
    """Return the form in which names are compared: without case and surplus white space."""
    return " ".join(name.casefold().split())


def overlapping_pairs(labels: Boxes, truth: Boxes, iou: float) -> Pairs:
    """Return every label and truth of one image that overlap at this IoU or more.

    Against a crowd the overlap is the share of the label that lies in it, as COCO counts.

    Args:
        labels: in any order.
        truth: in the order of images.
        iou: the least overlap.
    """
    first = np.searchsorted(truth.image, labels.image, "left")
    count = np.searchsorted(truth.image, labels.image, "right") - first
    parts = [Pairs(NOWHERE, NOWHERE, np.zeros(0))]
    for start in range(0, len(labels), BATCH_ROWS):
        these = slice(start, start + BATCH_ROWS)
        ends = np.cumsum(count[these])
        label = np.repeat(np.arange(start, start + len(ends)), count[these])
        within = np.arange(len(label)) - np.repeat(ends - count[these], count[these])
        instance = first[label] + within
        a, b = labels.xyxy[label], truth.xyxy[instance]
        width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
        height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
        shared = np.clip(width, 0, None) * np.clip(height, 0, None)
        a_area, b_area = box_areas(a), box_areas(b)
        whole = np.where(truth.crowd[instance], a_area, a_area + b_area - shared)
        overlap = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
        parts.append(Pairs(label, instance, overlap).take(overlap >= iou))
    return Pairs(
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.truth for part in parts]),
        np.concatenate([part.iou for part in parts]),
    )


def match(
    pairs: Pairs, labels: Boxes, truth: Boxes, ignored: NDArray[np.bool_]
) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """Match labels to truth one to one, the best score first and its best overlap first, as COCO does.

    Args:
        pairs: what may be matched.
        labels: N labels.
        truth: M instances.
        ignored: (M,); a label that only fits one of these is neither right nor wrong. Crowds always are, and take any
            number of labels.

    Returns:
        (N,) 1 right, 0 wrong, -1 ignored; (M,) which instances that count were found.
    """
    ignored = ignored | truth.crowd
    rank = np.empty(len(labels), np.int64)
    rank[np.argsort(-labels.score, kind="stable")] = np.arange(len(labels))
    order = np.lexsort((-pairs.truth, -pairs.iou, ignored[pairs.truth], rank[pairs.label]))
    state, found = np.zeros(len(labels), np.int8), np.zeros(len(truth), np.bool_)
    decided, taken = set[int](), set[int]()
    crowd, left_out = truth.crowd.tolist(), ignored.tolist()
    for label, instance in zip(pairs.label[order].tolist(), pairs.truth[order].tolist(), strict=True):
        if label in decided or (instance in taken and not crowd[instance]):
            continue
        decided.add(label)
        taken.add(instance)
        state[label] = -1 if left_out[instance] else 1
        found[instance] = not left_out[instance]
    return state, found


AveragePrecisions = dict[str, tuple[float, float]]
"""Name -> (AP, AP50), for the names that have truth."""


def average_precisions(labels: Boxes, truth: Boxes, least_areas_px: Sequence[float]) -> list[AveragePrecisions]:
    """Return the AP of each class, for each least area, by faster-coco-eval.

    It works class by class: its memory grows with images x classes.
    """
    found: list[AveragePrecisions] = [{} for _ in least_areas_px]
    of_labels = labels.by_name()
    for name, places in sorted(truth.by_name().items()):
        of_class = _precision_curves(labels.take(of_labels.get(name, NOWHERE)), truth.take(places), least_areas_px)
        for place, curves in enumerate(of_class):
            if curves.max() > -1:  # no instance counts: all -1
                found[place][name] = (float(curves.mean()), float(curves[0].mean()))
    return found


def _precision_curves(labels: Boxes, truth: Boxes, least_areas_px: Sequence[float]) -> list[NDArray[np.float64]]:
    """Return, for each least area, the (IoU thresholds, recalls) precision of one class."""
    from faster_coco_eval import COCO, COCOeval_faster

    def rows(boxes: Boxes) -> list[dict[str, Any]]:
        sizes = boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]
        return [
            {
                "id": number, "image_id": image, "category_id": 1, "bbox": box, "area": area,
                "iscrowd": int(crowd), "score": score,
            }
            for number, (image, box, area, score, crowd) in enumerate(
                zip(
                    boxes.image.tolist(), np.concatenate([boxes.xyxy[:, :2], sizes], axis=1).tolist(),
                    boxes.area_px.tolist(), boxes.score.tolist(), boxes.crowd.tolist(), strict=True,
                ), 1,
            )
        ]  # fmt: skip

    categories = [{"id": 1, "name": "one class"}]
    images = [{"id": image} for image in np.unique(np.concatenate([labels.image, truth.image])).tolist()]
    ground = COCO({"images": images, "categories": categories, "annotations": rows(truth)})
    found = COCO({"images": images, "categories": categories, "annotations": rows(labels)})
    run = COCOeval_faster(ground, found, "bbox")
    run.params.areaRng = [[least, 1e12] for least in least_areas_px]
    run.params.areaRngLbl = [str(place) for place in range(len(least_areas_px))]
    run.params.maxDets = [TOP_LABELS]
    run.evaluate()
    run.accumulate()
    precision = np.asarray(run.eval["precision"])  # IoU thresholds, recalls, classes, areas, maxDets
    return [precision[:, :, 0, place, 0] for place in range(len(least_areas_px))]


def evaluate_labels(
    labels: Boxes, truth: Boxes, base_names: Collection[str], known_names: Collection[str], least_area_px: float
) -> tuple[dict[str, Scores], dict[str, Scores], dict[str, int]]:
    """Score the labels of some images.

    Args:
        labels: the written labels of these images.
        truth: all instances of these images, base classes included.
        base_names: classes whose truth is left out.
        known_names: the names of the truth's categories.
        least_area_px: smallest box that the recipe asks about, width x height.

    Returns:
        Scores by subset; scores by class, for classes that have truth or labels; labels by name that is not scored.
    """
    names = frozenset(known_names) - frozenset(base_names)
    truth = truth.by_image()
    is_base = truth.is_named(base_names)
    wanted, is_known = truth.take(~is_base), labels.is_named(names)
    known = labels.take(is_known)
    is_occluded = _occluded(truth)[~is_base]
    images, counts = np.unique(truth.image[~truth.crowd], return_counts=True)
    busy = images[counts >= CROWDED_INSTANCES]

    pairs_of_any = overlapping_pairs(labels, wanted, MATCH_IOU)
    pairs = overlapping_pairs(known, wanted, MATCH_IOU)
    pairs = pairs.take(known.name[pairs.label] == wanted.name[pairs.truth])

    def matched(ignored: NDArray[np.bool_]) -> "_Matched":
        state, found = match(pairs, known, wanted, ignored)
        _, found_by_any = match(pairs_of_any, labels, wanted, ignored)
        return _Matched(state, ~ignored & ~wanted.crowd, found, found_by_any)

    small = wanted.area_px < least_area_px
    whole, large = matched(np.zeros(len(wanted), np.bool_)), matched(small)
    large.state[(large.state == 0) & (known.area_px < least_area_px)] = -1
    busy_truth, busy_labels = (np.flatnonzero(np.isin(boxes.image, busy)) for boxes in (wanted, known))
    aps, large_aps = average_precisions(known, wanted, (0, least_area_px))
    (busy_aps,) = average_precisions(known.take(busy_labels), wanted.take(busy_truth), (0,))
    all_labels, all_truth = np.arange(len(known)), np.arange(len(wanted))
    subsets = {
        "all": whole.scores(all_labels, all_truth, aps.values()),
        "large": large.scores(all_labels, all_truth, large_aps.values()),
        "crowded": whole.scores(busy_labels, busy_truth, busy_aps.values()),
        "occluded": whole.scores(NOWHERE, np.flatnonzero(is_occluded), ()),
    }
    of_labels, of_truth = known.by_name(), wanted.by_name()
    classes = {
        name: whole.scores(
            of_labels.get(name, NOWHERE), of_truth.get(name, NOWHERE), [aps[name]] if name in aps else []
        )
        for name in sorted(of_labels.keys() | of_truth.keys())
    }
    unknown = [(name, len(places)) for name, places in labels.take(~is_known).by_name().items()]
    return subsets, classes, dict(sorted(unknown, key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class _Matched:
    state: NDArray[np.int8]
    """Of labels: 1 right, 0 wrong, -1 ignored."""
    counted: NDArray[np.bool_]
    """Of truth, as the two below."""
    found: NDArray[np.bool_]
    found_by_any: NDArray[np.bool_]

    def scores(self, labels: Places, truth: Places, aps: Iterable[tuple[float, float]]) -> Scores:
        """Return the scores of some labels and instances; `aps` are those of the classes in them."""
        counted = truth[self.counted[truth]]
        right, wrong = int((self.state[labels] == 1).sum()), int((self.state[labels] == 0).sum())
        of_classes = np.array([*aps]).reshape(-1, 2)
        ap, ap50 = of_classes.mean(axis=0).tolist() if len(of_classes) else (None, None)
        return Scores(
            instances=len(counted),
            labels=right + wrong,
            ap=ap,
            ap50=ap50,
            precision=right / (right + wrong) if right + wrong else None,
            recall=float(self.found[counted].mean()) if len(counted) else None,
            any_class_recall=float(self.found_by_any[counted].mean()) if len(counted) else None,
        )


def _occluded(truth: Boxes) -> NDArray[np.bool_]:
    """Return which instances overlap another one of their image at OCCLUDED_IOU or more; crowds neither way."""
    found = np.zeros(len(truth), np.bool_)
    places = np.flatnonzero(~truth.crowd)
    single = truth.take(~truth.crowd)
    pairs = overlapping_pairs(single, single, OCCLUDED_IOU)
    found[places[pairs.label[pairs.label != pairs.truth]]] = True
    return found


@dataclass(frozen=True)
class Truth:
    """A COCO file as ground truth."""

    boxes: Boxes
    """In the order of images."""
    names: frozenset[str]
    """Of its categories, in the form of `same_name`."""
    image_ids: NDArray[np.int64]
    sha256: str


def read_truth(path: Path) -> Truth:
    """Read a COCO file; annotations without a box or a category are left out.

    Raises:
        ConfigError: not a COCO file.
    """
    file = scan_coco(path)
    names = {category.id: same_name(category.name) for category in file.categories}
    found = np.array([names.get(category) for category in file.category_of.tolist()], np.object_)
    boxes = Boxes(file.image_of, found, file.boxes_xyxy, np.ones(len(file.ids)), file.crowd, box_areas(file.boxes_xyxy))
    usable = ~np.isnan(file.boxes_xyxy).any(axis=1) & np.isin(file.category_of, [*names])
    return Truth(boxes.take(usable).by_image(), frozenset(names.values()), file.image_ids, file.sha256)


def read_labels(regions: Path) -> tuple[Boxes, int]:
    """Return the written labels of a final's regions.parquet, and how many of them have no score."""
    with duckdb.connect() as connection:
        columns = connection.execute(
            "select image_id, name, x0, y0, x1, y1, coalesce(score, 1) as score, score is null as unscored "
            "from read_parquet(?) where fate = 'kept' order by row, region",
            [str(regions)],
        ).fetchnumpy()
    boxes_xyxy = np.stack([np.asarray(columns[side], np.float64) for side in ("x0", "y0", "x1", "y1")], axis=1)
    boxes = Boxes(
        np.asarray(columns["image_id"], np.int64),
        np.array([same_name(name) for name in columns["name"]], np.object_),
        boxes_xyxy,
        np.asarray(columns["score"], np.float64),
        np.zeros(len(boxes_xyxy), np.bool_),
        box_areas(boxes_xyxy),
    )
    return boxes, int(np.asarray(columns["unscored"]).sum())


DROPPED, ASKED, FOREGROUND, WRITTEN = 1, 2, 3, 4
"""How far a candidate came."""


def count_funnel(
    connection: duckdb.DuckDBPyConnection, regions: Path, truth: Boxes, least_area_px: float
) -> dict[str, int]:
    """Return how many truth instances each step leaves; every step counts only what the one before left.

    A candidate stands for an instance from IoU 0.5 on; one candidate may stand for several instances.

    Args:
        connection: has the view `records`.
        regions: regions.parquet of a final of these records.
        truth: the instances that count, in the order of images.
        least_area_px: smallest box that the recipe asks about, width x height.
    """
    assert (np.diff(truth.image) >= 0).all(), "instances come in the order of images"
    reached, named = np.zeros(len(truth), np.int8), np.zeros(len(truth), np.int8)
    connection.read_parquet(str(regions)).create_view("settled")
    query = (
        f"select image_id, d.x0, d.y0, d.x1, d.y1, {DROPPED} as step, null as name "
        "from (select image_id, unnest(dropped) as d from records) union all "
        f"select image_id, x0, y0, x1, y1, case when fate = 'kept' then {WRITTEN} when name is not null "
        f"then {FOREGROUND} else {ASKED} end, name from settled"
    )
    for batch in connection.sql(query).to_arrow_reader(BATCH_ROWS):
        count = batch.num_rows
        candidates = Boxes(
            batch["image_id"].to_numpy(),
            np.asarray(batch["name"].to_numpy(zero_copy_only=False), np.object_),
            np.stack([batch[side].to_numpy() for side in ("x0", "y0", "x1", "y1")], axis=1),
            np.ones(count),
            np.zeros(count, np.bool_),
            np.zeros(count),
        )
        pairs = overlapping_pairs(candidates, truth, MATCH_IOU)
        step = batch["step"].to_numpy().astype(np.int8)[pairs.label]
        names = zip(candidates.name[pairs.label], truth.name[pairs.truth], strict=True)
        is_right = np.fromiter((a is not None and same_name(a) == b for a, b in names), np.bool_, len(step))
        np.maximum.at(reached, pairs.truth, step)
        np.maximum.at(named, pairs.truth[is_right], step[is_right])
    large = truth.area_px >= least_area_px
    return {
        "in the truth": len(truth),
        f"box of {least_area_px:g} px or more": int(large.sum()),
        "found by a candidate": int((large & (reached >= DROPPED)).sum()),
        "asked about": int((large & (reached >= ASKED)).sum()),
        "called foreground": int((large & (reached >= FOREGROUND)).sum()),
        "rightly named": int((large & (named >= FOREGROUND)).sum()),
        "written": int((large & (named >= WRITTEN)).sum()),
    }


def gather_final(store: Store, plan: RunPlan, digest: str, scratch: Path) -> Gathered:
    """Bring the chunks that a final was made from to local disk, whatever the run holds since then.

    Raises:
        ConfigError: no such final.
    """
    manifest = read_manifest(store, plan.run, digest)
    if manifest is None:
        raise ConfigError(f"run {plan.run}: no final {digest}; see the refs, or make one with `mill finalize`")
    used = set(manifest.chunks)
    gathered = gather_chunks(store, plan, scratch)
    chunks = [item for item in gathered.chunks if (item.pass_index, item.chunk, item.digest) in used]
    return replace(gathered, chunks=chunks)


def evaluate_final(config: RunConfig, plan: RunPlan, store: Store, digest: str, truth_path: Path) -> Evaluation:
    """Evaluate a final, and store the result beside it.

    Raises:
        ConfigError: no such final, the truth is no COCO file, or it has nothing to compare with.
    """
    label = config.recipe.label
    least_area_px = DEFAULT_LEAST_AREA_PX if label is None else label.min_box_area_px
    truth = read_truth(truth_path)
    with tempfile.TemporaryDirectory(prefix="mill-evaluate-") as name:
        scratch = Path(name)
        fetch_final(store, plan.run, digest, scratch / "final", ("regions.parquet", "classes.json"))
        regions = scratch / "final" / "regions.parquet"
        base_names = {same_name(name) for name in _classes(scratch / "final").base}
        labels, without_score = read_labels(regions)
        with record_table(gather_final(store, plan, digest, scratch), plan, scratch) as table:
            recorded = table.connection.execute(
                "select image_id, coalesce(greatest(width, height), 0) as side from records where status <> 'failed'"
            ).fetchnumpy()
            images, _, places = np.intersect1d(truth.image_ids, recorded["image_id"], return_indices=True)
            if not len(images):
                raise ConfigError(
                    f"{truth_path}: none of its {len(truth.image_ids)} image ids is a labelled image of run "
                    f"{plan.run}; is it the truth of this dataset?"
                )
            max_side = np.inf if label is None else config.dataset.max_side
            shrunk = np.minimum(1, max_side / np.maximum(recorded["side"][places], 1)) ** 2
            boxes, labels = _on_images(truth.boxes, images, shrunk), _on_images(labels, images, shrunk)
            counted = boxes.take(~boxes.is_named(base_names) & ~boxes.crowd)
            if not len(counted):
                raise ConfigError(
                    f"{truth_path}: on the {len(images)} labelled images it has no annotations but of base classes; "
                    "take the file that has the others, e.g. the novel one of `mill split`"
                )
            funnel = count_funnel(table.connection, regions, counted, least_area_px)
    subsets, classes, unknown = evaluate_labels(labels, boxes, base_names, truth.names, least_area_px)
    found = Evaluation(
        final=digest, truth_sha256=truth.sha256, images=len(images),
        images_without_record=len(np.unique(truth.image_ids)) - len(images),
        images_without_truth=len(recorded["image_id"]) - len(images), subsets=subsets, classes=classes,
        unknown=unknown, labels_without_score=without_score, funnel=funnel,
    )  # fmt: skip
    key = RunKeys(plan.run).evaluation(digest, found.truth_sha256[:8], "evaluation.json")
    store.put(key, msgspec.json.format(msgspec.json.encode(found), indent=1))
    return found


def _on_images(boxes: Boxes, images: NDArray[np.int64], factors: NDArray[np.float64]) -> Boxes:
    """Return the boxes of some images, ascending, their areas times the image's factor."""
    found = boxes.take(np.isin(boxes.image, images))
    return replace(found, area_px=found.area_px * factors[np.searchsorted(images, found.image)])


def _classes(folder: Path) -> ClassList:
    return ClassList.from_json((folder / "classes.json").read_bytes(), str(folder / "classes.json"))
