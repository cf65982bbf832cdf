"""Class and background embeddings of an open-vocabulary head. Source: specs/cotpl.md 5.2.

A row is a function of the CLIP model and of the prompts alone, so it is made once and kept in the store. torch is
imported only where a row is neither in an existing file nor there.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import structlog
from numpy.typing import NDArray

from mill_jobs.recipes.base import FinalWriter
from mill_jobs.trainer.classes import ClassList
from mill_jobs.trainer.config import EmbeddingsConfig
from mill_jobs.trainer.templates import BACKGROUND, class_prompts
from mill_shared.errors import AlreadyExists, ConfigError, CorruptError, KeyMissing
from mill_shared.keys import embedding_key
from mill_shared.models.config import ClipConfig
from mill_shared.models.weights import content_digest
from mill_shared.storage import Store

if TYPE_CHECKING:
    from mill_shared.models.clip import Clip

log = structlog.get_logger()

Form = Literal["plain", "attn12"]
Rows = NDArray[np.float16]
"""(N, D), each of length 1."""
Prompts = tuple[str, ...]

FORMS: tuple[Form, ...] = ("plain", "attn12")
CLASSES: Mapping[Form, str] = {"plain": "class_embeddings.npy", "attn12": "class_embeddings_attn12.npy"}
GROUPS: Mapping[Form, str] = {"plain": "background_embeddings.npy", "attn12": "background_embeddings_attn12.npy"}
SAME_SPACE = 0.9
"""Least cosine between an existing row and what the CLIP model makes of the same class. Another rounding leaves more
than 0.99; rows of two models share no space, though they may share a width. Ours, not the reference's."""
NAMED_IN_NOTES = 10


@dataclass(frozen=True)
class Embeddings:
    """What was written of the embeddings, and what could not be."""

    files: tuple[str, ...]
    missing: Mapping[str, tuple[str, ...]]
    """File that was not written -> the classes or background groups for which there is no row."""

    @property
    def is_complete(self) -> bool:
        """Whether every file that was asked for is there."""
        return not self.missing

    @property
    def notes(self) -> tuple[str, ...]:
        """One line a file that is missing: what it lacks and what to do."""
        return tuple(
            f"{name} is missing: no embedding of {_some(lacking)}; name a CLIP folder in "
            "finalize.trainer.embeddings.clip and finalize again"
            for name, lacking in self.missing.items()
        )


def write_embeddings(
    settings: EmbeddingsConfig, classes: ClassList, out: FinalWriter, *,
    plain_path: Path | None, attn12_path: Path | None, cache: Store | None,
) -> Embeddings:  # fmt: skip
    """Write the rows of all classes in the order of category ids, and those of the background groups, as float16.

    Existing rows are kept bit for bit; the others are made by CLIP on the CPU, or taken from the cache. A file that
    would lack rows is not written: a trainer would refuse it at best.

    Args:
        settings: which CLIP, and whether the background is wanted. `plain` and `attn12` are not read here.
        classes: the classes of the final.
        out: takes the files.
        plain_path: local copy of `settings.plain`.
        attn12_path: local copy of `settings.attn12`.
        cache: where rows are kept for the next final.

    Raises:
        ConfigError: an existing file is none of the taxonomy's or of another CLIP model; or CLIP cannot be loaded, or
            a name is too long for it.
        CorruptError: a cached row is damaged.
    """
    taxonomy, extras = _by_category_id(classes)
    paths: Mapping[Form, Path | None] = {"plain": plain_path, "attn12": attn12_path}
    existing = {form: read_embeddings(path, len(taxonomy)) for form, path in paths.items() if path is not None}
    wanted: dict[Form, tuple[str, ...]] = {form: extras if form in existing else (*taxonomy, *extras) for form in FORMS}
    groups = tuple(BACKGROUND) if settings.background else ()
    if settings.clip is None:
        return _write_existing(out, existing, wanted, groups)

    maker = _RowMaker(settings.clip, cache)
    files = list[str]()
    for form in FORMS:
        made = maker.rows(form, [class_prompts(name) for name in wanted[form]])
        if len(taxonomy) and form in existing and len(made):
            _check_space(maker, form, existing[form], taxonomy, paths[form])
        if parts := [part for part in (existing.get(form), made) if part is not None and len(part)]:
            files.append(_write(out, CLASSES[form], np.concatenate(parts)))
        if groups:
            files.append(_write(out, GROUPS[form], maker.rows(form, [BACKGROUND[group] for group in groups])))
    return Embeddings(tuple(sorted(files)), {})


def encoder_digest(clip: Path) -> str:
    """Return the SHA-256, as hex, of what makes the rows; whatever digests a final's input should cover it.

    Raises:
        ConfigError: there is no such folder, or it is empty.
    """
    return content_digest(clip)


def read_embeddings(path: Path, rows: int) -> Rows:
    """Read an existing file with a row for each class of the taxonomy.

    Raises:
        ConfigError: it is not such a file; says what differs.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"embeddings {path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise ConfigError(f"embeddings {path}: not a .npy file of numbers: {error}") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ConfigError(f"embeddings {path}: an .npz archive; unpack it and name the .npy file")
    if found.dtype != np.float16:
        raise ConfigError(f"embeddings {path}: {found.dtype} instead of float16, so rows cannot be kept bit for bit")
    if found.ndim != 2 or not found.shape[1]:
        raise ConfigError(f"embeddings {path}: has shape {found.shape}, expected (classes, features)")
    if len(found) != rows:
        raise ConfigError(
            f"embeddings {path}: {len(found)} rows, but the taxonomy has {rows} classes; name the file that was made "
            "for this taxonomy, without classes that a run brought"
        )
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        raise ConfigError(f"embeddings {path}: row {bad[0]} (of {len(bad)} such) is not finite; make the file again")
    return found


def _by_category_id(classes: ClassList) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the taxonomy and of the extra classes, each in the order of category ids."""
    entries = sorted(classes.classes, key=lambda entry: entry.category_id)
    first = len(classes.taxonomy)
    assert all(entry.origin == "extra" for entry in entries[first:]), "new ids lie behind the taxonomy's"
    return tuple(entry.name for entry in entries[:first]), tuple(entry.name for entry in entries[first:])


def _write_existing(
    out: FinalWriter, existing: Mapping[Form, Rows], wanted: Mapping[Form, tuple[str, ...]], groups: tuple[str, ...]
) -> Embeddings:
    """Write the files that need no new row."""
    files, missing = list[str](), dict[str, tuple[str, ...]]()
    for form in FORMS:
        if wanted[form]:
            missing[CLASSES[form]] = wanted[form]
        elif form in existing:
            files.append(_write(out, CLASSES[form], existing[form]))
        if groups:
            missing[GROUPS[form]] = groups
    return Embeddings(tuple(files), missing)


def _check_space(maker: "_RowMaker", form: Form, existing: Rows, taxonomy: Sequence[str], path: Path | None) -> None:
    """Refuse to append rows to those of another CLIP model, or of classes in another order.

    The first and the last class are made again and compared.

    Raises:
        ConfigError: a row is not what the model makes of its class.
    """
    for index in (0, len(taxonomy) - 1):
        expected = maker.rows(form, [class_prompts(taxonomy[index])])[0].astype(np.float64)
        row = existing[index].astype(np.float64)
        if row.shape != expected.shape:
            raise ConfigError(
                f"embeddings {path}: {len(row)} columns, but {maker.folder} makes {len(expected)}; name the CLIP model "
                "that made the file"
            )
        length = float(np.linalg.norm(row) * np.linalg.norm(expected))
        cosine = float(row @ expected) / length if length else 0.0
        if cosine < SAME_SPACE:
            raise ConfigError(
                f"embeddings {path}: row {index} is not what {maker.folder} makes of {taxonomy[index]!r} (cosine "
                f"{cosine:.3f}); name the CLIP model that made the file, in the order of category ids, or no file"
            )


def _write(out: FinalWriter, name: str, rows: Rows) -> str:
    with out.create(name) as stream:
        stream.write(_npy(rows))
    return name


def _npy(rows: Rows) -> bytes:
    """Return the bytes of a .npy file: the same for the same rows, wherever they come from."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(rows, np.dtype("<f2")), allow_pickle=False)
    return stream.getvalue()


class _RowMaker:
    """Makes rows, or finds them in the cache."""

    def __init__(self, folder: Path, cache: Store | None) -> None:
        self.folder = folder
        self._cache = cache
        self._clip: Clip | None = None
        self._found: dict[tuple[Form, Prompts], Rows] = {}

    def rows(self, form: Form, prompts: Sequence[Prompts]) -> Rows:
        """Return a row for each group of prompts; without any, (0, 0)."""
        found = [self._row(form, group) for group in prompts]
        return np.concatenate(found) if found else np.zeros((0, 0), np.float16)

    def _row(self, form: Form, prompts: Prompts) -> Rows:
        if (form, prompts) not in self._found:
            cached = self._read_cached(form, prompts)
            if cached is not None:
                self._found[form, prompts] = cached
            else:
                for each, row in self._encode(prompts):
                    self._found[each, prompts] = self._keep(each, prompts, row)
        return self._found[form, prompts]

    def _encode(self, prompts: Prompts) -> Iterator[tuple[Form, Rows]]:
        """Yield both forms of a row. One call a row, so that its bytes depend on no other class."""
        if self._clip is None:
            from mill_shared.models.clip import Clip

            # On the CPU, so that a final has the same bytes wherever it is made.
            self._clip = Clip(ClipConfig(model=self.folder, device="cpu"))
            log.info("encoding class names", clip=str(self.folder))
        features = self._clip.encode_text(prompts)
        of_form: dict[Form, NDArray[np.float32]] = {"plain": features.plain, "attn12": features.attn}
        for form, values in of_form.items():
            if not (np.isfinite(values).all() and np.linalg.norm(values, axis=1).all()):
                raise ConfigError(f"CLIP model {self.folder}: no usable feature of {prompts[0]!r}; copy it again")
            yield form, average(values)

    @cached_property
    def _encoder(self) -> str:
        return encoder_digest(self.folder)

    def _key(self, form: Form, prompts: Prompts) -> str:
        return embedding_key(self._encoder, form, hashlib.sha256("\n".join(prompts).encode()).hexdigest())

    def _read_cached(self, form: Form, prompts: Prompts) -> Rows | None:
        if self._cache is None:
            return None
        key = self._key(form, prompts)
        try:
            data = self._cache.get(key)
        except KeyMissing:
            return None
        try:
            found = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise CorruptError(f"{key}: no .npy file; delete it and finalize again") from error
        row: Rows = found
        if row.dtype != np.float16 or row.ndim != 2 or len(row) != 1 or not np.isfinite(row).all():
            raise CorruptError(f"{key}: holds no row of an embedding; delete it and finalize again")
        return row

    def _keep(self, form: Form, prompts: Prompts, row: Rows) -> Rows:
        """Put a row into the cache; where another one came first, return that one."""
        if self._cache is None:
            return row
        try:
            self._cache.put_new(self._key(form, prompts), _npy(row))
        except AlreadyExists:  # by another machine, which rounds otherwise; from now on every final has its row
            first = self._read_cached(form, prompts)
            return row if first is None else first
        return row


def average(features: NDArray[np.float32]) -> Rows:
    """Return (1, D): the mean of (N, D) features, each normalised before and the mean after."""
    wide = features.astype(np.float64)
    mean = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).mean(axis=0, keepdims=True)
    rows: Rows = (mean / np.linalg.norm(mean)).astype(np.float16)
    return rows


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED_IN_NOTES
    return ", ".join(names[:NAMED_IN_NOTES]) + (f" and {more} more" if more > 0 else "")
