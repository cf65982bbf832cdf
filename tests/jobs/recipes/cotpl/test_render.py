"""Parity with the original's region pictures. Source of expected values: specs/cotpl.md 1.5 and 8.3, tolerance 1."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mill_jobs.recipes.cotpl.render import boost_colours, render_region

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
