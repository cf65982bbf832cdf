"""What a trainer needs beside the COCO file. Importing this file imports no trainer and no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mill_shared.config import Section

TargetPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.(\*\*\.)*[A-Za-z_]\w*)*$")]
"""Where a value stands in a trainer's config: names joined by dots, a top-level variable first. A list on the way means
each of its elements, `**` any number of levels: `train_dataloader.**.ann_file` is the annotation file of every training
dataset, however they are wrapped."""


class EmbeddingsConfig(Section):
    """Class embeddings for an open-vocabulary head. Source: specs/cotpl.md 5.2."""

    clip: Path | None = None
    """Folder of a CLIP model in the Hugging Face format, e.g. of clip-vit-base-patch16. Makes every row
    that no existing file has; without one, a file that would lack rows is not written and the bundle is incomplete."""
    plain: str | None = None
    """Existing `.npy` with the projected text features of the taxonomy, a row a class in id order; path or `s3://`. Its
    rows are kept bit for bit, and new classes follow. Default: all rows are made."""
    attn12: str | None = None
    """The same for the features behind the last block (`_attn12`)."""
    background: bool = True
    """Also write the features of the background groups."""


class TargetTable(Section):
    """Which places of a trainer's config get which derived value. Of each list, one path at least must exist.

    Names are joined by dots, a top-level variable first. A list on the way means each of its elements, `**` any number
    of levels.
    """

    annotations: tuple[TargetPath, ...] = ()
    """Annotation files of the training datasets; each dataset gets `metainfo` (class names and palette) beside it."""
    annotation_copies: tuple[TargetPath, ...] = ()
    """Other places that name the training annotation file, e.g. a box cache."""
    num_pls: tuple[TargetPath, ...] = ()
    """Number of extra classes."""
    num_classes: tuple[TargetPath, ...] = ()
    """Number of all classes, without the background."""
    class_weight: tuple[TargetPath, ...] = ()
    """Weights of the classes and, last, of the background."""
    embeddings: tuple[TargetPath, ...] = ()
    """File of the plain class embeddings."""
    embeddings_attn12: tuple[TargetPath, ...] = ()
    """File of the class embeddings behind the last block."""
    background: tuple[TargetPath, ...] = ()
    """File of the plain background embeddings."""
    background_attn12: tuple[TargetPath, ...] = ()
    """File of the background embeddings behind the last block."""


BARON_TARGETS = TargetTable(
    annotations=("train_dataloader.**.ann_file",),
    annotation_copies=("model.**.boxes_cache.json_path",),
    num_pls=("num_pls",),
    num_classes=("model.roi_head.bbox_head.num_classes",),
    class_weight=("model.roi_head.bbox_head.loss_cls.class_weight",),
    embeddings_attn12=("model.**.cls_embeddings_path",),
    background_attn12=("model.**.bg_cls_embeddings_path",),
)
"""A CoT-PL config over BARON. Source: specs/cotpl.md 5.1."""
MMDET_TARGETS = TargetTable(
    annotations=("train_dataloader.**.ann_file",),
    num_classes=("model.**.bbox_head.num_classes", "model.**.mask_head.num_classes"),
)
"""A plain mmdetection 3.x detector with any wrappers and any number of stages. Its losses take no weight 0 as "not a
class", so class weights are left alone."""


class NoTrainer(Section):
    """The bundle holds no trainer's files."""

    kind: Literal["none"] = "none"
    """No trainer is known; class list, weights and COCO file are written all the same."""


class _MmdetFiles(Section):
    config: str | None = Field(None, pattern=r"\.py$")
    """The trainer's own config, a Python file of mmengine; path or `s3://`. The final then holds `overlay.py`, which
    inherits from it, and `trainer_config.py`, its patched copy. Default: neither is written."""
    config_at: str | None = None
    """Where that config lies on the trainer's machine: an absolute path, or a packaged one as `mmdet::...`; the overlay
    inherits from it. Default: `config`, made absolute; must be given where `config` is `s3://`."""
    metainfo_file: str | None = Field(None, pattern=r"\.py$")
    """mmdetection's own `datasets/coco.py`; path or `s3://`. The final then holds a patched copy, `coco_metainfo.py`,
    for setups that overwrite that file; `trainer_config.py` then leaves the class names to it. Default: not written."""

    @model_validator(mode="after")
    def _base_is_known(self) -> "_MmdetFiles":
        if self.config is not None and self.config.startswith("s3://") and self.config_at is None:
            raise ValueError("config is s3://, so config_at must say where it lies on the trainer's machine")
        return self

    @property
    def base(self) -> str:
        """What the overlay inherits from: an absolute path, or `package::path`."""
        place = self.config_at or self.config
        assert place is not None
        return place if "::" in place else str(Path(place).expanduser().absolute())


class MmdetTrainer(_MmdetFiles):
    """mmdetection 3.x."""

    kind: Literal["mmdet"]
    """A plain mmdetection detector."""
    embeddings: EmbeddingsConfig | None = None
    """Class embeddings. Default: the detector needs none."""
    targets: TargetTable = MMDET_TARGETS
    """Which places of the config get which value. Default: training datasets and `num_classes` of all heads."""


class BaronTrainer(_MmdetFiles):
    """BARON over mmdetection 3.x, as CoT-PL trains it. Source: specs/cotpl.md 5."""

    kind: Literal["baron"]
    """An open-vocabulary detector over class embeddings."""
    embeddings: EmbeddingsConfig | None = EmbeddingsConfig()
    """Class embeddings. Default: all of them, plain and `_attn12`."""
    targets: TargetTable = BARON_TARGETS
    """Which places of the config get which value. Default: those of CoT-PL's OV-COCO config."""


TrainerConfig = Annotated[NoTrainer | MmdetTrainer | BaronTrainer, Field(discriminator="kind")]
"""The trainer that a bundle is made for."""
