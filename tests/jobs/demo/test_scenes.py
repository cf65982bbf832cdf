from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mill_jobs.demo import scenes
from mill_shared.errors import ConfigError

SAMPLE = [(seed, index) for seed in (scenes.TRAIN_SEED, *scenes.HELD_OUT_SEEDS) for index in range(15)]


@pytest.fixture(scope="module")
def sample() -> list[scenes.Scene]:
    return [scenes.make_scene(seed, index) for seed, index in SAMPLE]


def test_a_scene_depends_on_seed_and_index_only() -> None:
    first = scenes.make_scene(5, 7)
    scenes.make_scene(5, 8)
    again = scenes.make_scene(5, 7)
    np.testing.assert_array_equal(first.image_rgb, again.image_rgb)
    assert [thing.bbox_xyxy for thing in first.objects] == [thing.bbox_xyxy for thing in again.objects]
    assert not np.array_equal(first.image_rgb, scenes.make_scene(6, 7).image_rgb)


def test_held_out_seeds_are_not_trained_on() -> None:
    assert scenes.TRAIN_SEED not in scenes.HELD_OUT_SEEDS


def test_objects_and_bands_cover_every_pixel_once(sample: list[scenes.Scene]) -> None:
    for scene in sample:
        entities = [thing.mask for thing in scene.objects] + [band.mask for band in scene.bands]
        assert (np.sum(entities, axis=0) == 1).all()


def test_every_object_survives_the_size_filter_of_the_method(sample: list[scenes.Scene]) -> None:
    # specs/cotpl.md 1.5: w and h are differences of inclusive indices, and w * h below 10,000 is dropped.
    for scene in sample:
        assert 2 <= len(scene.objects) <= 4
        for thing in scene.objects:
            rows, columns = np.nonzero(thing.mask)
            left, top, right, bottom = thing.bbox_xyxy
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (left, top, right, bottom)
            assert (right - left - 1) * (bottom - top - 1) >= 10_000


def test_each_object_is_one_visible_piece_of_a_colour_of_its_own(sample: list[scenes.Scene]) -> None:
    for scene in sample:
        hue = cv2.cvtColor(scene.image_rgb, cv2.COLOR_RGB2HSV)[:, :, 0]
        hues = []
        for thing in scene.objects:
            pieces, _ = cv2.connectedComponents(thing.mask.astype(np.uint8))
            assert pieces == 2
            # Twice the angle, since OpenCV counts half degrees; a mean on the circle.
            hues.append(np.angle(np.exp(2j * np.pi * hue[thing.mask] / 180).mean()))
        for number, one in enumerate(hues):
            for other in hues[:number]:
                assert np.abs(np.angle(np.exp(1j * (one - other)))) > np.deg2rad(20)


def test_every_class_is_drawn_and_names_are_told_apart_by_role(sample: list[scenes.Scene]) -> None:
    things = {thing.name for scene in sample for thing in scene.objects}
    bands = {band.name for scene in sample for band in scene.bands}
    all_names = (*scenes.BASE_CLASSES, *scenes.NOVEL_CLASSES, *scenes.EXTRA_CLASSES, *scenes.BACKGROUND_CLASSES)
    assert len(set(all_names)) == len(all_names)
    assert things == set(all_names) - set(scenes.BACKGROUND_CLASSES)
    assert bands == set(scenes.BACKGROUND_CLASSES)


# pycocotools hands numpy an array type of the time before numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_written_set_is_coco_and_its_base_file_keeps_base_annotations_only(tmp_path: Path) -> None:
    scenes.write_scenes(tmp_path, seed=3, count=6)
    truth, base = COCO(str(tmp_path / "truth.json")), COCO(str(tmp_path / "base.json"))
    names = {category["name"]: category["id"] for category in truth.dataset["categories"]}
    assert tuple(names) == scenes.BASE_CLASSES + scenes.NOVEL_CLASSES
    assert base.dataset["categories"] == truth.dataset["categories"]
    assert base.dataset["images"] == truth.dataset["images"]
    base_ids = {names[name] for name in scenes.BASE_CLASSES}
    kept = [annotation for annotation in truth.dataset["annotations"] if annotation["category_id"] in base_ids]
    assert 0 < len(kept) < len(truth.dataset["annotations"])
    assert base.dataset["annotations"] == kept
    for index, image in enumerate(truth.dataset["images"]):
        scene = scenes.make_scene(3, index)
        picture = cv2.imread(str(tmp_path / "images" / image["file_name"]), cv2.IMREAD_COLOR_RGB)
        assert picture is not None
        assert np.abs(picture.astype(int) - scene.image_rgb).mean() < 3
        known = [thing for thing in scene.objects if thing.name in names]
        annotations = truth.imgToAnns[image["id"]]
        assert [annotation["category_id"] for annotation in annotations] == [names[thing.name] for thing in known]
        for thing, annotation in zip(known, annotations, strict=True):
            np.testing.assert_array_equal(truth.annToMask(annotation).astype(bool), thing.mask)
            left, top, width, height = annotation["bbox"]
            assert (left, top, left + width, top + height) == thing.bbox_xyxy


def test_writing_again_gives_the_same_files(tmp_path: Path) -> None:
    scenes.write_scenes(tmp_path, seed=3, count=2)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    scenes.write_scenes(tmp_path, seed=3, count=2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == first


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        scenes.write_scenes(tmp_path, seed=3, count=0)
