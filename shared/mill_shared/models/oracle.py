"""Masks and answers from ground truth: for tests, and to measure what the pipeline itself loses."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from mill_shared.errors import ConfigError
from mill_shared.geometry import box_iou
from mill_shared.models.config import OracleChatConfig, OracleMasksConfig
from mill_shared.models.protocols import Answer, Masks, Question

SAME_IOU = 0.5
"""A region shows the truth instance that its box overlaps best, from this IoU on."""


class _Image(msgspec.Struct):
    id: int
    width: int
    height: int


class _Category(msgspec.Struct):
    id: int
    name: str


class _Instance(msgspec.Struct):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0
    segmentation: Any = None


class _Coco(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Instance]
    categories: list[_Category]


@dataclass(frozen=True)
class _Truth:
    sizes: dict[int, tuple[int, int]]
    """Image id -> height, width."""
    names: dict[int, str]
    instances: dict[int, list[_Instance]]


def _read(path: str) -> _Truth:
    try:
        found = msgspec.json.decode(Path(path).read_bytes(), type=_Coco)
    except OSError as error:
        raise ConfigError(f"truth {path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"truth {path}: not a COCO file: {error}") from error
    sizes = {image.id: (image.height, image.width) for image in found.images}
    names = {category.id: category.name for category in found.categories}
    instances: dict[int, list[_Instance]] = {}
    for instance in found.annotations:
        if instance.image_id not in sizes or instance.category_id not in names:
            raise ConfigError(
                f"truth {path}: annotation {instance.id} is of image {instance.image_id} and category "
                f"{instance.category_id}, which are not both in the file"
            )
        if not instance.iscrowd:
            instances.setdefault(instance.image_id, []).append(instance)
    return _Truth(sizes, names, instances)


class OracleMasks:
    """The truth's masks of an image, crowds left out, each with the best scores."""

    def __init__(self, config: OracleMasksConfig) -> None:
        self._truth = _read(config.truth)
        for instance in chain.from_iterable(self._truth.instances.values()):
            if not instance.segmentation:
                raise ConfigError(
                    f"truth {config.truth}: annotation {instance.id} has no segmentation to make a mask of"
                )

    def generate(self, image_rgb: NDArray[np.uint8], image_id: int) -> Masks:
        """Return the masks of the image's instances, scaled to the frame."""
        height, width = image_rgb.shape[:2]
        masks = []
        for instance in self._truth.instances.get(image_id, ()):
            mask = self._mask(instance)
            if mask.shape != (height, width):
                mask = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
            masks.append(mask)
        ones = np.ones(len(masks), np.float32)
        return Masks(np.stack(masks) if masks else np.zeros((0, height, width), bool), ones, ones.copy())

    def _mask(self, instance: _Instance) -> NDArray[np.bool_]:
        height, width = self._truth.sizes[instance.image_id]
        code = instance.segmentation
        if isinstance(code, list):
            code = coco_mask.merge(coco_mask.frPyObjects(code, height, width))
        elif isinstance(code["counts"], list):
            code = coco_mask.frPyObjects(code, height, width)
        return np.asarray(coco_mask.decode(code), dtype=bool)

    def halve_batch(self) -> bool:
        """Nothing to halve."""
        return False


class OracleChat:
    """Answers what the truth says of the instance that a region's box overlaps best."""

    def __init__(self, config: OracleChatConfig) -> None:
        self._truth, self._background = _read(config.truth), frozenset(config.background)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return one answer a question, by what it asks: presence, name or layer."""
        return [Answer(self._answer(question)) for question in questions]

    def _answer(self, question: Question) -> str:
        instances = self._truth.instances.get(question.image_id, [])
        name = None
        if instances:
            height, width = self._truth.sizes[question.image_id]
            frame = question.picture_rgb.shape
            scale = np.array([frame[1] / width, frame[0] / height] * 2)
            boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in (item.bbox for item in instances)]) * scale
            overlaps = box_iou(np.array([question.box_xyxy]), boxes)[0]
            if overlaps.max() >= SAME_IOU:
                name = self._truth.names[instances[int(overlaps.argmax())].category_id]
        match question.asks:
            case "presence":
                return "Yes" if name else "No"
            case "name":
                return name or "nothing"
            case "layer":
                return "Background" if name in self._background else "Foreground"
            case other:
                raise ValueError(f"an oracle has no answer to what asks {other!r}")

    def halve_batch(self) -> bool:
        """Nothing to halve."""
        return False
