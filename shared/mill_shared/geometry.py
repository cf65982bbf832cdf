"""Boxes, masks, run-length codes and overlaps, in numpy. Pixels, x right, y down; boxes are half-open."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask


@dataclass(frozen=True)
class Rle:
    """A mask in COCO's compressed run-length form."""

    size: tuple[int, int]
    """Height, width."""
    counts: bytes


def encode_masks(masks: NDArray[np.bool_]) -> list[Rle]:
    """Return the run-length codes of (N, H, W) masks."""
    found = []
    for mask in masks:
        code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        found.append(Rle((int(code["size"][0]), int(code["size"][1])), _bytes(code["counts"])))
    return found


def _bytes(counts: str | bytes) -> bytes:
    return counts.encode() if isinstance(counts, str) else counts


def decode_mask(rle: Rle) -> NDArray[np.bool_]:
    """Return the (H, W) mask of a run-length code."""
    return np.asarray(coco_mask.decode({"size": list(rle.size), "counts": rle.counts}), dtype=bool)


def mask_boxes(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the tightest half-open boxes of (N, H, W) masks as (N, 4) xyxy; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4))
    for box, mask in zip(boxes, masks, strict=True):
        rows = np.flatnonzero(mask.any(axis=1))
        if len(rows):
            columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def box_iou(
    a_xyxy: NDArray[np.float64], b_xyxy: NDArray[np.float64], crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return the overlaps of boxes.

    Args:
        a_xyxy: (N, 4).
        b_xyxy: (M, 4).
        crowd: (M,); against a crowd the overlap is the share of a that lies in it, as COCO counts.

    Returns:
        (N, M) intersection over union; 0 where both boxes are empty.
    """
    low = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=2)
    a_area = np.clip(a_xyxy[:, 2:] - a_xyxy[:, :2], 0, None).prod(axis=1)[:, None]
    b_area = np.clip(b_xyxy[:, 2:] - b_xyxy[:, :2], 0, None).prod(axis=1)[None]
    whole = a_area + b_area - intersection
    if crowd is not None:
        whole = np.where(crowd[None], a_area, whole)
    found: NDArray[np.float64] = np.divide(intersection, whole, out=np.zeros_like(intersection), where=whole > 0)
    return found


def mask_intersections(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the (N, N) numbers of pixels that (N, H, W) masks share; the diagonal holds the areas.

    Rows are packed to bits, and only pairs whose boxes overlap are counted, inside the smaller box's rows and words.
    Memory: N x H x W / 8 bytes beside the masks, and as much again for a mask that meets all others.
    """
    count, height, width = masks.shape
    words = -(-width // 64)
    packed = np.zeros((count, height, words * 8), np.uint8)
    packed[..., : -(-width // 8)] = np.packbits(masks, axis=2)
    bits = packed.view(np.uint64)
    boxes = mask_boxes(masks).astype(np.int64)
    by_size = np.argsort((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")
    found = np.zeros((count, count), np.int64)
    for rank, i in enumerate(by_size):
        x0, y0, x1, y1 = boxes[i]
        window = (slice(y0, y1), slice(x0 // 64, -(-x1 // 64)))
        others = by_size[rank:]
        left, top, right, bottom = boxes[others].T
        near = others[(left < x1) & (right > x0) & (top < y1) & (bottom > y0)]
        shared = np.bitwise_count(bits[(near, *window)] & bits[(i, *window)]).sum(axis=(1, 2), dtype=np.int64)
        found[i, near] = found[near, i] = shared
    return found


def mask_areas(rles: Sequence[Rle]) -> NDArray[np.int64]:
    """Return the pixels of each mask."""
    codes: list[Any] = [{"size": list(rle.size), "counts": rle.counts} for rle in rles]
    # pycocotools overflows on 256 and more at once under numpy 2.
    parts = [coco_mask.area(codes[start : start + 255]) for start in range(0, len(codes), 255)]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
