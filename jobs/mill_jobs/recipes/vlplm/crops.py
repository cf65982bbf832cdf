"""From boxes to crops, and from features to probabilities. Source: specs/vlplm.md 1.1, steps G to K."""

import numpy as np
from numpy.typing import NDArray

MEAN_COLOUR = (122, 116, 104)
"""What CLIP takes for nothing: its mean, in whole numbers. Source: specs/vlplm.md 1.1 step H."""


def scale_boxes(boxes_xyxy: NDArray[np.float64], scale: float, width: int, height: int) -> NDArray[np.float64]:
    """Return boxes grown around their centres and clamped to the picture, in the original's order of operations.

    Source: specs/vlplm.md 1.1 step G. The way through the centre may change the last bit even at scale 1.

    Args:
        boxes_xyxy: (N, 4).
        scale: factor of both sides.
        width: of the picture.
        height: of the picture.
    """
    x0, y0, x1, y1 = boxes_xyxy.T
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    w, h = (x1 - x0) * scale, (y1 - y0) * scale
    return np.stack(
        [
            np.maximum(cx - w / 2, 0), np.maximum(cy - h / 2, 0), np.minimum(cx + w / 2, width),
            np.minimum(cy + h / 2, height),
        ],
        axis=1,
    )  # fmt: skip


def clamped_sides(boxes_xyxy: NDArray[np.float64], width: int, height: int) -> NDArray[np.int64]:
    """Return which sides reach out of the picture, bit i for side i: the original writes these as integers.

    Source: specs/vlplm.md 1.1 step G.
    """
    x0, y0, x1, y1 = boxes_xyxy.T
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    w, h = x1 - x0, y1 - y0
    out = [cx - w / 2 < 0, cy - h / 2 < 0, cx + w / 2 > width, cy + h / 2 > height]
    found: NDArray[np.int64] = np.stack(out, axis=1) @ (1 << np.arange(4))
    return found


def are_large(boxes_xyxy: NDArray[np.float64], min_side_px: float) -> NDArray[np.bool_]:
    """Return which boxes have both sides this long. Source: specs/vlplm.md 1.1 step G."""
    return np.asarray((boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= min_side_px).all(axis=1), np.bool_)


def crop(image_rgb: NDArray[np.uint8], box_xyxy: NDArray[np.float64], *, square: bool) -> NDArray[np.uint8]:
    """Return the pixels of a box whose sides are rounded half to even. Source: specs/vlplm.md 1.1 step H and 8.2.

    Args:
        image_rgb: (H, W, 3).
        box_xyxy: (4,), inside the picture.
        square: pad the shorter side with the mean colour, so that nothing of a long box is cut off later.
    """
    x0, y0, x1, y1 = np.rint(box_xyxy).astype(int).tolist()
    found = image_rgb[y0:y1, x0:x1]
    height, width = found.shape[:2]
    if not square or height == width:
        return found
    side = max(height, width)
    padded = np.empty((side, side, 3), np.uint8)
    padded[:] = MEAN_COLOUR
    top, left = (side - height) // 2, (side - width) // 2
    padded[top : top + height, left : left + width] = found
    return padded


def unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return features of length 1 along the last axis."""
    found: NDArray[np.float32] = features / np.linalg.norm(features, axis=-1, keepdims=True)
    return found


def mean_feature(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean direction along the last axis but one: each feature counts alike. Source: steps I and J.

    Args:
        features: (..., K, D).

    Returns:
        (..., D), of length 1.
    """
    return unit(unit(features).mean(axis=-2))


def probabilities(
    features: NDArray[np.float32], texts: NDArray[np.float32], temperature: float, *, half: bool
) -> NDArray[np.float32]:  # fmt: skip
    """Return the softmax over cosines. Source: specs/vlplm.md 1.1 step K.

    Args:
        features: (N, D), of length 1.
        texts: (C, D), of length 1.
        temperature: divides the cosines.
        half: round features, logits and result to float16, as the original does on a GPU; then 1.0 is common.

    Returns:
        (N, C).
    """
    if half:
        features, texts = (values.astype(np.float16).astype(np.float32) for values in (features, texts))
    logits = features @ texts.T / np.float32(temperature)
    if half:
        logits = logits.astype(np.float16).astype(np.float32)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return found.astype(np.float16).astype(np.float32) if half else found
