"""Boxes, masks and overlaps."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from mill_shared.geometry import (
    Rle,
    box_iou,
    decode_mask,
    encode_masks,
    mask_areas,
    mask_boxes,
    mask_intersections,
)

Masks = NDArray[np.bool_]


@st.composite
def stacks(draw: st.DrawFn) -> Masks:
    """Up to 6 masks; widths on both sides of the 64-pixel words; empty, full and noisy ones."""
    height, width = draw(st.integers(1, 9)), draw(st.sampled_from([1, 7, 63, 64, 65, 130]))
    seed, count = draw(st.integers(0, 10**6)), draw(st.integers(0, 6))
    rng = np.random.default_rng(seed)
    masks = rng.random((count, height, width)) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    for mask in masks:
        mask[:, int(rng.integers(0, width + 1)) :] = False
        mask[: int(rng.integers(0, height + 1))] = False
    return masks


@given(stacks())
@settings(max_examples=60, deadline=None)
def test_run_length_codes_give_the_masks_back(masks: Masks) -> None:
    codes = encode_masks(masks)
    assert [code.size for code in codes] == [masks.shape[1:]] * len(masks)
    for code, mask in zip(codes, masks, strict=True):
        assert np.array_equal(decode_mask(code), mask)


def test_a_run_length_code_is_what_coco_tools_read() -> None:
    mask = np.zeros((5, 7), bool)
    mask[1:3, 2:6] = True
    (code,) = encode_masks(mask[None])
    assert isinstance(code.counts, bytes)
    as_json: Any = {"size": [5, 7], "counts": code.counts.decode("ascii")}
    assert int(coco_mask.area(as_json)) == 8
    assert coco_mask.toBbox(as_json).tolist() == [2, 1, 4, 2]


@pytest.mark.parametrize("count", [0, 1, 255, 256, 600])
def test_areas_of_any_number_of_codes(count: int) -> None:
    """pycocotools alone overflows from 256 codes on. Source: specs performance.md 3.1."""
    masks = np.arange(4 * 5).reshape(4, 5) < (np.arange(count) % 21)[:, None, None]
    assert mask_areas(encode_masks(masks)).tolist() == [index % 21 for index in range(count)]


@given(stacks())
@settings(max_examples=60, deadline=None)
def test_boxes_are_tight_and_half_open(masks: Masks) -> None:
    boxes = mask_boxes(masks)
    assert boxes.shape == (len(masks), 4)
    assert boxes.dtype == np.float64
    for mask, box in zip(masks, boxes, strict=True):
        rows, columns = np.nonzero(mask)
        expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
        assert tuple(box) == expected


@given(stacks())
@settings(max_examples=100, deadline=None)
def test_intersections_are_counted_exactly(masks: Masks) -> None:
    found = mask_intersections(masks)
    flat = masks.reshape(len(masks), masks.shape[1] * masks.shape[2]).astype(np.int64)
    assert found.dtype == np.int64
    assert np.array_equal(found, flat @ flat.T)


BOXES = arrays(np.float64, st.tuples(st.integers(0, 5), st.just(4)), elements=st.integers(0, 12).map(float))


@given(BOXES, BOXES, st.data())
@settings(max_examples=100, deadline=None)
def test_box_overlap_is_that_of_coco(a: NDArray[np.float64], b: NDArray[np.float64], data: st.DataObject) -> None:
    a, b = np.hstack([a[:, :2], a[:, :2] + a[:, 2:]]), np.hstack([b[:, :2], b[:, :2] + b[:, 2:]])
    crowd = np.array(data.draw(st.lists(st.booleans(), min_size=len(b), max_size=len(b))), bool)
    found = box_iou(a, b, crowd)
    assert found.shape == (len(a), len(b))
    for i, (ax0, ay0, ax1, ay1) in enumerate(a):
        for j, (bx0, by0, bx1, by1) in enumerate(b):
            shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
            area = (ax1 - ax0) * (ay1 - ay0)
            whole = area if crowd[j] else area + (bx1 - bx0) * (by1 - by0) - shared
            assert found[i, j] == pytest.approx(shared / whole if whole else 0)


def test_boxes_that_touch_do_not_overlap() -> None:
    assert box_iou(np.array([[0.0, 0, 10, 10]]), np.array([[10.0, 0, 20, 10], [5, 0, 15, 10]])).tolist() == [[0, 1 / 3]]


def test_codes_compare_by_value() -> None:
    assert Rle((2, 3), b"06") == Rle((2, 3), b"06") != Rle((3, 2), b"06")
