"""The frozen base of every configuration section, and the sections that every recipe shares.

Each field is identity (it changes the labels: default), placement (where and how fast: may change on resume) or
finalize (it changes what is made of the labels). The label digest covers identity alone.
"""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Role(Enum):
    """What a field is for, where it is not identity. Used as `Annotated[type, Role.PLACEMENT]`."""

    PLACEMENT = "placement"
    FINALIZE = "finalize"


class Section(BaseModel):
    """Frozen, closed to unknown keys, with a docstring a field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """Dotted path -> JSON value of every identity field, nested sections included."""
        return dict(self._identity(""))

    def _identity(self, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, field in type(self).model_fields.items():
            if any(isinstance(mark, Role) for mark in field.metadata):
                continue
            value = getattr(self, name)
            if isinstance(value, Section):
                yield from value._identity(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", self.model_dump(mode="json", include={name})[name]


class StorageConfig(Section):
    """How S3 is reached. Credentials come from the SDK's own chain, never from here."""

    endpoint: str | None = None
    """URL of an S3-compatible server; default: AWS."""
    region: str | None = None
    """Region; default: the SDK's chain."""
    path_style: bool = False
    """Address buckets as a path instead of a host name; most S3-compatible servers need it."""
    ca_bundle: Path | None = None
    """PEM file that the server's certificate is checked against; default: the system's."""
    request_checksum_calculation: Literal["when_supported", "when_required"] = "when_supported"
    """`when_required` for servers that reject the SDK's default checksums."""
    timeout_s: float = Field(60, gt=0)
    """Seconds without an answer after which a request counts as failed."""


class DatasetConfig(Section):
    """Which images, and how they become pixels."""

    images: Annotated[str, Role.PLACEMENT]
    """Folder or `s3://bucket/prefix` with the pictures. Image keys are relative to it."""
    coco: Annotated[str | None, Role.PLACEMENT] = None
    """COCO file whose `images` are the dataset; default: every picture below `images`."""
    extensions: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
    """Endings that count as pictures where `coco` is not given, lower case; compared without case."""
    ids: Literal["auto", "stem", "path"] = "auto"
    """Image ids without `coco`: the integer in the file name (`stem`), a hash of the relative path (`path`), or `auto`:
    stems where all are integers, else paths."""
    max_side: int = Field(1024, ge=64)
    """Longer side in pixels above which a picture is made smaller before labelling; boxes are mapped back."""
    max_pixels: int = Field(200_000_000, gt=0)
    """Pictures with more pixels are refused as decompression bombs."""


class ShardingConfig(Section):
    """How the dataset is cut."""

    chunk_size: int = Field(32, ge=1, le=100_000)
    """Images a chunk: the unit of work, of commit and of loss."""


class LimitsConfig(Section):
    """When to wait, when to give up, and what a final may lack."""

    min_coverage: Annotated[float, Role.PLACEMENT] = Field(1.0, ge=0, le=1)
    """Least share of images with a record, below which finalize refuses."""
    max_failed: Annotated[float, Role.PLACEMENT] = Field(0.01, ge=0, le=1)
    """Greatest share of `failed` records, above which finalize refuses and labelling stops."""
    outside_wait_s: Annotated[float, Role.PLACEMENT] = Field(1800, ge=0)
    """Seconds for which an unavailable store or model server is waited out before the process ends for a retry."""
    failures_in_a_row: Annotated[int, Role.PLACEMENT] = Field(20, ge=1)
    """Images failing one after another in the models before the cause is sought outside the images."""
    stalled_after_s: Annotated[float, Role.PLACEMENT] = Field(1800, gt=0)
    """Seconds without a finished image after which the watchdog ends the process."""
    heartbeat_s: Annotated[float, Role.PLACEMENT] = Field(15, gt=0)
    """Seconds between heartbeats."""
