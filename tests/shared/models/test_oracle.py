"""Masks and answers from ground truth, on real COCO annotations and on a small truth of our own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO

from mill_shared.errors import ConfigError
from mill_shared.geometry import mask_boxes
from mill_shared.models.config import MaskGeneratorSettings, OracleChatConfig, OracleMasksConfig
from mill_shared.models.factory import build_chat_model, build_mask_generator
from mill_shared.models.protocols import Question

SAMPLE = Path(__file__).parents[2] / "data" / "coco-sample" / "instances.json"
Box = tuple[float, float, float, float]


def frame(height: int, width: int) -> NDArray[np.uint8]:
    return np.zeros((height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def sample() -> COCO:
    found = COCO()
    found.dataset = json.loads(SAMPLE.read_text(encoding="utf-8"))
    found.createIndex()
    return found


@pytest.fixture
def small() -> dict[str, Any]:
    """One image of 80 x 60: a cup, a sky over its upper half, a crowd, and another image without anything."""
    return {
        "images": [{"id": 7, "width": 80, "height": 60}, {"id": 8, "width": 10, "height": 10}],
        "categories": [{"id": 3, "name": "cup"}, {"id": 5, "name": "sky"}],
        "annotations": [
            {
                "id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 20, 30],
                "segmentation": [[10, 20, 30, 20, 30, 50, 10, 50]],
            },
            {
                "id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 80, 30],
                "segmentation": {"size": [60, 80], "counts": [0] + [30, 30] * 80},
            },
            {
                "id": 3, "image_id": 7, "category_id": 3, "bbox": [40, 40, 20, 20], "iscrowd": 1,
                "segmentation": {"size": [60, 80], "counts": [4800]},
            },
        ],
    }  # fmt: skip


def write(folder: Path, truth: Any) -> str:
    path = folder / "truth.json"
    path.write_text(json.dumps(truth), encoding="utf-8")
    return str(path)


def test_real_masks_are_those_of_coco(sample: COCO) -> None:
    generator = build_mask_generator(OracleMasksConfig(truth=str(SAMPLE)), MaskGeneratorSettings())
    assert not generator.halve_batch()
    for image in list(sample.imgs.values())[:12]:
        found = generator.generate(frame(image["height"], image["width"]), image["id"])
        expected = [sample.annToMask(a) > 0 for a in sample.imgToAnns[image["id"]] if not a["iscrowd"]]
        assert len(found.masks) == len(expected)
        assert all(np.array_equal(mask, other) for mask, other in zip(found.masks, expected, strict=True))
        assert found.predicted_ious.tolist() == found.stabilities.tolist() == [1.0] * len(expected)


def test_masks_shrink_with_the_frame(small: dict[str, Any], tmp_path: Path) -> None:
    generator = build_mask_generator(OracleMasksConfig(truth=write(tmp_path, small)), MaskGeneratorSettings())
    whole, half = generator.generate(frame(60, 80), 7), generator.generate(frame(30, 40), 7)
    assert half.masks.shape == (2, 30, 40)
    assert half.masks.dtype == bool
    assert np.array_equal(mask_boxes(half.masks) * 2, mask_boxes(whole.masks))


@pytest.mark.parametrize("image_id", [8, 99])
def test_an_image_without_truth_has_no_masks(small: dict[str, Any], tmp_path: Path, image_id: int) -> None:
    generator = build_mask_generator(OracleMasksConfig(truth=write(tmp_path, small)), MaskGeneratorSettings())
    found = generator.generate(frame(20, 30), image_id)
    assert found.masks.shape == (0, 20, 30)
    assert found.predicted_ious.shape == found.stabilities.shape == (0,)


def answers(truth: str, box_xyxy: Box, *, image_id: int = 7, size: tuple[int, int] = (60, 80)) -> list[str]:
    chat = build_chat_model(OracleChatConfig(truth=truth, background=("sky",)))
    assert not chat.halve_batch()
    picture = frame(*size)
    asked = [
        Question(picture, "", asks=asks, image_id=image_id, box_xyxy=box_xyxy) for asks in ("presence", "name", "layer")
    ]
    found = chat.ask(asked)
    assert all(answer.error is None for answer in found)
    return [answer.text for answer in found]


@pytest.mark.parametrize(
    ("box_xyxy", "expected"),
    [
        ((10, 20, 30, 50), ["Yes", "cup", "Foreground"]),
        ((10, 20, 30, 35), ["Yes", "cup", "Foreground"]),  # an IoU of exactly one half
        ((10, 20, 30, 34.9), ["No", "nothing", "Foreground"]),
        ((2, 1, 79, 31), ["Yes", "sky", "Background"]),
        ((40, 40, 60, 60), ["No", "nothing", "Foreground"]),  # a crowd is no instance
    ],
)
def test_the_best_overlap_answers(small: dict[str, Any], tmp_path: Path, box_xyxy: Box, expected: list[str]) -> None:
    assert answers(write(tmp_path, small), box_xyxy) == expected


def test_of_two_instances_the_nearer_box_answers(small: dict[str, Any], tmp_path: Path) -> None:
    small["annotations"].append({"id": 4, "image_id": 7, "category_id": 5, "bbox": [11, 21, 20, 30]})
    assert answers(write(tmp_path, small), (10, 20, 30, 50))[1] == "cup"
    assert answers(write(tmp_path, small), (11, 21, 31, 51))[1] == "sky"


def test_boxes_are_scaled_to_the_labelled_frame(small: dict[str, Any], tmp_path: Path) -> None:
    truth = write(tmp_path, small)
    assert answers(truth, (5, 10, 15, 25), size=(30, 40))[1] == "cup"
    assert answers(truth, (5, 10, 15, 25), size=(60, 80))[0] == "No"


def test_an_image_without_truth_shows_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    assert answers(write(tmp_path, small), (0, 0, 10, 10), image_id=8)[0] == "No"
    assert answers(write(tmp_path, small), (0, 0, 10, 10), image_id=99)[0] == "No"


def test_what_it_cannot_know_is_an_error(small: dict[str, Any], tmp_path: Path) -> None:
    chat = build_chat_model(OracleChatConfig(truth=write(tmp_path, small)))
    with pytest.raises(ValueError, match="'colour'"):
        chat.ask([Question(frame(60, 80), "Which colour?", asks="colour", image_id=7, box_xyxy=(10, 20, 30, 50))])


def test_a_truth_that_cannot_be_used_is_named(small: dict[str, Any], tmp_path: Path) -> None:
    def refused(truth: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            build_mask_generator(OracleMasksConfig(truth=truth), MaskGeneratorSettings())

    refused(str(tmp_path / "none.json"), r"truth .*none\.json: cannot be read: No such file")
    refused(write(tmp_path, []), r"truth .*truth\.json: not a COCO file")
    small["annotations"][0]["category_id"] = 4
    refused(write(tmp_path, small), "annotation 1 is of image 7 and category 4, which are not both in the file")
    small["annotations"][0] |= {"category_id": 3, "segmentation": []}
    refused(write(tmp_path, small), "annotation 1 has no segmentation")
    build_chat_model(OracleChatConfig(truth=write(tmp_path, small)))
