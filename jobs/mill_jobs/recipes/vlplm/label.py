"""VL-PLM's labeller: proposals, refined; crops; CLIP's probability of each class. Source: specs/vlplm.md 1.1."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mill_jobs.recipes.base import Outcome, Sample
from mill_jobs.recipes.vlplm.config import LabelConfig
from mill_jobs.recipes.vlplm.crops import are_large, clamped_sides, crop, mean_feature, probabilities, scale_boxes
from mill_jobs.recipes.vlplm.evidence import EVIDENCE, SCORED
from mill_jobs.trainer.templates import ensemble_prompts
from mill_shared.records import Box, Dropped, ImageRecord, Region

if TYPE_CHECKING:
    from mill_shared.models.clip import Clip
    from mill_shared.models.rpn import Proposer


class VlplmLabeller:
    """Labels images one by one: a picture's crops fill the batches of CLIP by themselves."""

    evidence = EVIDENCE

    def __init__(self, config: LabelConfig, targets: Sequence[str], proposer: "Proposer", clip: "Clip") -> None:
        self._config, self._targets, self._proposer, self._clip = config, tuple(targets), proposer, clip

    def halve_batch(self) -> bool:
        """Use half of the device memory from now on; False where nothing is left to halve."""
        return self._clip.halve_batch()

    @cached_property
    def _texts(self) -> NDArray[np.float32]:
        """(C, D): targets, then distractors."""
        names = (*self._targets, *self._config.distractors)
        prompts = [ensemble_prompts(prompt_name(name)) for name in names]
        features = self._clip.encode_text([text for texts in prompts for text in texts]).plain
        return mean_feature(features.reshape(len(names), -1, features.shape[1]))

    def label(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Return one outcome a sample. Errors as in `Labeller.label`."""
        return [Outcome(self._record(sample)) for sample in samples]

    def _record(self, sample: Sample) -> ImageRecord:
        height, width = sample.image_rgb.shape[:2]
        found = self._proposer.propose(sample.image_rgb)
        proposed = found.boxes_xyxy.astype(np.float64)
        boxes = scale_boxes(proposed, 1.0, width, height)
        whole = clamped_sides(proposed, width, height)
        large = are_large(boxes, self._config.min_side_px * sample.scale)
        dropped = [Dropped(_box(boxes[i]), float(found.objectness[i]), "small") for i in np.flatnonzero(~large)]
        kept = np.flatnonzero(large)
        regions = self._classified(sample.image_rgb, boxes[kept], found.objectness[kept], whole[kept])
        return ImageRecord(
            row=sample.row, image_id=sample.image_id, key=sample.key, status="ok" if regions else "empty",
            width=sample.width, height=sample.height, regions=tuple(regions), dropped=tuple(dropped),
        )  # fmt: skip

    def _classified(
        self, image_rgb: NDArray[np.uint8], boxes: NDArray[np.float64], objectness: NDArray[np.float32],
        whole: NDArray[np.int64],
    ) -> list[Region]:  # fmt: skip
        if not len(boxes):
            return []
        config, (height, width) = self._config, image_rgb.shape[:2]
        crops = [
            crop(image_rgb, box, square=config.square_crops)
            for scale in config.crop_scales
            for box in scale_boxes(boxes, scale, width, height)
        ]
        by_scale = self._clip.encode_images(crops).reshape(len(config.crop_scales), len(boxes), -1)
        features = mean_feature(by_scale.transpose(1, 0, 2))
        half = config.softmax == "model" and config.clip.precision == "float16"
        shares = probabilities(features, self._texts, config.temperature, half=half)
        targets = shares[:, : len(self._targets)]
        regions = []
        for index, best in enumerate(targets.argmax(axis=1).tolist()):
            evidence = {
                "objectness": float(objectness[index]),
                "probabilities": targets[index].tolist(),
                "distractor_mass": float(shares[index, len(self._targets) :].sum()) if config.distractors else None,
                "feature": features[index].astype("<f2").tobytes() if config.store_features else None,
                "whole": int(whole[index]),
            }
            score = float(targets[index, best])
            regions.append(Region(_box(boxes[index]), SCORED, self._targets[best], score, evidence=evidence))
        return regions


def prompt_name(name: str) -> str:
    """Return a class name as prompts have it; LVIS joins words with underscores."""
    return name.replace("_", " ")


def _box(box: NDArray[np.float64]) -> Box:
    x0, y0, x1, y1 = box.tolist()
    return (x0, y0, x1, y1)


def build_labeller(config: LabelConfig, targets: Sequence[str]) -> VlplmLabeller:
    """Load the models and return the labeller.

    Raises:
        ConfigError: weights are missing or unusable.
    """
    from mill_shared.models.clip import Clip
    from mill_shared.models.rpn import Proposer

    return VlplmLabeller(config, targets, Proposer(config.proposals), Clip(config.clip))
