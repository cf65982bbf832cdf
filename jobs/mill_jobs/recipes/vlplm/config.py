"""VL-PLM and MarvelOVD: proposals of a class-agnostic network, named by CLIP. Source: specs/vlplm.md."""

import hashlib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mill_jobs.trainer.templates import ENSEMBLE
from mill_shared.config import Role, Section
from mill_shared.models.config import ClipConfig, ProposalsConfig
from mill_shared.presets import target_names

THRESHOLDS = {"vlplm": 0.8, "marvelovd": 0.5}
"""Source: specs/vlplm.md 0."""


class LabelConfig(Section):
    """From a picture to scored proposals. The original's numbers; what does better is off by default."""

    proposals: ProposalsConfig
    """Where boxes come from."""
    clip: ClipConfig
    """Who names them; the original uses ViT-B/32."""
    crop_scales: tuple[Annotated[float, Field(gt=0, le=10)], ...] = Field((1.0, 1.5), min_length=1)
    """A box is looked at in these sizes, and the features are averaged. Source: specs/vlplm.md 1.1 step H."""
    min_side_px: float = Field(5, gt=0)
    """Boxes with a shorter side, in pixels of the original picture, are left out. Source: specs/vlplm.md 1.1 step G."""
    temperature: float = Field(0.01, gt=0)
    """Divides the cosines before the softmax. Source: specs/vlplm.md 1.1 step K."""
    softmax: Literal["model", "float32"] = "model"
    """Number type of logits and probabilities: with `model` that of CLIP, so that float16 saturates at 1.0 as in the
    original on a GPU. Source: specs/vlplm.md 7.3."""
    distractors: tuple[str, ...] = ()
    """Names that a box may be instead of a target, e.g. the base classes and `background`; they take probability and
    are never written. The original has none. Source: specs/vlplm.md 7.1."""
    square_crops: bool = False
    """Pad crops to squares instead of cutting off what lies outside of their central square. Source: specs/vlplm.md
    7.5."""
    store_features: bool = False
    """Keep each box's image feature (1 kB), to score other names without another look at the pictures."""

    @property
    def min_box_area_px(self) -> int:
        """Smaller boxes are never asked about, width x height."""
        return int(self.min_side_px**2)


class VlplmFinalizeConfig(Section):
    """From scored proposals to a COCO file."""

    profile: Literal["vlplm", "marvelovd"] = "vlplm"
    """`vlplm`: objectness and CLIP's probability are fused. `marvelovd`: the probability alone decides, and labels
    carry both scores. Source: specs/vlplm.md 0."""
    objectness_weight: float = Field(0.5, ge=0, le=1)
    """Weight of objectness in the fused score, the original's `--lamda`; only with `vlplm`. Source: specs/vlplm.md
    1.3."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Proposals stay above this score; default: 0.8 with `vlplm`, 0.5 with `marvelovd`. Source: specs/vlplm.md 0."""
    nms_iou: float = Field(0.6, ge=0, le=1)
    """IoU above which the worse of two boxes of one class is left out. Source: specs/vlplm.md 1.3."""
    duplicate_iou: float | None = Field(None, ge=0, le=1)
    """IoU above which the worse of two boxes is left out whatever their classes, e.g. 0.9; default: not tested, as in
    the original. Refined boxes collapse onto each other. Source: specs/vlplm.md 7.4."""
    base_overlap_iou: float | None = Field(None, gt=0, le=1)
    """IoU with a kept base box from which a label is left out, e.g. 0.5; against a crowd its covered share counts.
    Default: not tested, as in the original. Source: specs/vlplm.md 7.2."""
    max_confidence: float = Field(1.0, gt=0, le=1)
    """Written scores are cut to this. MarvelOVD's trainer takes a label of 1.0 for a human's; 0.999 keeps them apart.
    Source: specs/vlplm.md 7.3."""
    categories: Literal["used", "all"] = "used"
    """Categories of pseudo_labels.json: base and target classes, which both trainers demand, or all of the base file,
    as the original writes them. Source: specs/vlplm.md 2.3."""
    score_files: bool = False
    """Also write the scores as the original's stage-1 files, CLIP_scores_<k>.json. Source: specs/vlplm.md 2.1."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "VlplmFinalizeConfig":
        if self.profile == "marvelovd" and self.objectness_weight != 0.5:
            raise ValueError("objectness_weight has no effect with profile=marvelovd, whose score is CLIP's alone")
        return self

    @property
    def least_score(self) -> float:
        """Proposals stay above this score."""
        return THRESHOLDS[self.profile] if self.threshold is None else self.threshold

    @property
    def weight(self) -> float:
        """Weight of objectness in the score that decides."""
        return self.objectness_weight if self.profile == "vlplm" else 0.0


class VlplmConfig(Section):
    """The VL-PLM / MarvelOVD recipe."""

    name: Literal["vlplm"] = "vlplm"
    """Selects this recipe."""
    targets: tuple[str, ...] | Literal["ov-coco-17"] = "ov-coco-17"
    """Classes that are looked for, in the order of the scores; any names."""
    label: LabelConfig | None = None
    """Changes the scores: another value is another run. None where the scores are imported."""
    finalize: Annotated[VlplmFinalizeConfig, Role.FINALIZE] = VlplmFinalizeConfig()
    """Changes what is made of the scores: another value is another final of the same run."""

    @field_validator("targets")
    @classmethod
    def _names(cls, targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if isinstance(targets, tuple):
            twice = [name for name in dict.fromkeys(targets) if targets.count(name) > 1]
            if twice:
                raise ValueError(f"listed twice: {', '.join(twice)}")
            if not targets or not all(name.strip() for name in targets):
                raise ValueError("a list of class names, none of them blank")
        return targets

    @model_validator(mode="after")
    def _no_target_distracts(self) -> "VlplmConfig":
        both = [] if self.label is None else [name for name in self.label.distractors if name in self.target_names]
        if both:
            raise ValueError(f"label.distractors: also among the targets: {', '.join(both)}")
        return self

    @property
    def target_names(self) -> tuple[str, ...]:
        """The classes that are looked for, in order."""
        return target_names(self.targets)

    def content(self) -> dict[str, str]:
        """Digests of what the labels depend on beside this file: weights, prompts.

        Raises:
            ConfigError: a file is missing or cannot be read.
        """
        from mill_shared.models.weights import content_digest

        if self.label is None:
            return {}
        return {
            "label.prompts": hashlib.sha256("\n".join(ENSEMBLE).encode()).hexdigest(),
            "label.proposals.checkpoint": content_digest(self.label.proposals.checkpoint),
            "label.clip.model": content_digest(self.label.clip.model),
        }
