"""Fusion, threshold and suppression on the cases of the specification. Source: specs/vlplm.md 8.8 and 8.9."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mill_jobs.recipes.vlplm.scores import fuse, suppress
from mill_shared.geometry import box_iou


@pytest.mark.parametrize(
    ("objectness", "clip", "weight", "score", "kept"),
    [
        (0.9, 0.7, 0.5, 0.8, False),
        (0.9, 0.70001, 0.5, 0.800005, True),
        (0.6, 1.0, 0.5, 0.8, False),
        (0.62, 0.98, 0.5, 0.8, False),
        (0.95, 0.65, 0.5, 0.8, False),
        (0.99, 0.99, 0.5, 0.99, True),
        (0.9, 0.7, 0.3, 0.76, False),
        (0.9, 0.7, 0.0, 0.7, False),
    ],
)
def test_fused_scores(objectness: float, clip: float, weight: float, score: float, kept: bool) -> None:
    found = fuse(np.array([objectness]), np.array([clip]), weight)
    assert found[0] == pytest.approx(score, abs=1e-12)
    assert bool(found[0] > 0.8) == kept


def test_suppression_is_per_class_and_spares_an_overlap_of_exactly_the_threshold() -> None:
    boxes = np.array(
        [
            (0, 0, 10, 10), (0, 0, 10, 6), (0, 0, 10, 6.0001), (0, 0, 10, 7), (20, 20, 40, 40), (21, 21, 41, 41),
        ],
        np.float64,
    )  # fmt: skip
    scores = np.array([0.95, 0.90, 0.89, 0.88, 0.85, 0.99])
    classes = np.array([28, 28, 28, 21, 47, 47])
    assert np.flatnonzero(suppress(boxes, scores, classes, 0.6)).tolist() == [0, 1, 3, 5]


def test_a_suppressed_box_suppresses_nothing() -> None:
    boxes = np.array([(0, 0, 10, 10), (3, 0, 13, 10), (6, 0, 16, 10)], np.float64)
    assert suppress(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, np.int64), 0.5).tolist() == [True, False, True]


def test_of_equal_scores_the_first_stands_and_nothing_gives_nothing() -> None:
    same = np.array([(0, 0, 5, 5), (0, 0, 5, 5), (0, 0, 5, 5)], np.float64)
    assert suppress(same, np.array([0.5, 0.5, 0.5]), np.zeros(3, np.int64), 0.6).tolist() == [True, False, False]
    assert suppress(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), 0.6).tolist() == []


@given(st.integers(0, 10_000))
def test_many_groups_at_once_are_as_each_by_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 60))
    low = rng.integers(0, 12, (count, 2)).astype(np.float64)
    boxes = np.concatenate([low, low + rng.integers(0, 12, (count, 2))], axis=1)
    scores, groups = rng.integers(0, 5, count) / 4, rng.integers(0, 4, count)
    found = suppress(boxes, scores, groups, 0.5)
    for group in range(4):
        mine = np.flatnonzero(groups == group)
        kept: list[int] = []
        for index in sorted(mine.tolist(), key=lambda index: (-scores[index], index)):
            if not (box_iou(boxes[[index]], boxes[kept]) > 0.5).any():
                kept.append(index)
        assert sorted(kept) == mine[found[mine]].tolist()
