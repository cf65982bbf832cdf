"""Mask suppression. Source: specs/cotpl.md 1.4; every rule looks at all masks, also at ones that are dropped."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mill_shared.geometry import mask_intersections

INSIDE_SHARE = 0.85
"""A part lies inside a larger mask from this share of its pixels on. Source: 1.4, inner rule."""
COVERED_SHARE = 0.5
"""A part covers less than this share of the larger mask. Source: 1.4, inner rule."""
FALLBACK_MASKS = 3
"""Best-scoring masks kept where no mask passes the rules. Source: 1.4, fallback."""


@dataclass(frozen=True)
class Suppression:
    """What the rules kept and dropped; indices into the masks that were given."""

    kept: tuple[int, ...]
    """In descending order of score."""
    dropped: tuple[tuple[int, str], ...]
    """(index, reason); reason is the first that applies of low_score, duplicate, inner."""
    is_fallback: bool = False
    """No mask passed the rules; the best were kept."""

    @property
    def reference_drops(self) -> bool:
        """True where the original raises and loses the image: a fallback with fewer than three masks."""
        return self.is_fallback and len(self.kept) + len(self.dropped) < FALLBACK_MASKS


def suppress_masks(
    masks: NDArray[np.bool_],
    predicted_ious: NDArray[np.float32],
    stabilities: NDArray[np.float32],
    *,
    iou_threshold: float = 0.8,
    score_threshold: float = 0.7,
    inner_threshold: float = 0.5,
) -> Suppression:
    """Drop duplicates, weak masks, and parts of larger masks.

    Args:
        masks: (N, H, W), image frame.
        predicted_ious: (N,).
        stabilities: (N,).
        iou_threshold: a mask is dropped above this IoU with any better one.
        score_threshold: a mask is kept only above this stability x predicted IoU.
        inner_threshold: a part is dropped where 1 - (share inside)(share covered) exceeds 1 minus this.

    Returns:
        The kept masks by descending score, ties in the order given; with nothing kept, the three best.
    """
    scores = predicted_ious.astype(np.float64) * stabilities.astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    if not len(order):
        return Suppression((), ())
    shared = mask_intersections(masks)[np.ix_(order, order)].astype(np.float32)
    areas = shared.diagonal()
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = shared / (areas[:, None] + areas[None, :] - shared)
        share_of_row = shared / areas[:, None]
        share_of_column = shared / areas[None, :]
    # An IoU of two empty masks is no number and counts as a duplicate, as in the original.
    duplicate = np.triu(~(iou <= np.float32(iou_threshold)), 1).any(axis=0)
    contains = (share_of_row < np.float32(COVERED_SHARE)) & (share_of_column >= np.float32(INSIDE_SHARE))
    values = np.where(contains, np.float32(1) - share_of_column * share_of_row, np.float32(0))
    np.fill_diagonal(values, 0)
    inner = values.max(axis=0) > np.float32(1 - inner_threshold)
    weak = ~(scores[order] > score_threshold)
    passed = ~(weak | duplicate | inner)
    is_fallback = not passed.any()
    if is_fallback:
        passed[:FALLBACK_MASKS] = True
    reasons = np.where(weak, "low_score", np.where(duplicate, "duplicate", "inner"))
    return Suppression(
        kept=tuple(int(index) for index in order[passed]),
        dropped=tuple(
            (int(index), str(reason)) for index, reason in zip(order[~passed], reasons[~passed], strict=True)
        ),
        is_fallback=is_fallback,
    )
