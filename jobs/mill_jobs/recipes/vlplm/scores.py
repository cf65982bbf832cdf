"""Stage 2 on arrays, in float64: fuse the scores of a box, and suppress repetitions. Source: specs/vlplm.md 1.3."""

import numpy as np
from numpy.typing import NDArray


def fuse(objectness: NDArray[np.float64], clip: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """Return the score of each box: objectness with this weight, CLIP's probability with the rest.

    Source: specs/vlplm.md 0; the original's flag is `--lamda`. MarvelOVD takes weight 0.
    """
    if weight == 0:
        return clip
    return weight * objectness + (1 - weight) * clip


def suppress(
    boxes_xyxy: NDArray[np.float64], scores: NDArray[np.float64], groups: NDArray[np.int64], iou_threshold: float
) -> NDArray[np.bool_]:
    """Return which boxes no better box of their group, itself standing, overlaps by more than the threshold.

    Source: specs/vlplm.md 1.3 step 4. An overlap of exactly the threshold is none; of equal scores the first is better.
    All groups are worked off side by side: first the second best of each, then the third best, and so on.

    Args:
        boxes_xyxy: (N, 4).
        scores: (N,).
        groups: (N,), e.g. a number for each class of each image.
        iou_threshold: in [0, 1].

    Returns:
        (N,).
    """
    order = np.lexsort((-scores, groups))
    x0, y0, x1, y1 = boxes_xyxy[order].T
    areas = (x1 - x0) * (y1 - y0)
    ordered = groups[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    standing = np.ones(len(order), bool)
    by_rank = np.argsort(rank, kind="stable")
    ends = np.cumsum(np.bincount(rank))
    for place in range(1, len(ends)):
        these = by_rank[ends[place - 1] : ends[place]]
        for back in range(1, place + 1):
            better = these - back
            width = np.minimum(x1[these], x1[better]) - np.maximum(x0[these], x0[better])
            height = np.minimum(y1[these], y1[better]) - np.maximum(y0[these], y0[better])
            shared = np.maximum(width, 0) * np.maximum(height, 0)
            whole = areas[better] + areas[these] - shared
            overlap = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
            falls = standing[better] & (overlap > iou_threshold)
            standing[these[falls]] = False
            these = these[~falls]
    found = np.empty(len(order), bool)
    found[order] = standing
    return found
