"""Imported scores to finals, by the commands. Source: specs/vlplm.md 2, 8.10 and 8.11."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mill_jobs.config import read_config
from mill_jobs.finalize import finalize_run
from mill_jobs.importing import import_labels
from mill_jobs.recipes.vlplm.legacy import file_names, reading_order
from mill_jobs.run import open_run
from mill_jobs.trainer.check import check_bundle
from mill_shared.errors import ConfigError, InvariantError

GT: dict[str, Any] = {
    "info": {"year": 2017},
    "images": [
        {"id": 7, "file_name": "000007.jpg", "width": 640, "height": 480},
        {"id": 9, "file_name": "000009.jpg", "width": 640, "height": 480},
    ],
    "licenses": [{"id": 1}],
    "annotations": [
        {"id": 100, "image_id": 7, "category_id": 1, "bbox": [10, 10, 100, 200.50], "area": 20000, "iscrowd": 0,
         "segmentation": [[10, 10, 110, 10, 110, 210]]},
        {"id": 101, "image_id": 7, "category_id": 18, "bbox": [300, 300, 52, 52], "area": 2704, "iscrowd": 0},
        {"id": 102, "image_id": 9, "category_id": 64, "bbox": [1, 1, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 103, "image_id": 9, "category_id": 1, "bbox": [0, 0, 640, 480], "area": 307200, "iscrowd": 1,
         "segmentation": {"size": [480, 640], "counts": [0, 307200]}},
    ],
    "categories": [
        {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}, {"id": 21, "name": "cow"},
        {"id": 64, "name": "potted plant"},
    ],
}  # fmt: skip
SCORES: dict[str, Any] = {
    "img_ids_list": [7, 9],
    "bbox_all_list": [
        [[300.5, 300.25, 352.0, 351.0], [301.0, 301.0, 352.0, 352.0], [10.0, 10.0, 110.0, 210.0],
         [300.0, 300.0, 350.0, 330.6]],
        [[0, 5.5, 640, 480], [2.0, 2.0, 9.0, 9.0]],
    ],
    "rpn_score_all_list": [[0.99, 0.97, 0.95, 0.80], [0.70, 0.90]],
    "clip_score_all_list": [[[0.96875], [0.984375], [0.65], [0.95]], [[1.0], [0.499]]],
    "clip_catIDs_all_list": [[[18], [18], [21], [17]], [[21], [17]]],
}  # fmt: skip
FIRST_LINE = (
    '{"segmentation": [[]], "area": 0, "iscrowd": 0, "image_id": 7, "bbox": [300.5, 300.25, 51.5, 50.75], '
    '"category_id": 18, "id": -1, "confidence": 0.979375, "thing_isBase": false, "thing_isNovel": true}'
)


def pl(id_: int, image: int, bbox: list[float], category: int, confidence: float, **scores: float) -> dict[str, Any]:
    return {
        "segmentation": [[]], "area": 0, "iscrowd": 0, "image_id": image, "bbox": bbox, "category_id": category,
        "id": id_, "confidence": confidence, **scores, "thing_isBase": False, "thing_isNovel": True,
    }  # fmt: skip


DOG_AND_CAT = ([300.5, 300.25, 51.5, 50.75], [300.0, 300.0, 50.0, 30.600000000000023])
EXPECTED = {
    "vlplm": [
        pl(-1, 7, DOG_AND_CAT[0], 18, 0.979375),
        pl(-2, 7, DOG_AND_CAT[1], 17, 0.875),
        pl(-3, 9, [0.0, 5.5, 640.0, 474.5], 21, 0.85),
    ],
    "marvelovd": [
        pl(-1, 7, [301.0, 301.0, 51.0, 51.0], 18, 0.984375, clip_score=0.984375, rpn_score=0.97),
        pl(-2, 7, DOG_AND_CAT[1], 17, 0.95, clip_score=0.95, rpn_score=0.8),
        pl(-3, 7, [10.0, 10.0, 100.0, 200.0], 21, 0.65, clip_score=0.65, rpn_score=0.95),
        pl(-4, 9, [0.0, 5.5, 640.0, 474.5], 21, 1.0, clip_score=1.0, rpn_score=0.7),
    ],
}


class Folder:
    """A stranger's score folder, its dataset, and the run file that finalizes it."""

    def __init__(self, folder: Path, gt: dict[str, Any] = GT, scores: dict[str, dict[str, Any]] | None = None) -> None:
        self.folder = folder
        (folder / "images").mkdir()
        for image in gt["images"]:
            (folder / "images" / image["file_name"]).write_bytes(b"never read")
        self.gt = folder / "gt.json"
        self.gt.write_text(json.dumps(gt))
        self.scores = folder / "scores"
        self.scores.mkdir()
        for name, content in (scores or {"CLIP_scores_1.json": SCORES}).items():
            (self.scores / name).write_text(json.dumps(content, separators=(",", ":")))

    def final(self, finalize: dict[str, Any], targets: tuple[str, ...] = ("dog", "cat", "cow"), run: str = "r") -> Path:
        """Import, finalize and return the folder of the final."""
        tree = {
            "run": run,
            "store": str(self.folder / "store"),
            "dataset": {"images": str(self.folder / "images"), "coco": str(self.gt)},
            "sharding": {"chunk_size": 1},
            "recipe": {"name": "vlplm", "targets": list(targets), "finalize": finalize},
            "finalize": {"base": str(self.gt), "base_classes": ["person"]},
        }
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        config = read_config(path)
        import_labels(config, self.scores)
        store, plan = open_run(config)
        made = finalize_run(config, plan, store)
        return self.folder / "store" / run / "final" / made.digest


def labels_of(final: Path) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = json.loads((final / "pseudo_labels.json").read_text())["annotations"]
    return [item for item in annotations if item["id"] < 0]


@pytest.mark.parametrize("profile", ["vlplm", "marvelovd"])
def test_a_strangers_scores_give_the_expected_bytes(tmp_path: Path, profile: str) -> None:
    final = Folder(tmp_path).final({"profile": profile, "categories": "all"})
    expected = {**GT, "annotations": [GT["annotations"][0], GT["annotations"][3], *EXPECTED[profile]]}
    assert (final / "pseudo_labels.json").read_text() == json.dumps(expected)
    assert (FIRST_LINE in (final / "pseudo_labels.json").read_text()) == (profile == "vlplm")


@pytest.mark.parametrize("profile", ["vlplm", "marvelovd"])
def test_the_bundle_obeys_the_rules_of_every_bundle(tmp_path: Path, profile: str) -> None:
    final = Folder(tmp_path).final({"profile": profile})
    assert check_bundle(final).faults == ()
    ours = [item for item in json.loads((final / "instances.json").read_text())["annotations"] if item["id"] > 1000]
    by_box = {json.dumps(item["bbox"]): item for item in ours}
    for label in EXPECTED[profile]:
        same = by_box.pop(json.dumps(label["bbox"]))
        assert (same["image_id"], same["category_id"], same["score"]) == (
            label["image_id"], label["category_id"], label["confidence"],
        )  # fmt: skip
    assert not by_box


def test_trainers_get_only_the_categories_that_they_accept(tmp_path: Path) -> None:
    made = Folder(tmp_path)
    used = json.loads((made.final({}) / "pseudo_labels.json").read_text())
    assert [category["name"] for category in used["categories"]] == ["person", "cat", "dog", "cow"]
    final = made.final({"categories": "all"})
    notes = json.loads((final / "summary.json").read_text())["notes"]
    assert any("trainers refuse it; set recipe.finalize.categories to used" in note for note in notes)


def test_other_thresholds_are_another_final_of_the_same_run(tmp_path: Path) -> None:
    made = Folder(tmp_path)
    assert [label["category_id"] for label in labels_of(made.final({"threshold": 0.86}))] == [18, 17]
    assert [label["confidence"] for label in labels_of(made.final({"objectness_weight": 1.0, "threshold": 0.9}))] == [
        0.99, 0.95,
    ]  # fmt: skip
    assert len(list((tmp_path / "store" / "r" / "final").glob("*/manifest.json"))) == 2


def test_labels_on_base_boxes_and_of_one_place_can_be_left_out(tmp_path: Path) -> None:
    made = Folder(tmp_path)
    final = made.final({"profile": "marvelovd", "base_overlap_iou": 0.5})
    # The cow lies on a person, and on image 9 everything lies in a crowd of persons.
    assert [label["category_id"] for label in labels_of(final)] == [18, 17]
    steps = {step["name"]: step for step in json.loads((final / "summary.json").read_text())["steps"]}
    assert steps["written"]["lost"] == {"base_overlap": 2}
    final = made.final({"profile": "marvelovd", "duplicate_iou": 0.5})
    assert [label["category_id"] for label in labels_of(final)] == [18, 21, 21]


def test_no_label_needs_to_look_like_a_humans(tmp_path: Path) -> None:
    made = Folder(tmp_path)
    notes = json.loads((made.final({"profile": "marvelovd"}) / "summary.json").read_text())["notes"]
    assert any(note.startswith("1 labels have confidence 1") for note in notes)
    labels = labels_of(made.final({"profile": "marvelovd", "max_confidence": 0.999}))
    assert (labels[-1]["confidence"], labels[-1]["clip_score"]) == (0.999, 0.999)


def test_score_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    made = Folder(tmp_path)
    final = made.final({"score_files": True})
    assert (final / "CLIP_scores_1.json").read_bytes() == (made.scores / "CLIP_scores_1.json").read_bytes()


def test_labels_come_in_the_order_of_the_files_names(tmp_path: Path) -> None:
    one = {key: value[:1] for key, value in SCORES.items()}
    other = {key: value[1:] for key, value in SCORES.items()}
    final = Folder(tmp_path, scores={"CLIP_scores_999.json": one, "CLIP_scores_1999.json": other}).final({})
    assert [(label["id"], label["image_id"]) for label in labels_of(final)] == [(-1, 9), (-2, 7), (-3, 7)]


def test_images_without_proposals_and_without_labels_are_no_fault(tmp_path: Path) -> None:
    nothing = {"img_ids_list": [7, 9], **{key: [[], []] for key in SCORES if key != "img_ids_list"}}
    final = Folder(tmp_path, scores={"CLIP_scores_1.json": nothing}).final({})
    assert labels_of(final) == []
    assert check_bundle(final).annotations == 2


def test_a_target_that_the_base_file_lacks_gets_an_id_and_shifts_nothing(tmp_path: Path) -> None:
    final = Folder(tmp_path).final({}, targets=("unicorn", "dog", "cat", "cow"))
    categories = json.loads((final / "pseudo_labels.json").read_text())["categories"]
    assert categories[-1] == {"id": 65, "name": "unicorn", "supercategory": "pseudo"}
    assert [label["category_id"] for label in labels_of(final)] == [18, 17, 21]


def test_a_category_that_is_no_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.targets: 2 scores are of category 21 \(cow\)"):
        Folder(tmp_path).final({}, targets=("dog", "cat"))


def test_an_image_that_is_scored_twice_is_refused(tmp_path: Path) -> None:
    made = Folder(tmp_path, scores={"CLIP_scores_1.json": SCORES, "CLIP_scores_3.json": SCORES})
    with pytest.raises(ConfigError, match=r"CLIP_scores_3\.json: image 7 is scored here and in CLIP_scores_1\.json"):
        made.final({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_ids_list": [7]}, "its five lists differ in length"),
        ({"rpn_score_all_list": [[0.9], [0.7, 0.9]]}, "image 7: its lists of boxes and scores differ in length"),
        ({"clip_catIDs_all_list": [[[18], [18], [21], []], [[21], [17]]]}, "image 7: a box has no class"),
        ({"bbox_all_list": "none"}, "not a stage-1 file"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"CLIP_scores_1\.json: .*{message}"):
        Folder(tmp_path, scores={"CLIP_scores_1.json": {**SCORES, **change}}).final({})


def test_labels_of_an_image_that_the_base_file_lacks_are_refused(tmp_path: Path) -> None:
    made = Folder(tmp_path)
    other = {**GT, "images": GT["images"][:1], "annotations": GT["annotations"][:1]}
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps(GT))
    made.gt.write_text(json.dumps(other))
    tree = {
        "run": "r", "store": str(tmp_path / "store"),
        "dataset": {"images": str(tmp_path / "images"), "coco": str(listed)},
        "recipe": {"name": "vlplm", "targets": ["dog", "cat", "cow"]},
        "finalize": {"base": str(made.gt), "base_classes": ["person"]},
    }  # fmt: skip
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = read_config(path)
    import_labels(config, made.scores)
    with pytest.raises(InvariantError, match=r"does not list 1 images that have pseudo-labels, e\.g\. 9"):
        finalize_run(config, open_run(config)[1], open_run(config)[0])


def test_files_of_train2017_are_named_as_the_original_names_them() -> None:
    names = file_names(118_287)
    assert len(set(names)) == 119
    assert (names[0], names[999], names[1000], names[-1]) == (
        "CLIP_scores_999.json", "CLIP_scores_999.json", "CLIP_scores_1999.json", "CLIP_scores_118286.json",
    )  # fmt: skip
    places = reading_order(np.arange(118_287))
    assert sorted(places.tolist()) == list(range(118_287))
    first = int(np.argmin(places))
    assert names[first] == "CLIP_scores_100999.json"


def made_scores(images: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a base file and scores of many overlapping boxes."""
    rng = np.random.default_rng(seed)
    ids = sorted(rng.choice(10_000, images, replace=False).tolist())
    targets = [cat["id"] for cat in GT["categories"] if cat["name"] in ("dog", "cat", "cow")]
    scores: dict[str, list[Any]] = {key: [] for key in SCORES}
    for image in ids:
        count = int(rng.integers(0, 60))
        low = rng.uniform(0, 200, (count, 2)).astype(np.float32).astype(float)
        high = low + rng.uniform(5, 300, (count, 2)).astype(np.float32).astype(float)
        scores["img_ids_list"].append(image)
        scores["bbox_all_list"].append(np.concatenate([low, high], axis=1).tolist())
        scores["rpn_score_all_list"].append(sorted(rng.uniform(0.3, 1, count).tolist(), reverse=True))
        clip = rng.uniform(0.3, 1, count).astype(np.float16).astype(float)
        scores["clip_score_all_list"].append([[value] for value in clip.tolist()])
        scores["clip_catIDs_all_list"].append([[int(rng.choice(targets))] for _ in range(count)])
    listed = [{"id": i, "file_name": f"{i:06d}.jpg", "width": 640, "height": 640} for i in ids]
    return {**GT, "images": listed, "annotations": []}, scores


def plain_stage2(scores: dict[str, Any], profile: str) -> list[dict[str, Any]]:
    """Stage 2 again, box by box, without an array. Source: specs/vlplm.md 1.3."""
    found: list[dict[str, Any]] = []
    for image, boxes, rpns, clips, cats in zip(*scores.values(), strict=True):
        left = []
        for box, rpn, (clip,), (cat,) in zip(boxes, rpns, clips, cats, strict=True):
            score = 0.5 * rpn + (1 - 0.5) * clip if profile == "vlplm" else clip
            if score > (0.8 if profile == "vlplm" else 0.5):
                left.append((box, score, cat, clip, rpn))
        kept: list[Any] = []
        for line in sorted(left, key=lambda line: -line[1]):
            (a0, b0, a1, b1), cat = line[0], line[2]
            for (c0, d0, c1, d1), *_, other in [(k[0], k[2]) for k in kept]:
                inter = max(0.0, min(a1, c1) - max(a0, c0)) * max(0.0, min(b1, d1) - max(b0, d0))
                union = (a1 - a0) * (b1 - b0) + (c1 - c0) * (d1 - d0) - inter
                if other == cat and inter / union > 0.6:
                    break
            else:
                kept.append(line)
        for (x0, y0, x1, y1), score, cat, clip, rpn in kept:
            both = {"clip_score": clip, "rpn_score": rpn} if profile == "marvelovd" else {}
            found.append(pl(-len(found) - 1, image, [x0, y0, x1 - x0, y1 - y0], cat, score, **both))
    return found


@pytest.mark.parametrize("profile", ["vlplm", "marvelovd"])
def test_many_boxes_agree_with_a_plain_reading_of_the_specification(tmp_path: Path, profile: str) -> None:
    gt, scores = made_scores(40, seed=5)
    final = Folder(tmp_path, gt, {"CLIP_scores_39.json": scores}).final({"profile": profile, "categories": "all"})
    expected = plain_stage2(scores, profile)
    assert len(expected) > 50
    digest = hashlib.sha256(json.dumps(expected).encode()).hexdigest()
    assert hashlib.sha256(json.dumps(labels_of(final)).encode()).hexdigest() == digest
    assert (final / "pseudo_labels.json").read_text() == json.dumps({**gt, "annotations": expected})
