"""What a bundle holds for its trainer: class embeddings, the overlay and the patched config."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from mill_jobs.recipes.base import FinalWriter
from mill_jobs.trainer.classes import ClassList
from mill_jobs.trainer.config import EmbeddingsConfig, NoTrainer, TrainerConfig
from mill_shared.storage import Store

EMBEDDING_ROWS = "embeddings.json"
"""File -> (class, SHA-256 of its row) of each row, in order: what makes a swapped row visible."""
Rows = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class TrainerInputs:
    """Local copies of the user's files, and what they are by content."""

    files: Mapping[str, Path] = field(default_factory=dict)
    """Field of the config -> file."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Field of the config -> SHA-256."""


def gather_inputs(
    settings: TrainerConfig, local: Callable[[str, str], Path], digest: Callable[[Path], str]
) -> TrainerInputs:  # fmt: skip
    """Bring the files that a trainer section names to this disk.

    Args:
        settings: the section.
        local: (URL, field) -> local file; raises ConfigError where there is none.
        digest: file or folder -> SHA-256, as hex.
    """
    if isinstance(settings, NoTrainer):
        return TrainerInputs()
    named = {"config": settings.config, "metainfo_file": settings.metainfo_file}
    embeddings = settings.embeddings
    if embeddings is not None:
        named |= {"embeddings.plain": embeddings.plain, "embeddings.attn12": embeddings.attn12}
    files = {name: local(url, f"finalize.trainer.{name}") for name, url in named.items() if url is not None}
    digests = {name: digest(path) for name, path in files.items()}
    if embeddings is not None and embeddings.clip is not None:
        digests["embeddings.clip"] = digest(embeddings.clip)
    return TrainerInputs(files, digests)


def write_trainer_part(
    settings: TrainerConfig, inputs: TrainerInputs, classes: ClassList, out: FinalWriter, cache: Store | None
) -> tuple[list[str], list[str]]:
    """Write what the trainer needs into a final.

    Args:
        settings: the trainer section of the run file.
        inputs: what `gather_inputs` brought.
        classes: of the final.
        out: takes the files.
        cache: keeps rows of class embeddings for the next final.

    Returns:
        Notes for the user, and what the bundle lacks; a line each.

    Raises:
        ConfigError: one of the user's files cannot be used.
    """
    if isinstance(settings, NoTrainer):
        return [], []
    from mill_jobs.trainer.patch import write_trainer_files

    written, missing = ((), ()) if settings.embeddings is None else _write_rows(
        settings.embeddings, inputs, classes, out, cache
    )  # fmt: skip
    notes = write_trainer_files(
        settings, classes, config_path=inputs.files.get("config"), metainfo_path=inputs.files.get("metainfo_file"),
        out=out, embeddings=written,
    )  # fmt: skip
    return notes, list(missing)


def _write_rows(
    settings: EmbeddingsConfig, inputs: TrainerInputs, classes: ClassList, out: FinalWriter, cache: Store | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    from mill_jobs.trainer.embeddings import write_embeddings

    made = write_embeddings(
        settings, classes, out, plain_path=inputs.files.get("embeddings.plain"),
        attn12_path=inputs.files.get("embeddings.attn12"), cache=cache,
    )  # fmt: skip
    rows: Rows = {}
    for name in made.files:
        if name.startswith("class_"):
            names = [entry.name for entry in sorted(classes.classes, key=lambda entry: entry.category_id)]
            rows[name] = list(zip(names, row_digests(out.path(name)), strict=True))
    with out.create(EMBEDDING_ROWS) as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(rows), indent=1))
    return made.files, made.notes


def row_digests(path: Path) -> list[str]:
    """Return the SHA-256 of each row of an `.npy` file, as hex."""
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in np.load(path, allow_pickle=False)]
