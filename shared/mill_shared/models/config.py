"""Which model, from where, how precise. Importing this file never imports torch; `build` does."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mill_shared.config import Role, Section

Precision = Literal["float32", "tf32", "bfloat16", "float16"]


class TorchConfig(Section):
    """What every local model shares."""

    device: Annotated[str, Role.PLACEMENT] = "auto"
    """`cuda`, `cpu`, or `auto`: the first visible GPU, else the CPU."""
    precision: Precision = "float32"
    """Number type of weights and activations; `tf32` is float32 with TF32 products."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch, 0 for its own choice. Same bytes need the same number."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms."""


class SamConfig(TorchConfig):
    """Segment Anything through the segment-anything package."""

    kind: Literal["sam"] = "sam"
    """Selects Segment Anything."""
    checkpoint: Annotated[Path, Role.PLACEMENT]
    """State dict in the official format, e.g. sam_vit_h_4b8939.pth. Its SHA-256 goes into the label digest."""
    architecture: Literal["vit_h", "vit_l", "vit_b", "custom"] = "vit_h"
    """`custom` reads the sizes from the JSON file of the same name beside the checkpoint. Its SHA-256 goes into the
    label digest."""


class MaskGeneratorSettings(Section):
    """The automatic mask generator. Source: specs/cotpl.md 1.3."""

    points_per_side: int = Field(32, ge=1)
    """Points along each side of the grid of a crop."""
    points_per_batch: int = Field(64, ge=1)
    """Points decoded at once; identity, since another batch may round another way."""
    pred_iou_threshold: float = Field(0.7, ge=0, le=1)
    """Masks are kept above this predicted IoU."""
    stability_threshold: float = Field(0.85, ge=0, le=1)
    """Masks are kept from this stability on."""
    stability_offset: float = Field(1.0, gt=0)
    """Logits by which the threshold is moved up and down to measure stability."""
    box_nms_threshold: float = Field(0.7, ge=0, le=1)
    """IoU of boxes in one crop above which the less sure one is dropped."""
    crop_layers: int = Field(1, ge=0, le=3)
    """Layers of overlapping crops beside the whole picture: layer i has 2^i x 2^i crops."""
    crop_nms_threshold: float = Field(0.7, ge=0, le=1)
    """IoU of boxes of different crops above which the one of the larger crop is dropped."""
    crop_overlap_ratio: float = Field(512 / 1500, ge=0, lt=1)
    """Overlap of crops as a share of the shorter side."""
    crop_point_downscale: int = Field(1, ge=1)
    """Points along each side are divided by this power of the crop layer."""
    min_mask_region_area_px: int = Field(100, ge=0)
    """Holes and islands with fewer pixels are removed."""


class OracleMasksConfig(Section):
    """Masks from ground truth, to test and to measure what the pipeline itself loses."""

    kind: Literal["oracle"] = "oracle"
    """Selects ground truth."""
    truth: Annotated[str, Role.PLACEMENT]
    """COCO file with segmentations. Its SHA-256 goes into the label digest."""


class TransformersChatConfig(TorchConfig):
    """A vision-language model through transformers, in this process."""

    kind: Literal["transformers"] = "transformers"
    """Selects a model in this process."""
    model: Annotated[Path, Role.PLACEMENT]
    """Folder in the Hugging Face format, e.g. of Qwen2-VL-7B-Instruct. Its files' SHA-256 go into the label digest."""
    precision: Precision = "bfloat16"
    """Number type of weights and activations. Source: specs/cotpl.md 1.2."""
    batch_size: int = Field(16, ge=1)
    """Questions answered at once. Identity, since another batch may round another way."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer in tokens. Source: specs/cotpl.md 1.2."""
    max_image_pixels: int | None = Field(None, ge=784)
    """Cap on a picture's area before it becomes tokens; default: the model's own setting."""


class HttpChatConfig(Section):
    """A vision-language model behind an OpenAI-compatible server, e.g. vLLM. Region pictures leave the machine."""

    kind: Literal["http"] = "http"
    """Selects a server."""
    url: Annotated[str, Role.PLACEMENT]
    """Base URL, up to and with `/v1`."""
    model: str
    """Model name that the server knows."""
    revision: str
    """What the server runs, in your words, e.g. a commit; recorded since it cannot be checked."""
    key_file: Annotated[Path | None, Role.PLACEMENT] = None
    """File with the API key; default: no key is sent."""
    concurrency: Annotated[int, Role.PLACEMENT] = Field(16, ge=1)
    """Requests in flight."""
    timeout_s: Annotated[float, Role.PLACEMENT] = Field(120, gt=0)
    """Seconds for one request."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer in tokens. Source: specs/cotpl.md 1.2."""
    constrain: Literal["structured_outputs", "guided_choice", "none"] = "structured_outputs"
    """How the server is asked for one of the allowed answers; `none` for servers that cannot."""


class ClipConfig(TorchConfig):
    """CLIP through transformers, in this process."""

    model: Annotated[Path, Role.PLACEMENT]
    """Folder in the Hugging Face format, e.g. of clip-vit-base-patch16."""
    batch_size: int = Field(64, ge=1)
    """Texts or crops encoded at once; identity, since another batch may round another way."""


class OracleChatConfig(Section):
    """Answers from ground truth, to test and to measure what the pipeline itself loses."""

    kind: Literal["oracle"] = "oracle"
    """Selects ground truth."""
    truth: Annotated[str, Role.PLACEMENT]
    """COCO file with boxes and categories. Its SHA-256 goes into the label digest."""
    background: tuple[str, ...] = ()
    """Category names that are answered as background."""


class ProposalsConfig(TorchConfig):
    """A class-agnostic proposal network of Detectron2, whose box head refines. Source: specs/vlplm.md 1.1 and 4."""

    checkpoint: Annotated[Path, Role.PLACEMENT]
    """Detectron2 checkpoint (.pth) of an R-CNN with FPN, trained with one class; its sizes are read from it. Its
    SHA-256 goes into the label digest."""
    short_side_px: int = Field(800, ge=32)
    """Shorter side of the network's input."""
    long_side_px: int = Field(1333, ge=32)
    """Longer side of the network's input at most."""
    per_level: int = Field(1000, ge=1)
    """Anchors of each level that are looked at, the surest."""
    nms_iou: float = Field(0.3, ge=0, le=1)
    """IoU above which the worse of two proposals of a level is left out."""
    refined: int = Field(1000, ge=1)
    """Proposals that are refined, the surest."""
    passes: int = Field(10, ge=0)
    """How often the box head moves each box; the original's `--roi_num`."""
    kept: int = Field(100, ge=1)
    """Proposals that are kept after that, the surest."""
    keep_before_refining: bool = False
    """Refine only the proposals that are kept: a tenth of the work, with the same boxes up to rounding (4e-4 px).
    Source: specs/vlplm.md 1.1 step E and 7.6."""


MasksConfig = Annotated[SamConfig | OracleMasksConfig, Field(discriminator="kind")]
ChatConfig = Annotated[TransformersChatConfig | HttpChatConfig | OracleChatConfig, Field(discriminator="kind")]
