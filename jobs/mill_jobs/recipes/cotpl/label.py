"""CoT-PL's labeller: masks, suppression, size filter, rendering, three questions. Source: specs/cotpl.md 1."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mill_jobs.recipes.base import Outcome, Sample
from mill_jobs.recipes.cotpl.answers import (
    reference_layer,
    reference_name,
    reference_presence,
    strict_choice,
    strict_name,
)
from mill_jobs.recipes.cotpl.config import LabelConfig
from mill_jobs.recipes.cotpl.evidence import EVIDENCE
from mill_jobs.recipes.cotpl.masks import suppress_masks
from mill_jobs.recipes.cotpl.prompts import LAYER_ANSWERS, PRESENCE_ANSWERS
from mill_jobs.recipes.cotpl.render import boost_colours, render_region
from mill_shared.geometry import encode_masks, mask_boxes
from mill_shared.models.factory import build_chat_model, build_mask_generator
from mill_shared.models.protocols import ChatModel, MaskGenerator, Question
from mill_shared.records import Box, Dropped, ImageRecord, Region, RegionMask

PICTURES_BYTES = 512 * 2**20
"""Rendered pictures held at once; questions are batched across the images that fit."""

Asked = Literal["presence", "name", "layer"]


@dataclass
class _Asking:
    """A region on its way through the questions."""

    sample: Sample
    region: Region
    box_xyxy: Box
    """Half-open in both profiles, as questions promise."""
    picture_rgb: NDArray[np.uint8]
    answers: list[dict[str, object]] = field(default_factory=list)
    name: str = ""
    fate: str | None = None
    reason: str | None = None

    def end(self, fate: str, reason: str | None = None) -> None:
        self.fate, self.reason = fate, reason

    def outcome(self) -> Region:
        assert self.fate is not None, "every region ends with a fate"
        return replace(
            self.region,
            fate=self.fate,
            reason=self.reason,
            label=self.name if self.fate in ("foreground", "background") else None,
            evidence={**self.region.evidence, "answers": self.answers},
        )


class CotplLabeller:
    """Labels a chunk at a time; questions are batched across its regions and images."""

    evidence: pa.StructType = EVIDENCE

    def __init__(self, config: LabelConfig, masks: MaskGenerator, chat: ChatModel) -> None:
        self._config, self._masks, self._chat = config, masks, chat
        self._prompts = config.read_prompts()
        self._reference = config.profile == "reference"

    def halve_batch(self) -> bool:
        """Use half of the device memory from now on; False where nothing is left to halve."""
        halved = [self._masks.halve_batch(), self._chat.halve_batch()]
        return any(halved)

    def label(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Return one outcome a sample. Errors as in `Labeller.label`."""
        outcomes: dict[int, Outcome] = {}
        waiting: list[tuple[Sample, list[_Asking], list[Dropped]]] = []
        held_bytes = 0
        for sample in samples:
            found = self._candidates(sample)
            if found is None:
                outcomes[sample.row] = Outcome(_dropped_by_reference(sample))
                continue
            regions, dropped = found
            waiting.append((sample, regions, dropped))
            held_bytes += sum(region.picture_rgb.nbytes for region in regions)
            if held_bytes >= PICTURES_BYTES:
                outcomes |= self._ask_all(waiting)
                waiting, held_bytes = [], 0
        outcomes |= self._ask_all(waiting)
        return [outcomes[sample.row] for sample in samples]

    def _candidates(self, sample: Sample) -> tuple[list[_Asking], list[Dropped]] | None:
        """Return the regions to ask about and what was dropped; None where the reference loses the image."""
        found = self._masks.generate(sample.image_rgb, sample.image_id)
        suppression = suppress_masks(
            found.masks,
            found.predicted_ious,
            found.stabilities,
            iou_threshold=self._config.iou_threshold,
            score_threshold=self._config.score_threshold,
            inner_threshold=self._config.inner_threshold,
        )
        if self._reference and (len(found.masks) == 0 or suppression.reference_drops):
            return None
        boxes = mask_boxes(found.masks)
        scores = found.predicted_ious.astype(np.float64) * found.stabilities.astype(np.float64)
        reasons = dict(suppression.dropped)
        asked: list[int] = []
        for index in suppression.kept:
            x0, y0, x1, y1 = self._box(boxes[index])
            if not found.masks[index].any():
                reasons[index] = "empty_mask"
            elif (x1 - x0) * (y1 - y0) < self._config.min_box_area_px:
                reasons[index] = "small"
            else:
                asked.append(index)
        dropped = [Dropped(self._box(boxes[index]), float(scores[index]), reasons[index]) for index in sorted(reasons)]
        boosted = boost_colours(sample.image_rgb) if asked else sample.image_rgb
        regions = []
        for index, rle in zip(asked, encode_masks(found.masks[asked]), strict=True):
            x0, y0, x1, y1 = (int(value) for value in boxes[index])
            picture = render_region(sample.image_rgb, boosted, found.masks[index], (x0, y0, x1 - 1 - x0, y1 - 1 - y0))
            region = Region(
                box_xyxy=self._box(boxes[index]),
                fate="undecided",
                score=float(scores[index]),
                mask=RegionMask(rle.size[0], rle.size[1], rle.counts),
                evidence={
                    "predicted_iou": float(found.predicted_ious[index]),
                    "stability": float(found.stabilities[index]),
                    "float_box": False,
                },
            )
            half_open = (float(x0), float(y0), float(x1), float(y1))
            regions.append(_Asking(sample, region, half_open, picture))
        return regions, dropped

    def _box(self, box: NDArray[np.float64]) -> tuple[float, float, float, float]:
        """Return a half-open box; in the reference profile its far edges are the last pixels. Source: 1.3 step 9."""
        x0, y0, x1, y1 = (float(value) for value in box)
        less = 1.0 if self._reference and x1 > x0 else 0.0
        return (x0, y0, x1 - less, y1 - less)

    def _ask_all(self, waiting: Sequence[tuple[Sample, list[_Asking], list[Dropped]]]) -> dict[int, Outcome]:
        regions = [region for _, asked, _ in waiting for region in asked]
        if self._reference:
            self._ask_reference(regions)
        else:
            self._ask_strict(regions)
        return {
            sample.row: Outcome(_record(sample, [region.outcome() for region in asked], dropped))
            if not any(region.fate == "error" for region in asked)
            else Outcome(_lost_by_reference(sample, asked))
            for sample, asked, dropped in waiting
        }

    def _ask_reference(self, regions: Sequence[_Asking]) -> None:
        present = []
        for region, text in self._ask(regions, "presence", self._prompts.presence):
            if text is None:
                region.end("error", "error")
            elif reference_presence(text):
                present.append(region)
            else:
                region.end("absent", "no")
        named = []
        for region, text in self._ask(present, "name", self._prompts.name):
            if text is None:
                region.end("error", "error")
            else:
                region.name = reference_name(text)
                named.append(region)
        for region, text in self._ask(named, "layer", self._prompts.layer):
            region.end(*(("error", "error") if text is None else (reference_layer(text),)))

    def _ask_strict(self, regions: Sequence[_Asking]) -> None:
        present = []
        for region, text in self._choose(regions, "presence", PRESENCE_ANSWERS):
            if text == "Yes":
                present.append(region)
            elif text is not None:
                region.end("absent", text.lower())
        named = []
        for region, name in self._name(present):
            if name is not None:
                region.name = name
                named.append(region)
        for region, text in self._choose(named, "layer", LAYER_ANSWERS):
            if text is not None:
                region.end(text.lower())

    def _text(self, region: _Asking, asked: Asked) -> str:
        if asked == "layer" and not self._reference:
            return self._prompts.layer.replace("{name}", region.name)
        return {"presence": self._prompts.presence, "name": self._prompts.name, "layer": self._prompts.layer}[asked]

    def _choose(
        self, regions: Sequence[_Asking], asked: Asked, choices: tuple[str, ...]
    ) -> Iterator[tuple[_Asking, str | None]]:
        """Ask freely, then constrained to the allowed answers; None, and a fate, for what is still unusable."""
        again = []
        for region, text in self._ask(regions, asked):
            choice = None if text is None else strict_choice(text, choices)
            if choice is not None:
                yield region, choice
            elif text is None:
                region.end("undecided", "error")
            else:
                again.append(region)
        for region, text in self._ask(again, asked, attempt=1, choices=choices):
            choice = None if text is None else strict_choice(text, choices)
            if choice is None:
                region.end("undecided", "error" if text is None else f"parse_{asked}")
            yield region, choice

    def _name(self, regions: Sequence[_Asking]) -> Iterator[tuple[_Asking, str | None]]:
        again = []
        for region, text in self._ask(regions, "name"):
            name = None if text is None else strict_name(text)
            if name is not None:
                yield region, name
            elif text is None:
                region.end("undecided", "error")
            else:
                again.append(region)
        for region, text in self._ask(again, "name", self._prompts.name_again, attempt=1):
            name = None if text is None else strict_name(text)
            if name is None:
                region.end("undecided", "error" if text is None else "parse_name")
            yield region, name

    def _ask(
        self, regions: Sequence[_Asking], asked: Asked, wording: str | None = None, *, attempt: int = 0,
        choices: tuple[str, ...] | None = None,
    ) -> list[tuple[_Asking, str | None]]:  # fmt: skip
        """Ask all regions one question and keep the raw answers; None where the model has none for a region."""
        questions = [
            Question(
                region.picture_rgb, wording or self._text(region, asked), choices, asked, region.sample.image_id,
                region.box_xyxy,
            )
            for region in regions
        ]  # fmt: skip
        found: list[tuple[_Asking, str | None]] = []
        for region, answer in zip(regions, self._chat.ask(questions) if questions else [], strict=True):
            text = answer.text if answer.error is None else f"(no answer: {answer.error})"
            region.answers.append({"question": asked, "attempt": attempt, "text": text})
            found.append((region, None if answer.error is not None else answer.text))
        return found


def _record(sample: Sample, regions: Sequence[Region], dropped: Sequence[Dropped]) -> ImageRecord:
    return ImageRecord(
        row=sample.row, image_id=sample.image_id, key=sample.key, status="ok" if regions else "empty",
        width=sample.width, height=sample.height, regions=tuple(regions), dropped=tuple(dropped),
    )  # fmt: skip


def _dropped_by_reference(sample: Sample) -> ImageRecord:
    return ImageRecord(
        row=sample.row, image_id=sample.image_id, key=sample.key, status="failed", width=sample.width,
        height=sample.height, reason="reference_drops",
        detail="the original loses images without a mask, or with fewer than three where none passes the rules",
    )  # fmt: skip


def _lost_by_reference(sample: Sample, regions: Sequence[_Asking]) -> ImageRecord:
    texts = [str(region.answers[-1]["text"]) for region in regions if region.fate == "error"]
    return ImageRecord(
        row=sample.row, image_id=sample.image_id, key=sample.key, status="failed", width=sample.width,
        height=sample.height, reason="answer", detail=f"the original loses the image with one region: {texts[0]}",
    )  # fmt: skip


def build_labeller(config: LabelConfig) -> CotplLabeller:
    """Load the models and return the labeller.

    Raises:
        ConfigError: weights or truths are missing or unusable.
    """
    return CotplLabeller(
        config, build_mask_generator(config.masks, config.mask_generator), build_chat_model(config.chat)
    )
