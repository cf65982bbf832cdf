"""Parity with the original's mask suppression, and equality to a slow pairwise reading of the rules.

Source of expected values: specs/cotpl.md 8.1. N13 and N16 differ on purpose: there the original raises.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mill_jobs.recipes.cotpl.masks import Suppression, suppress_masks

Rectangle = tuple[int, int, int, int]
"""x, y, w, h in pixels, on a 40 x 40 canvas."""
Mask = tuple[str, list[Rectangle], float, float]
"""Name, rectangles, predicted IoU, stability."""

BIG, PART, OTHER = [(0, 0, 20, 20)], [(2, 2, 10, 10)], [(25, 25, 10, 10)]
MOST_OF_85 = [(0, 0, 17, 5), (30, 30, 5, 3)]
MOST_OF_84 = [(0, 0, 20, 4), (0, 4, 4, 1), (30, 30, 4, 4)]
COLUMNS = [[(x, 0, 5, 5)] for x in (0, 10, 20, 30)]

CASES: dict[str, tuple[list[Mask], str]] = {
    "N1": (
        [("a", [(0, 0, 10, 10)], 0.8, 0.9), ("b", [(20, 20, 10, 10)], 0.95, 0.99), ("c", [(0, 20, 10, 10)], 0.9, 0.95)],
        "bca",
    ),
    "N2": ([("h", [(0, 0, 10, 10)], 0.95, 0.99), ("l", [(0, 0, 10, 8)], 0.9, 0.99)], "hl"),
    "N3": ([("h", [(0, 0, 10, 10)], 0.95, 0.99), ("l", [(0, 0, 9, 9)], 0.9, 0.99)], "h"),
    "N4": ([("h", [(0, 0, 10, 10)], 0.9, 0.99), ("l", [(0, 0, 9, 9)], 0.95, 0.99)], "l"),
    "N5": ([("b", BIG, 0.95, 0.99), ("p", PART, 0.9, 0.99)], "b"),
    "N6": ([("b", BIG, 0.9, 0.99), ("p", PART, 0.95, 0.99)], "b"),
    "N7": ([("b", BIG, 0.9, 0.99), ("p", [(0, 0, 10, 20)], 0.95, 0.99)], "pb"),
    "N8": ([("b", BIG, 0.9, 0.99), ("p", [(0, 0, 10, 19), (0, 19, 9, 1)], 0.95, 0.99)], "b"),
    "N9": ([("b", BIG, 0.9, 0.99), ("p", MOST_OF_85, 0.95, 0.99)], "b"),
    "N10": ([("b", BIG, 0.9, 0.99), ("p", MOST_OF_84, 0.95, 0.99)], "pb"),
    "N11": ([("b", BIG, 0.7, 0.9), ("p", PART, 0.95, 0.99), ("o", OTHER, 0.9, 0.9)], "o"),
    "N12": ([("b", BIG, 0.7, 0.9), ("p", PART, 0.95, 0.99), ("o", OTHER, 0.75, 0.9)], "pob"),
    "N13": ([("b", BIG, 0.7, 0.9), ("p", PART, 0.95, 0.99)], "pb"),
    "N14": (
        [("a", [(0, 0, 20, 10)], 0.99, 0.99), ("b", [(2, 0, 20, 10)], 0.98, 0.99), ("c", [(4, 0, 20, 10)], 0.97, 0.99)],
        "a",
    ),
    "N15": (
        [(name, column, iou, 0.86) for name, column, iou in zip("abcd", COLUMNS, (0.7, 0.74, 0.72, 0.73), strict=True)],
        "bdc",
    ),
    "N16": ([("a", [(0, 0, 10, 10)], 0.7, 0.86)], "a"),
    "N17": (
        [("l", [(0, 0, 30, 30)], 0.9, 0.95), ("m", BIG, 0.92, 0.95), ("s", [(0, 0, 10, 10)], 0.94, 0.95)],
        "l",
    ),
    "N18": ([("a", [(0, 0, 10, 10)], 1.0, 0.7), ("b", [(20, 20, 10, 10)], 1.0, 0.71)], "b"),
    "N19": ([], ""),
}


def draw(rectangles: list[Rectangle], side: int = 40) -> NDArray[np.bool_]:
    mask = np.zeros((side, side), bool)
    for x, y, w, h in rectangles:
        mask[y : y + h, x : x + w] = True
    return mask


def suppress(masks: list[Mask]) -> Suppression:
    drawn = [draw(rectangles) for _, rectangles, _, _ in masks]
    return suppress_masks(
        np.stack(drawn) if drawn else np.zeros((0, 40, 40), bool),
        np.array([iou for _, _, iou, _ in masks], np.float32),
        np.array([stability for _, _, _, stability in masks], np.float32),
    )


def reasons(case: str) -> dict[str, str]:
    masks, _ = CASES[case]
    return {masks[index][0]: reason for index, reason in suppress(masks).dropped}


@pytest.mark.parametrize("case", CASES)
def test_parity(case: str) -> None:
    masks, expected = CASES[case]
    found = suppress(masks)
    assert "".join(masks[index][0] for index in found.kept) == expected
    assert sorted([*found.kept, *(index for index, _ in found.dropped)]) == list(range(len(masks)))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("N3", {"l": "duplicate"}),
        ("N5", {"p": "inner"}),
        ("N11", {"b": "low_score", "p": "inner"}),
        ("N14", {"b": "duplicate", "c": "duplicate"}),
        ("N15", {"a": "low_score"}),
        ("N18", {"a": "low_score"}),
    ],
)
def test_a_dropped_mask_says_why(case: str, expected: dict[str, str]) -> None:
    assert reasons(case) == expected


def test_the_first_rule_that_applies_is_named() -> None:
    big, twin = ("b", BIG, 0.95, 0.99), ("t", PART, 0.9, 0.99)
    weak_duplicate_part = ("w", PART, 0.5, 0.9)
    duplicate_part = ("d", PART, 0.8, 0.9)
    assert dict(suppress([big, twin, weak_duplicate_part]).dropped) == {1: "inner", 2: "low_score"}
    assert dict(suppress([big, twin, duplicate_part]).dropped) == {1: "inner", 2: "duplicate"}


@pytest.mark.parametrize(
    ("case", "is_fallback", "reference_drops"),
    [
        ("N1", False, False),
        ("N12", True, False),
        ("N13", True, True),
        ("N15", True, False),
        ("N16", True, True),
        ("N19", False, False),
    ],
)
def test_the_fallback_is_told(case: str, is_fallback: bool, reference_drops: bool) -> None:
    found = suppress(CASES[case][0])
    assert (found.is_fallback, found.reference_drops) == (is_fallback, reference_drops)


def test_equal_scores_keep_the_given_order() -> None:
    found = suppress([(str(x), [(x, 0, 5, 5)], 0.9, 0.9) for x in (30, 0, 20, 10)])
    assert found.kept == (0, 1, 2, 3)


def test_of_two_empty_masks_one_stays() -> None:
    """Source: specs/cotpl.md 1.4: their IoU is no number, which drops the lower one."""
    found = suppress([("a", [], 0.9, 0.9), ("b", [], 0.95, 0.9), ("c", PART, 0.99, 0.99)])
    assert (found.kept, found.dropped) == ((2, 1), ((0, "duplicate"),))


def literal(
    masks: NDArray[np.bool_],
    ious: NDArray[np.float32],
    stabilities: NDArray[np.float32],
    iou_threshold: float = 0.8,
    score_threshold: float = 0.7,
    inner_threshold: float = 0.5,
) -> tuple[int, ...]:
    """The rules, pair by pair, as they are written in specs/cotpl.md 1.4."""
    scores = [float(iou) * float(stability) for iou, stability in zip(ious, stabilities, strict=True)]
    ranked = sorted(range(len(masks)), key=lambda index: -scores[index])
    passed = []
    for rank, index in enumerate(ranked):
        is_kept = scores[index] > score_threshold
        for other_rank, other in enumerate(ranked):
            if other == index:
                continue
            shared = np.float32((masks[index] & masks[other]).sum())
            area, other_area = np.float32(masks[index].sum()), np.float32(masks[other].sum())
            union = np.float32((masks[index] | masks[other]).sum())
            if other_rank < rank and (union == 0 or shared / union > np.float32(iou_threshold)):
                is_kept = False
            if area and other_area and shared / area >= np.float32(0.85) and shared / other_area < np.float32(0.5):
                value = np.float32(1) - (shared / area) * (shared / other_area)
                if value > np.float32(1 - inner_threshold):
                    is_kept = False
        if is_kept:
            passed.append(index)
    return tuple(passed or ranked[:3])


@st.composite
def mask_sets(draw_value: st.DrawFn) -> list[Mask]:
    """Few positions, sizes and scores, so that containment, equality and ties are common."""
    edge, side = st.sampled_from([0, 2, 4, 10, 63]), st.sampled_from([0, 1, 4, 8, 10, 20, 66])
    score = st.sampled_from([0.7, 0.75, 0.85, 0.9, 0.99, 1.0])
    rectangle = st.tuples(edge, edge, side, side)
    one = st.tuples(st.just("m"), st.lists(rectangle, min_size=1, max_size=2), score, score)
    return draw_value(st.lists(one, max_size=8))


@settings(max_examples=150, deadline=None)
@given(mask_sets(), st.sampled_from([0.8, 0.7]), st.sampled_from([0.7, 0.1]), st.sampled_from([0.5, 0.2, 0.7]))
def test_equals_the_pairwise_rules(masks: list[Mask], iou: float, score: float, inner: float) -> None:
    drawn = np.stack([draw(item[1], 130) for item in masks]) if masks else np.zeros((0, 130, 130), bool)
    ious = np.array([item[2] for item in masks], np.float32)
    stabilities = np.array([item[3] for item in masks], np.float32)
    found = suppress_masks(drawn, ious, stabilities, iou_threshold=iou, score_threshold=score, inner_threshold=inner)
    assert found.kept == literal(drawn, ious, stabilities, iou, score, inner)
