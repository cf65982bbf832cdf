"""Scores against hand-counted cases and against pycocotools; what a user learns from a whole run."""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mill_jobs.evaluate import (
    Boxes,
    Evaluation,
    Scores,
    box_areas,
    count_funnel,
    evaluate_final,
    evaluate_labels,
    read_truth,
)
from mill_jobs.finalize import finalize_run
from mill_jobs.recipes.cotpl.evidence import EVIDENCE
from mill_shared.errors import ConfigError
from mill_shared.keys import RunKeys
from mill_shared.plan import read_images, write_pass
from mill_shared.presets import OV_COCO_48
from mill_shared.records import ChunkMeta, Dropped, ImageRecord, Region, encode_chunk
from mill_shared.storage import LocalStore
from oracle_run import OracleRun

Row = tuple[int, str, tuple[float, float, float, float]]


def boxes_of(
    image: NDArray[np.int64], name: NDArray[np.object_], xyxy: NDArray[np.float64], score: NDArray[np.float64],
    crowd: NDArray[np.bool_],
) -> Boxes:  # fmt: skip
    return Boxes(image, name, xyxy, score, crowd, box_areas(xyxy))


def truth_of(rows: Sequence[Row], crowd: Sequence[int] = ()) -> Boxes:
    return boxes_of(
        np.array([image for image, _, _ in rows], np.int64),
        np.array([name for _, name, _ in rows], np.object_),
        np.array([box for _, _, box in rows], np.float64).reshape(-1, 4),
        np.ones(len(rows)),
        np.isin(np.arange(len(rows)), np.array(crowd, np.int64)),
    )


def labels_of(rows: Sequence[tuple[int, str, tuple[float, float, float, float], float]]) -> Boxes:
    plain = truth_of([(image, name, box) for image, name, box, _ in rows])
    return replace(plain, score=np.array([score for *_, score in rows], np.float64))


def subsets(labels: Boxes, truth: Boxes, base: Sequence[str] = (), least_area_px: float = 10_000) -> dict[str, Scores]:
    return evaluate_labels(labels, truth, base, ("cat", "dog", "cup", "person"), least_area_px)[0]


def square(x: float, y: float, side: float = 200) -> tuple[float, float, float, float]:
    return (x, y, x + side, y + side)


def test_each_instance_is_found_once_and_the_best_score_comes_first() -> None:
    truth = truth_of([(1, "cat", square(0, 0)), (1, "cat", square(300, 0)), (2, "cat", square(0, 0))])
    labels = labels_of(
        [
            (1, "cat", square(0, 60), 0.5),  # IoU 0.54, but the next one takes the instance
            (1, "cat", square(0, 0), 0.9),
            (1, "cat", square(300, 100), 0.8),  # IoU 0.33
            (2, "dog", square(0, 0), 0.7),
        ]
    )
    found = subsets(labels, truth)["all"]
    assert (found.instances, found.labels) == (3, 4)
    assert found.precision == 1 / 4
    assert found.recall == 1 / 3
    assert found.any_class_recall == 2 / 3
    # One right label, then two wrong ones: recall 1/3 is reached at precision 1, and that is 34 of 101 points.
    assert found.ap50 == pytest.approx(34 / 101)


def test_a_label_takes_the_free_instance_that_it_overlaps_best() -> None:
    truth = truth_of([(1, "cat", square(0, 0)), (1, "cat", square(50, 0))])
    labels = labels_of([(1, "cat", square(40, 0), 0.9), (1, "cat", square(45, 0), 0.8)])
    found = subsets(labels, truth)["all"]
    assert (found.precision, found.recall) == (1.0, 1.0)


def test_iou_of_just_a_half_is_enough() -> None:
    truth = truth_of([(1, "cat", (0, 0, 200, 100)), (2, "cat", (0, 0, 200, 100))])
    labels = labels_of([(1, "cat", (0, 0, 100, 100), 0.9), (2, "cat", (0, 0, 99, 100), 0.9)])
    assert subsets(labels, truth)["all"].recall == 1 / 2


def test_crowds_are_neither_found_nor_missed_and_take_any_number_of_labels() -> None:
    truth = truth_of([(1, "cat", (0, 0, 600, 600)), (1, "cat", square(700, 0))], crowd=[0])
    labels = labels_of(
        [(1, "cat", square(0, 0), 0.9), (1, "cat", square(300, 300), 0.8), (1, "cat", square(700, 0), 0.7)]
    )
    found = subsets(labels, truth)["all"]
    assert (found.instances, found.labels, found.precision, found.recall) == (1, 1, 1.0, 1.0)


def test_base_truth_is_left_out_and_names_that_are_not_scored_are_counted() -> None:
    truth = truth_of([(1, "person", square(0, 0)), (1, "cat", square(300, 0))])
    labels = labels_of(
        [
            (1, "cat", square(300, 0), 0.9),
            (1, "curtain", square(600, 0), 0.8),
            (1, "curtain", square(0, 0), 0.8),
            (1, "person", square(0, 0), 0.7),
        ]
    )
    scores, classes, unknown = evaluate_labels(labels, truth, ["person"], ["person", "cat", "dog"], 10_000)
    found = scores["all"]
    assert (found.instances, found.labels, found.precision, found.recall, found.ap50) == (1, 1, 1.0, 1.0, 1.0)
    assert list(classes) == ["cat"]
    assert unknown == {"curtain": 2, "person": 1}


def test_below_the_size_filter_nothing_is_right_or_wrong() -> None:
    truth = truth_of([(1, "cat", square(0, 0, 99)), (1, "cat", square(300, 0, 100)), (1, "cat", square(600, 0, 99))])
    labels = labels_of(
        [
            (1, "cat", square(0, 0, 101), 0.9),  # large, of a small instance
            (1, "cat", square(0, 5, 101), 0.8),  # large, and the small instance is taken
            (1, "cat", square(300, 0, 99), 0.7),  # small, of a large instance
            (1, "dog", square(900, 0, 99), 0.6),  # small, of nothing
            (1, "dog", square(900, 0, 100), 0.6),
        ]
    )
    found = subsets(labels, truth)["large"]
    assert (found.instances, found.recall) == (1, 1.0)
    assert (found.labels, found.precision) == (3, 1 / 3)


def test_crowded_images_have_fifteen_instances_base_included() -> None:
    def image(number: int, instances: int) -> list[Row]:
        return [(number, "person", square(10 * i, 300)) for i in range(instances - 1)] + [(number, "cat", square(0, 0))]

    truth = truth_of([*image(1, 14), *image(2, 15), *image(3, 16)])
    labels = labels_of([(1, "cat", square(0, 0), 0.9), (2, "cat", square(0, 0), 0.8), (3, "cat", square(0, 250), 0.7)])
    found = subsets(labels, truth, ["person"])["crowded"]
    assert (found.instances, found.labels, found.precision, found.recall) == (2, 2, 1 / 2, 1 / 2)
    assert found.ap50 == pytest.approx(51 / 101)


def test_occluded_instances_overlap_another_one_and_only_their_recall_is_told() -> None:
    truth = truth_of(
        [
            (1, "cat", square(0, 0)), (1, "person", square(100, 0)),  # IoU 1/3, with a base class
            (2, "cat", square(0, 0)), (2, "dog", square(110, 0)),  # IoU 0.29
            (3, "cup", square(0, 0)), (3, "cup", square(0, 50)), (3, "person", (0, 0, 900, 900)),
        ],
        crowd=[6],
    )  # fmt: skip
    labels = labels_of([(1, "cat", square(0, 0), 0.9), (3, "dog", square(0, 0), 0.9), (2, "cat", square(0, 0), 0.9)])
    found = subsets(labels, truth, ["person"])["occluded"]
    assert found == Scores(
        instances=3, labels=0, ap=None, ap50=None, precision=None, recall=1 / 3, any_class_recall=2 / 3
    )


def test_no_labels_is_a_score_of_zero_and_no_truth_is_none() -> None:
    truth = truth_of([(1, "cat", square(0, 0))])
    nothing = labels_of([])
    assert subsets(nothing, truth)["all"] == Scores(1, 0, 0.0, 0.0, None, 0.0, 0.0)
    assert subsets(nothing, truth_of([]))["all"] == Scores(0, 0, None, None, None, None, None)
    assert subsets(nothing, truth_of([(1, "cat", square(0, 0))], crowd=[0]))["all"].ap is None


# Parity with pycocotools


def random_boxes(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    corner, sides = rng.uniform(0, 200, (count, 2)), rng.uniform(40, 180, (count, 2))
    return np.concatenate([corner, corner + sides], axis=1)


def random_case(seed: int) -> tuple[Boxes, Boxes]:
    """Return (labels, truth): 12 images, three classes, crowds, labels near truth and elsewhere."""
    rng = np.random.default_rng(seed)
    names = np.array(["cat", "dog", "cup"], np.object_)
    truth = boxes_of(
        rng.integers(1, 13, 150), names[rng.integers(0, 3, 150)], random_boxes(rng, 150), np.ones(150),
        rng.random(150) < 0.1,
    )  # fmt: skip
    near = truth.take(rng.random(150) < 0.7)
    boxes = np.concatenate([near.xyxy + rng.normal(0, 8, near.xyxy.shape), random_boxes(rng, 60)])
    count = len(boxes)
    labels = boxes_of(
        np.concatenate([near.image, rng.integers(1, 15, 60)]),
        np.concatenate([near.name, names[rng.integers(0, 3, 60)]]),
        boxes, rng.permutation(count) / count, np.zeros(count, np.bool_),
    )  # fmt: skip
    return labels, truth


def coco_of(boxes: Boxes, ids: Sequence[str]) -> dict[str, Any]:
    xywh = np.concatenate([boxes.xyxy[:, :2], boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]], axis=1).tolist()
    return {
        "images": [{"id": image} for image in range(1, 15)],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(ids)],
        "annotations": [
            {
                "id": place + 1, "image_id": int(boxes.image[place]), "category_id": ids.index(boxes.name[place]) + 1,
                "bbox": box, "area": box[2] * box[3], "iscrowd": int(boxes.crowd[place]),
                "score": float(boxes.score[place]),
            }
            for place, box in enumerate(xywh)
        ],
    }  # fmt: skip


def pycocotools_scores(labels: Boxes, truth: Boxes, least_area_px: float) -> tuple[float, float, int, int, int]:
    """Return (AP, AP50, right labels, wrong labels, instances) by the original."""
    names = ("cat", "cup", "dog")
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for boxes in (truth, labels):
            side: Any = COCO()
            side.dataset = coco_of(boxes, names)
            side.createIndex()
            sides.append(side)
        run: Any = COCOeval(sides[0], sides[1], "bbox")
        run.params.areaRng, run.params.areaRngLbl = [[least_area_px, 1e12]], ["all"]
        run.params.maxDets = [100]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"]
    right = wrong = instances = 0
    for image in run.evalImgs:
        if image is not None:
            counts = ~image["dtIgnore"][0].astype(bool)
            matched = image["dtMatches"][0] > 0
            right += int((counts & matched).sum())
            wrong += int((counts & ~matched).sum())
            instances += int((~np.array(image["gtIgnore"]).astype(bool)).sum())
    return (
        float(precision[precision > -1].mean()), float(precision[0][precision[0] > -1].mean()), right, wrong, instances,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_pycocotools(seed: int) -> None:
    labels, truth = random_case(seed)
    found = subsets(labels, truth)
    for subset, least_area_px in (("all", 0), ("large", 10_000)):
        ours = found[subset]
        ap, ap50, right, wrong, instances = pycocotools_scores(labels, truth, least_area_px)
        assert ours.ap == pytest.approx(ap, abs=1e-9)
        assert ours.ap50 == pytest.approx(ap50, abs=1e-9)
        assert (ours.instances, ours.labels) == (instances, right + wrong)
        assert ours.precision == pytest.approx(right / (right + wrong))
        assert ours.recall == pytest.approx(right / instances)


def test_the_order_of_the_rows_changes_nothing() -> None:
    labels, truth = random_case(9)
    rng = np.random.default_rng(0)
    shuffled = labels.take(rng.permutation(len(labels))), truth.take(rng.permutation(len(truth)))
    assert evaluate_labels(*shuffled, ["cup"], ["cat", "dog", "cup"], 10_000) == evaluate_labels(
        labels, truth, ["cup"], ["cat", "dog", "cup"], 10_000
    )


# What each step costs


def test_the_funnel_follows_each_instance_to_where_it_is_lost(tmp_path: Path) -> None:
    truth = truth_of(
        [
            (1, "cat", square(0, 0, 50)),  # too small
            (1, "cat", square(100, 0)),  # never a candidate
            (1, "cat", square(400, 0)),  # dropped
            (1, "cat", square(700, 0)),  # asked, not foreground
            (1, "cat", square(1000, 0)),  # foreground, wrong name
            (1, "cat", square(1300, 0)),  # right name, not written
            (1, "cat", square(1600, 0)),  # written, in another spelling
            (2, "cat", square(0, 0)),  # another image has a box there
        ]
    )
    region = [
        (square(700, 0), None, "absent"),
        (square(1000, 0), "dog", "kept"),
        (square(1300, 0), "cat", "not_selected"),
        (square(1600, 10), "CAT ", "kept"),
        (square(0, 0), "cat", "kept"),
    ]
    record = ImageRecord(
        row=0, image_id=1, key="a.jpg", status="ok", width=2000, height=600,
        regions=tuple(Region(box, "foreground", label=name) for box, name, _ in region),
        dropped=(Dropped(square(400, 0), 0.9, "inner"), Dropped(square(0, 0, 50), 0.9, "small")),
    )  # fmt: skip
    chunk, regions = tmp_path / "chunk.parquet", tmp_path / "reg'ions.parquet"
    chunk.write_bytes(encode_chunk([record], ChunkMeta(label_digest="x", pass_index=0, chunk=0), EVIDENCE))
    pq.write_table(
        pa.Table.from_pylist(
            [
                {"image_id": 1, "x0": x0, "y0": y0, "x1": x1, "y1": y1, "name": name, "fate": fate}
                for (x0, y0, x1, y1), name, fate in region
            ]
        ),
        regions,
    )
    with duckdb.connect() as connection:
        connection.read_parquet(str(chunk)).create_view("records")
        found = count_funnel(connection, regions, truth, 10_000)
    assert found == {
        "in the truth": 8,
        "box of 10000 px or more": 7,
        "found by a candidate": 5,
        "asked about": 4,
        "called foreground": 3,
        "rightly named": 2,
        "written": 1,
    }


# A whole run


def test_with_the_truth_as_models_all_large_instances_but_the_dropped_ones_are_right(oracle_run: OracleRun) -> None:
    run = oracle_run
    found = evaluate_final(run.config, run.plan, run.store, run.final, run.truth)
    assert (found.images, found.images_without_record, found.images_without_truth) == (6, 0, 0)
    large, steps = found.subsets["large"], list(found.funnel.values())
    assert large.precision == 1.0
    assert large.instances == found.funnel["box of 10000 px or more"] > 10
    assert large.recall == found.funnel["written"] / large.instances > 0.5
    assert steps == sorted(steps, reverse=True)
    assert found.funnel["rightly named"] == found.funnel["asked about"]
    assert sum(scores.instances for scores in found.classes.values()) == found.subsets["all"].instances
    assert not {"person", "chair"} & found.classes.keys(), "base classes are left out"
    stored = run.store.get(RunKeys("oracle").evaluation(run.final, found.truth_sha256[:8], "evaluation.json"))
    assert msgspec.json.decode(stored, type=Evaluation) == found


def test_the_size_filter_works_in_the_frame_that_was_labelled(oracle_run: OracleRun) -> None:
    run = oracle_run
    halved = run.config.model_copy(update={"dataset": run.config.dataset.model_copy(update={"max_side": 320})})
    content = json.loads(run.truth.read_bytes())
    sides = {image["id"]: max(image["width"], image["height"]) for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    areas = [
        item["bbox"][2] * item["bbox"][3] * (320 / sides[item["image_id"]]) ** 2
        for item in content["annotations"]
        if names[item["category_id"]] not in OV_COCO_48 and not item["iscrowd"]
    ]
    found = evaluate_final(halved, run.plan, run.store, run.final, run.truth)
    assert (
        found.subsets["large"].instances == found.funnel["box of 10000 px or more"] == sum(a >= 10_000 for a in areas)
    )


def test_images_of_one_side_alone_are_left_out_and_counted(oracle_run: OracleRun, tmp_path: Path) -> None:
    run = oracle_run
    content = json.loads(run.truth.read_bytes())
    content["images"] = [*content["images"][2:], {"id": 1, "file_name": "x.jpg", "height": 9, "width": 9}]
    content["annotations"].append(
        {"id": 1, "image_id": 1, "category_id": 17, "bbox": [0, 0, 200, 200], "iscrowd": 0, "area": 1}
    )
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(content))
    found = evaluate_final(run.config, run.plan, run.store, run.final, truth)
    assert (found.images, found.images_without_record, found.images_without_truth) == (4, 1, 2)
    assert found.subsets["large"].precision == 1.0


def test_names_match_whatever_the_ids_case_and_spaces(oracle_run: OracleRun, tmp_path: Path) -> None:
    run = oracle_run
    content = json.loads(run.truth.read_bytes())
    for item in (*content["annotations"], *content["categories"]):
        item["category_id" if "category_id" in item else "id"] += 1000
    for category in content["categories"]:
        category["name"] = f" {category['name'].upper().replace(' ', '  ')}"
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(content))
    renamed, plain = (evaluate_final(run.config, run.plan, run.store, run.final, path) for path in (truth, run.truth))
    assert renamed.subsets == plain.subsets
    assert renamed.classes == plain.classes


def test_a_truth_with_nothing_to_compare_is_refused(oracle_run: OracleRun, tmp_path: Path) -> None:
    run = oracle_run
    with pytest.raises(ConfigError, match=r"on the 6 labelled images it has no annotations but of base classes"):
        evaluate_final(run.config, run.plan, run.store, run.final, run.base)
    content = json.loads(run.truth.read_bytes())
    for image in content["images"]:
        image["id"] += 10**9
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"none of its 6 image ids is a labelled image of run oracle"):
        evaluate_final(run.config, run.plan, run.store, run.final, other)
    with pytest.raises(ConfigError, match="no final abc"):
        evaluate_final(run.config, run.plan, run.store, "abc", run.truth)


def test_a_final_is_scored_with_its_own_base_classes(oracle_run: OracleRun) -> None:
    run = oracle_run
    settings = run.config.finalize.model_copy(update={"base_classes": ("person",)})
    other = run.config.model_copy(update={"finalize": settings})
    digest = finalize_run(other, run.plan, run.store).digest
    found = evaluate_final(run.config, run.plan, run.store, digest, run.truth)
    assert "chair" in found.classes, "whatever the run file says now"


def test_an_older_final_is_scored_with_the_records_that_it_was_made_from(oracle_run: OracleRun, tmp_path: Path) -> None:
    run = oracle_run
    shutil.copytree(run.config.store, tmp_path / "store")
    store = LocalStore(tmp_path / "store")
    before = evaluate_final(run.config, run.plan, store, run.final, run.truth)
    row, image = next(read_images(store, run.plan))
    write_pass(store, run.plan, 1, [row], [])
    emptied = ImageRecord(row=row, image_id=image.image_id, key=image.key, status="empty", width=640, height=480)
    meta = ChunkMeta(label_digest=run.plan.label_digest, pass_index=1, chunk=0)
    store.put_new(RunKeys(run.plan.run).chunk(1, 0), encode_chunk([emptied], meta, EVIDENCE))
    assert evaluate_final(run.config, run.plan, store, run.final, run.truth) == before
    newer = finalize_run(run.config.model_copy(update={"store": str(tmp_path / "store")}), run.plan, store).digest
    assert (
        evaluate_final(run.config, run.plan, store, newer, run.truth).funnel["asked about"]
        < before.funnel["asked about"]
    )


def test_annotations_without_a_box_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    item = {"image_id": 5, "category_id": 1, "iscrowd": 0}
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 5}],
                "categories": [{"id": 1, "name": "Teddy  Bear"}],
                "annotations": [{"id": 1, **item}, {"id": 2, "bbox": [1, 2, 3, 4], **item}],
            }
        )
    )
    found = read_truth(path)
    assert found.names == {"teddy bear"}
    assert found.boxes.xyxy.tolist() == [[1, 2, 4, 6]]
