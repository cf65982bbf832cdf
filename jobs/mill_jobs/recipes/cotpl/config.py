"""CoT-PL: SAM regions, three questions to a chat model, class selection by frequency. Source: specs/cotpl.md."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

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
    """Which names become classes."""

    by: Literal["image_share", "count", "base_minimum", "top_k", "list"] = "image_share"
    """`image_share`: boxes >= share x images of the plan; `count`: boxes >= count; `base_minimum`: boxes >= those of
    the rarest base class; `top_k`: the k most frequent; `list`: the given names."""
    image_share: float = Field(1294 / 118_287, gt=0, le=1)
    """For `image_share`. The default is 1294 boxes of COCO's 118,287 images. Source: specs/cotpl.md 3, stage 3."""
    at_least: int = Field(2, ge=1)
    """For `image_share`: never fewer boxes than this."""
    count: int = Field(1294, ge=1)
    """For `count`. Source: specs/cotpl.md 3, stage 3."""
    k: int = Field(64, ge=1)
    """For `top_k`."""
    names: tuple[str, ...] | Literal["cotpl-64"] = "cotpl-64"
    """For `list`: names in class order; `cotpl-64` is the list that the authors shipped. Source: specs/cotpl.md 4."""


class CotplFinalizeConfig(Section):
    """From labelled regions to classes and a COCO file."""

    profile: Literal["fixed", "reference"] = "fixed"
    """`fixed`: names normalised, whole words, base duplicates left out. `reference`: stages 1 to 6 of the original,
    quirks included. Source: specs/cotpl.md 3."""
    synonyms: dict[str, str] = Field(default_factory=dict)
    """Name -> name that it counts as, applied after normalisation; only in the fixed profile."""
    excluded: tuple[str, ...] = (
        "tree", "flower", "sky", "mountain", "plant", "leaf", "wood", "letter", "rock", "baseball player", "building",
        "man", "grass", "branch", "leaves",
    )  # fmt: skip
    """Words whose names are left out. Source: specs/cotpl.md 4."""
    exclude_by: Literal["word", "substring", "exact"] = "word"
    """How `excluded` is matched; the reference profile always matches substrings."""
    selection: SelectionConfig = SelectionConfig()
    """Which names become classes."""
    base_duplicate_iou: float = Field(0.5, ge=0, le=1)
    """A pseudo-label above this IoU with a base box is a duplicate and left out; 1 switches the test off."""
    masks: bool = False
    """Write each pseudo-label's mask as its `segmentation`."""
    legacy_files: bool = False
    """Also write the original's files: raw, unseen and top-k JSON, the COCO file in its layout, its printed lines."""


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
        match self.label.chat:
            case OracleChatConfig(truth=truth):
                found["label.chat.truth"] = content_digest(Path(truth))
            case chat if chat.kind == "transformers":
                found["label.chat.model"] = content_digest(chat.model)
        return found
