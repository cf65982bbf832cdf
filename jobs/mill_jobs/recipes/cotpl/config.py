"""CoT-PL: SAM regions, three questions to a chat model, class selection by frequency. Source: specs/cotpl.md."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mill_jobs.recipes.cotpl.prompts import DEFAULT_PROMPTS, Prompts
from mill_shared.config import Role, Section
from mill_shared.models.config import (
    ChatConfig,
    MaskGeneratorSettings,
    MasksConfig,
    OracleChatConfig,
    OracleMasksConfig,
)


class LabelConfig(Section):
    """From a picture to labelled regions."""

    profile: Literal["strict", "reference"] = "strict"
    """`strict`: half-open boxes, a strict parser with one constrained retry, the object's name in question 3, a bad
    region is isolated. `reference`: the original's rules, quirks included. Source: specs/cotpl.md 1.4 to 1.7."""
    masks: MasksConfig
    """Where candidate masks come from."""
    mask_generator: MaskGeneratorSettings = MaskGeneratorSettings()
    """Settings of the automatic mask generator."""
    chat: ChatConfig
    """Who answers the questions."""
    prompts: Annotated[Path | None, Role.PLACEMENT] = None
    """YAML file with your own wording; default: the shipped one. Its digest goes into the label digest."""
    iou_threshold: float = Field(0.8, ge=0, le=1)
    """A mask is dropped above this IoU with a better one. Source: specs/cotpl.md 1.4."""
    score_threshold: float = Field(0.7, ge=0, le=1)
    """A mask is dropped unless stability x predicted IoU is above this. Source: specs/cotpl.md 1.4."""
    inner_threshold: float = Field(0.5, ge=0, le=1)
    """Sets how readily a part of a larger mask is dropped. Source: specs/cotpl.md 1.4."""
    min_box_area_px: int = Field(10_000, ge=0)
    """Regions with a smaller w x h, in the labelled frame, are not asked about. Source: specs/cotpl.md 1.5."""

    def read_prompts(self) -> Prompts:
        """Return the wording in use.

        Raises:
            ConfigError: the file cannot be read.
        """
        return DEFAULT_PROMPTS if self.prompts is None else Prompts.read(self.prompts)


class SelectionConfig(Section):
    """Which names become classes. Boxes are counted, not images, and before base duplicates are left out."""

    by: Literal["image_share", "count", "base_minimum", "top_k", "list"] = "image_share"
    """`image_share`: boxes >= share x images of the plan, but never fewer than `at_least`; `count`: boxes >= count;
    `base_minimum`: boxes >= annotations of the rarest base class that the base file has; `top_k`: the k most frequent;
    `list`: the given names, in their order. All others are ordered by boxes, the most first; ties by name, in the
    reference profile by first appearance."""
    image_share: float = Field(1294 / 118_287, gt=0, le=1)
    """For `image_share`. The default is 1294 boxes of COCO's 118,287 images. Source: specs/cotpl.md 3, stage 3."""
    at_least: int = Field(2, ge=1)
    """For `image_share`: never fewer boxes than this."""
    count: int = Field(1294, ge=1)
    """For `count`; with `list` it decides only what stage3.txt holds, as in the original. Source: specs/cotpl.md 3,
    stage 3."""
    k: int = Field(64, ge=1)
    """For `top_k`."""
    names: tuple[str, ...] | Literal["cotpl-64"] = "cotpl-64"
    """For `list`: names in class order; `cotpl-64` is the list that the authors shipped, and what their scripts use
    whatever was generated. Source: specs/cotpl.md 4."""

    @field_validator("names")
    @classmethod
    def _no_name_twice(cls, names: tuple[str, ...] | str) -> tuple[str, ...] | str:
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if isinstance(names, tuple) else []
        if twice:
            raise ValueError(f"listed twice: {', '.join(twice)}")
        return names

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "SelectionConfig":
        used = {"image_share": {"image_share", "at_least"}, "count": {"count"}, "base_minimum": set[str](),
                "top_k": {"k"}, "list": {"names", "count"}}[self.by]  # fmt: skip
        idle = [
            name
            for name, field in type(self).model_fields.items()
            if name not in used | {"by"} and getattr(self, name) != field.default
        ]
        if idle:
            raise ValueError(f"{', '.join(idle)} has no effect with by={self.by}")
        return self


class CotplFinalizeConfig(Section):
    """From labelled regions to classes and a COCO file."""

    profile: Literal["fixed", "reference"] = "fixed"
    """`fixed`: names normalised, whole words, base duplicates left out, boxes kept inside the image. `reference`:
    stages 1 to 6 of the original on the same labels, quirks included; set `selection` to `{by: list}` for what its
    scripts do, to `{by: count}` for what its stage 3 prints. Source: specs/cotpl.md 3."""
    synonyms: dict[str, str] = Field(default_factory=dict)
    """Name -> name that it counts as, applied after normalisation; only in the fixed profile."""
    excluded: tuple[str, ...] = (
        "tree", "flower", "sky", "mountain", "plant", "leaf", "wood", "letter", "rock", "baseball player", "building",
        "man", "grass", "branch", "leaves",
    )  # fmt: skip
    """Words whose names are left out. Source: specs/cotpl.md 4."""
    exclude_by: Literal["word", "substring", "exact"] = "word"
    """How `excluded` is matched: as words of the name, anywhere in it, or as the whole name. The reference profile
    always matches substrings."""
    selection: SelectionConfig = SelectionConfig()
    """Which names become classes."""
    base_duplicate_iou: float = Field(0.5, ge=0, le=1)
    """A pseudo-label above this IoU with a kept base box is a duplicate and left out; against a crowd its covered share
    counts. 1 switches the test off; the reference profile has none."""
    masks: bool = False
    """Write each pseudo-label's mask as its `segmentation`, in run-length form and in the image's own size; its pixels
    are then the `area`. Not in the reference profile."""
    legacy_files: bool = False
    """Also write the original's files: raw, unseen and top-k JSON, the COCO file in its layout, and what its stages 3
    and 6 print. Source: specs/cotpl.md 2.2."""


class CotplConfig(Section):
    """The CoT-PL recipe."""

    name: Literal["cotpl"] = "cotpl"
    """Selects this recipe."""
    label: LabelConfig | None = None
    """Changes the labels: another value is another run. None where the labels are imported."""
    finalize: Annotated[CotplFinalizeConfig, Role.FINALIZE] = CotplFinalizeConfig()
    """Changes what is made of the labels: another value is another final of the same run."""

    def content(self) -> dict[str, str]:
        """Digests of what the labels depend on beside this file: weights, truths of oracles, prompts.

        Raises:
            ConfigError: a file is missing or cannot be read.
        """
        from mill_shared.models.weights import content_digest

        if self.label is None:
            return {}
        found = {"label.prompts": self.label.read_prompts().digest()}
        match self.label.masks:
            case OracleMasksConfig(truth=truth):
                found["label.masks.truth"] = content_digest(Path(truth))
            case sam:
                found["label.masks.checkpoint"] = content_digest(sam.checkpoint)
                if sam.architecture == "custom":
                    found["label.masks.sizes"] = content_digest(sam.checkpoint.with_suffix(".json"))
        match self.label.chat:
            case OracleChatConfig(truth=truth):
                found["label.chat.truth"] = content_digest(Path(truth))
            case chat if chat.kind == "transformers":
                found["label.chat.model"] = content_digest(chat.model)
        return found
