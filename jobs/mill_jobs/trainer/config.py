"""What a trainer needs beside the COCO file. Importing this file imports no trainer and no torch."""

from pathlib import Path

from mill_shared.config import Section


class EmbeddingsConfig(Section):
    """Class embeddings for an open-vocabulary head. Source: specs/cotpl.md 5.2."""

    clip: Path | None = None
    """Folder of a CLIP model in the Hugging Face format, e.g. of clip-vit-base-patch16. Without one, names that no
    existing file has stay without a row and the bundle is marked incomplete."""
    plain: str | None = None
    """Existing `.npy` with the projected text features of the taxonomy, a row a class in id order; path or `s3://`. Its
    rows are kept bit for bit. Default: all rows are made."""
    attn12: str | None = None
    """The same for the features behind the last block (`_attn12`)."""
    background: bool = True
    """Also write the features of the background groups."""
