"""Parity with the original's region pictures. Source of expected values: specs/cotpl.md 1.5 and 8.3, tolerance 1."""

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mill_jobs.recipes.base import Sample
from mill_jobs.recipes.cotpl.config import LabelConfig
from mill_jobs.recipes.cotpl.label import CotplLabeller
from mill_jobs.recipes.cotpl.render import boost_colours, render_region
from mill_shared.models.config import OracleChatConfig, OracleMasksConfig
from mill_shared.models.protocols import Answer, Masks, Question

Bgr = tuple[int, int, int]
Rgb = NDArray[np.uint8]


def literal(image_bgr: Rgb, mask: NDArray[np.bool_], bbox_xywh: tuple[int, int, int, int]) -> Rgb:
    """One region after specs/cotpl.md 1.5, steps 2 to 6, with nothing shared between regions. Returns RGB."""
    x, y, w, h = bbox_xywh
    canvas = np.zeros_like(image_bgr)
    grey = cv2.cvtColor(image_bgr[y : y + h, x : x + w], cv2.COLOR_BGR2GRAY)
    canvas[y : y + h, x : x + w] = cv2.cvtColor(cv2.GaussianBlur(grey, (31, 31), 0), cv2.COLOR_GRAY2BGR)
    hsv = cv2.cvtColor(image_bgr, cv2.COLOR_BGR2HSV).astype(np.float64)
    hsv[..., 1] = np.clip(hsv[..., 1] * 1.5, 0, 255)
    hsv[..., 2] = np.clip(hsv[..., 2] * 1.2, 0, 255)
    boosted = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR)
    canvas[mask] = boosted[mask]
    cv2.rectangle(canvas, (x, y), (x + w, y + h), (0, 255, 0), 2)
    return np.asarray(cv2.cvtColor(canvas, cv2.COLOR_BGR2RGB), np.uint8)


def largest_difference(a: Rgb, b: Rgb) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(
    ("bgr", "expected"),
    [
        ((100, 150, 200), (61, 151, 240)),
        ((10, 20, 30), (0, 18, 36)),
        ((200, 200, 200), (240, 240, 240)),
        ((0, 0, 255), (0, 0, 255)),
        ((250, 240, 230), (255, 240, 225)),
    ],
)
def test_colour_boost(bgr: Bgr, expected: Bgr) -> None:
    boosted = boost_colours(np.full((3, 4, 3), bgr[::-1], np.uint8))
    assert largest_difference(boosted, np.full((3, 4, 3), expected[::-1], np.uint8)) <= 1


def test_layout() -> None:
    """Source: specs/cotpl.md 8.3, layout."""
    rows, columns = np.mgrid[:140, :180]
    image = np.stack([(columns + rows) // 2, rows, columns], axis=2).astype(np.uint8)
    mask = np.zeros((140, 180), bool)
    mask[20:121, 40:151] = True
    mask[60:70] = False
    mask[:, 60:70] = False
    found = render_region(image, boost_colours(image), mask, (40, 20, 110, 100)).astype(int)

    green, black = [0, 255, 0], [0, 0, 0]
    assert np.abs(found[65, 65] - 65).max() <= 1
    assert np.abs(found[100, 100] - 120).max() <= 1
    for row in (19, 20, 21, 120, 121):
        assert found[row, 90].tolist() == green
    for column in (150, 151):
        assert found[90, column].tolist() == green
    for row, column in ((5, 5), (18, 90), (122, 90), (90, 152)):
        assert found[row, column].tolist() == black


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_literal_rendering(seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    image_bgr = np.asarray(cv2.resize(coarse, (240, 180), interpolation=cv2.INTER_CUBIC), np.uint8)
    image_rgb = np.ascontiguousarray(image_bgr[..., ::-1])
    boosted = boost_colours(image_rgb)
    for width, height in ((240, 180), (120, 100), (14, 9)):
        x, y = int(rng.integers(0, 241 - width)), int(rng.integers(0, 181 - height))
        mask = np.zeros((180, 240), bool)
        mask[y : y + height, x : x + width] = rng.random((height, width)) < 0.6
        mask[[y, y + height - 1], [x, x + width - 1]] = True
        bbox_xywh = (x, y, width - 1, height - 1)
        found = render_region(image_rgb, boosted, mask, bbox_xywh)
        assert largest_difference(found, literal(image_bgr, mask, bbox_xywh)) <= 1
        by_columns = np.asfortranarray(mask)  # as run-length codes are decoded
        assert np.array_equal(render_region(image_rgb, boosted, by_columns, bbox_xywh), found)


def test_every_level_is_boosted_as_in_full_precision() -> None:
    """The table of levels truncates as the original's arithmetic does, at every level of value."""
    greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    expected = np.clip(np.arange(256) * 1.2, 0, 255).astype(np.uint8)
    assert np.array_equal(boost_colours(greys), np.repeat(expected[None, :, None], 3, axis=2))


def test_the_picture_given_is_left_as_it_was() -> None:
    image = np.full((120, 120, 3), 77, np.uint8)
    mask = np.ones((120, 120), bool)
    render_region(image, boost_colours(image), mask, (0, 0, 119, 119))
    assert (image == 77).all()


class OneMask:
    """Finds the same rectangle in every picture."""

    def __init__(self, width: int, height: int) -> None:
        self.mask = np.zeros((1, 140, 180), bool)
        self.mask[0, :height, :width] = True

    def generate(self, image_rgb: Rgb, image_id: int) -> Masks:
        return Masks(self.mask, np.ones(1, np.float32), np.ones(1, np.float32))

    def halve_batch(self) -> bool:
        return False


class NothingThere:
    """Says No, and keeps the questions."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += questions
        return [Answer("No")] * len(questions)

    def halve_batch(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("profile", "size_px", "is_asked"),
    [
        # The original's width and height are one less than the pixels.
        ("reference", (101, 101), True),
        ("reference", (100, 102), False),
        ("reference", (126, 81), True),
        ("strict", (100, 100), True),
        ("strict", (99, 101), False),
        ("strict", (125, 80), True),
    ],
)
def test_size_filter(profile: Literal["strict", "reference"], size_px: tuple[int, int], is_asked: bool) -> None:
    """Source: specs/cotpl.md 8.3: 100 x 100 is kept, 99 x 101 skipped, 125 x 80 kept. Boxes of pixels are integers."""
    config = LabelConfig(profile=profile, masks=OracleMasksConfig(truth="-"), chat=OracleChatConfig(truth="-"))
    masks, chat = OneMask(*size_px), NothingThere()
    image = np.full((140, 180, 3), 90, np.uint8)
    sample = Sample(row=0, image_id=1, key="a.jpg", image_rgb=image, width=180, height=140, scale=1.0)
    (outcome,) = CotplLabeller(config, masks, chat).label([sample])

    less = 1 if profile == "reference" else 0
    box = (0.0, 0.0, float(size_px[0] - less), float(size_px[1] - less))
    if is_asked:
        assert [region.box_xyxy for region in outcome.record.regions] == [box]
        bbox_xywh = (0, 0, size_px[0] - 1, size_px[1] - 1)
        expected = render_region(image, boost_colours(image), masks.mask[0], bbox_xywh)
        assert [np.array_equal(question.picture_rgb, expected) for question in chat.asked] == [True]
    else:
        assert [(item.box_xyxy, item.reason) for item in outcome.record.dropped] == [(box, "small")]
        assert chat.asked == []
