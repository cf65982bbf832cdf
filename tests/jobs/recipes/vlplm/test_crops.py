"""Boxes, crops, features and prompts on the cases of the specification. Source: specs/vlplm.md 1.2 and 8.1 to 8.7."""

import hashlib

import numpy as np
import pytest

from mill_jobs.recipes.vlplm.crops import (
    are_large,
    clamped_sides,
    crop,
    mean_feature,
    probabilities,
    scale_boxes,
)
from mill_jobs.recipes.vlplm.label import prompt_name
from mill_jobs.trainer.templates import ensemble_prompts
from mill_shared.models.clip import crop_geometry

W, H = 640, 480
Box = tuple[float, float, float, float]


def scaled(box: Box, scale: float) -> list[float]:
    found: list[float] = scale_boxes(np.array([box], np.float64), scale, W, H)[0].tolist()
    return found


@pytest.mark.parametrize(
    ("box", "scale", "expected"),
    [
        ((10, 20, 50, 60), 1, [10, 20, 50, 60]),
        ((10, 20, 50, 60), 1.5, [0, 10, 60, 70]),
        ((-12.5, 30, 100.25, 700), 1, [0, 30, 100.25, 480]),
        ((0, 30, 100.25, 480), 1.5, [0, 0, 125.3125, 480]),
        ((600, 400, 639.5, 479), 1.5, [590.125, 380.25, 640, 480]),
        ((0, 0, 100, 50), 1.5, [0, 0, 125, 62.5]),
        ((700, 10, 800, 50), 1, [700, 10, 640, 50]),
    ],
)
def test_boxes_grow_around_their_centres_and_end_at_the_picture(box: Box, scale: float, expected: list[float]) -> None:
    assert scaled(box, scale) == expected


def test_the_way_through_the_centre_may_change_the_last_bit() -> None:
    changed = [x / 10 for x in range(100, 140) if scaled((x / 10, 0, 50.3, 60), 1)[0] != x / 10]
    assert changed, "the original's arithmetic is kept, not an identity"


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((0, 0, 5, 5), True), ((0, 0, 4.999, 50), False), ((-3, 0, 5, 50), True), ((635, 0, 660, 50), True),
        ((635.5, 0, 660, 50), False), ((700, 10, 800, 50), False),
    ],
)  # fmt: skip
def test_short_boxes_are_left_out_after_clamping(box: Box, kept: bool) -> None:
    assert are_large(scale_boxes(np.array([box], np.float64), 1, W, H), 5).tolist() == [kept]


def test_clamped_sides_are_remembered() -> None:
    boxes = np.array([(10, 20, 50, 60), (-1, 20, 50, 60), (-1, -1, 641, 481), (0, 0, 640, 480)], np.float64)
    assert clamped_sides(boxes, W, H).tolist() == [0, 0b0001, 0b1111, 0]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.5, 0.5, 10.5, 10.5), (0, 0, 10, 10)), ((1.5, 2.5, 11.5, 12.5), (2, 2, 12, 12)),
        ((10.49, 10.51, 20.5, 21.5), (10, 11, 20, 22)),
    ],
)  # fmt: skip
def test_crops_are_rounded_half_to_even(box: Box, expected: tuple[int, int, int, int]) -> None:
    y, x = np.mgrid[:40, :40].astype(np.uint8)
    found = crop(np.stack([x, y, x], axis=2), np.array(box), square=False)
    assert (*found[0, 0, :2].tolist(), *(found[-1, -1, :2] + 1).tolist()) == expected


def test_a_square_crop_keeps_everything_in_the_middle_of_the_mean_colour() -> None:
    picture = np.full((50, 50, 3), 255, np.uint8)
    found = crop(picture, np.array([0.0, 10.0, 40.0, 20.0]), square=True)
    assert found.shape == (40, 40, 3)
    assert (found[15:25] == 255).all()
    assert found[0, 0].tolist() == [122, 116, 104]


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (100, 50, (448, 224, 112, 0)), (50, 100, (224, 448, 0, 112)), (97, 31, (700, 224, 238, 0)),
        (33, 7, (1056, 224, 416, 0)), (640, 427, (335, 224, 56, 0)),
    ],
)  # fmt: skip
def test_clip_sees_the_central_square(width: int, height: int, expected: tuple[int, int, int, int]) -> None:
    assert crop_geometry(width, height, 224) == expected


def test_each_scale_counts_alike() -> None:
    found = mean_feature(np.array([[[3, 4, 0], [0, 5, 0]]], np.float32))
    assert found[0].tolist() == pytest.approx([0.316228, 0.948683, 0], rel=1e-4)


def test_softmax_over_cosines() -> None:
    texts = np.zeros((3, 4), np.float32)
    texts[:, 0] = 0.28, 0.25, 0.22
    texts[:, 1:] = np.diag(np.sqrt(1 - texts[:, 0] ** 2))
    feature = np.array([[1, 0, 0, 0]], np.float32)
    found = probabilities(feature, texts, 0.01, half=False)
    assert found[0].tolist() == pytest.approx([0.950330, 0.047314, 0.002356], rel=1e-3)


def test_half_precision_saturates_at_one_and_float32_does_not() -> None:
    texts = np.array([[1, 0], [0.9, np.sqrt(1 - 0.81)]], np.float32)
    feature = np.array([[1, 0]], np.float32)
    assert probabilities(feature, texts, 0.01, half=True)[0, 0] == 1.0
    exact = probabilities(feature, texts, 0.01, half=False)[0, 0]
    assert 0.9999 < exact < 1.0


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("umbrella", "bad6eae4b6d39eb8e19db835c27a46d915828b99b2df4527beafd8e7988c3783"),
        ("cow", "9a5f344b2bb518533810d47168120a84eb316a118693356b1b76a89ce821d17c"),
    ],
)
def test_prompts(name: str, digest: str) -> None:
    assert hashlib.sha256("\n".join(ensemble_prompts(prompt_name(name))).encode()).hexdigest() == digest


def test_names_of_lvis_are_words() -> None:
    assert "a photo of a bath towel." in ensemble_prompts(prompt_name("bath_towel"))
