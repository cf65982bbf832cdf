"""Stage 2 on arrays, in float64: fuse the scores of a box, and suppress repetitions. Source: specs/vlplm.md 1.3."""

import numpy as np
from numpy.typing import NDArray

from mill_shared.geometry import box_iou


def fuse(objectness: NDArray[np.float64], clip: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """Return the score of each box: objectness with this weight, CLIP's probability with the rest.

    Source: specs/vlplm.md 0; the original's flag is `--lamda`. MarvelOVD takes weight 0.
    """
    if weight == 0:
        return clip
    return weight * objectness + (1 - weight) * clip


def suppress(
    boxes_xyxy: NDArray[np.float64], scores: NDArray[np.float64], classes: NDArray[np.int64], iou_threshold: float
) -> NDArray[np.int64]:
    """Return the boxes that no better box of their class overlaps by more than the threshold.

    Source: specs/vlplm.md 1.3 step 4. An overlap of exactly the threshold is none.

    Args:
        boxes_xyxy: (N, 4).
        scores: (N,).
        classes: (N,).
        iou_threshold: in [0, 1].

    Returns:
        (K,) indices, the best first over all classes; equal scores in the order given.
    """
    order = np.argsort(-scores, kind="stable")
    if len(order) < 2:
        return order
    beats = (box_iou(boxes_xyxy[order], boxes_xyxy[order]) > iou_threshold) & (
        classes[order][:, None] == classes[order]
    )
    alive = np.ones(len(order), bool)
    for place in range(len(order)):
        if alive[place]:
            alive[place + 1 :] &= ~beats[place, place + 1 :]
    return order[alive]
