"""Named class lists. Their one home."""

from collections.abc import Sequence
from typing import Literal

COCO_80 = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 classes of COCO in the order of their ids. Source: specs/cotpl.md 4."""

OV_COCO_48 = (
    "person", "bicycle", "car", "motorcycle", "train", "truck", "boat", "bench", "bird", "horse", "sheep", "bear",
    "zebra", "giraffe", "backpack", "handbag", "suitcase", "frisbee", "skis", "kite", "surfboard", "bottle", "fork",
    "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "pizza", "donut", "chair", "bed",
    "toilet", "tv", "laptop", "mouse", "remote", "microwave", "oven", "toaster", "refrigerator", "book", "clock",
    "vase", "toothbrush",
)  # fmt: skip
"""The 48 base classes of the open-vocabulary COCO benchmark. Source: specs/cotpl.md 4."""

OV_COCO_17 = (
    "umbrella", "cow", "cup", "bus", "keyboard", "skateboard", "dog", "couch", "tie", "snowboard", "sink", "elephant",
    "cake", "scissors", "airplane", "cat", "knife",
)  # fmt: skip
"""The 17 novel classes of the same benchmark, in the order of VL-PLM's softmax. Source: specs/vlplm.md 1."""


def taxonomy_names(taxonomy: Sequence[str] | Literal["coco-80"]) -> tuple[str, ...]:
    """Return the names of a taxonomy, in order."""
    return COCO_80 if taxonomy == "coco-80" else tuple(taxonomy)


def base_class_names(base_classes: Sequence[str] | Literal["ov-coco-48"]) -> tuple[str, ...]:
    """Return the names of the base classes."""
    return OV_COCO_48 if base_classes == "ov-coco-48" else tuple(base_classes)


def target_names(targets: Sequence[str] | Literal["ov-coco-17"]) -> tuple[str, ...]:
    """Return the names of the classes that are looked for, in order."""
    return OV_COCO_17 if targets == "ov-coco-17" else tuple(targets)
