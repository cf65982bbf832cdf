"""The invariants that a trainer depends on, tested on the bytes of a bundle. Source: specs/cotpl.md 5.3.

A trainer takes labels from the order of the JSON's categories, weights from the order of its class list and embeddings
from the order of category ids, all without a word. So every list that names classes is compared with every other.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from mill_jobs.trainer.bundle import EMBEDDING_ROWS, Rows, row_digests
from mill_jobs.trainer.classes import ClassList, Weights, make_weights
from mill_jobs.trainer.config import BaronTrainer, MmdetTrainer, NoTrainer, TrainerConfig
from mill_shared.coco import CATEGORIES, IMAGES, CocoCategory, Slice, Xywh, read_sections
from mill_shared.errors import ConfigError
from mill_shared.geometry import Rle, mask_areas
from mill_shared.presets import COCO_80

INSTANCES, CLASSES, WEIGHTS, REGIONS, MANIFEST = (
    "instances.json", "classes.json", "weights.json", "regions.parquet", "manifest.json",
)  # fmt: skip
NAMED = 5
"""How many classes or annotations a fault names."""
AREA_TOLERANCE = 0.011
"""Areas are written with two decimals."""
READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Checked:
    """What is wrong with a bundle."""

    faults: tuple[str, ...]
    """What a trainer would stumble over, or silently learn wrongly."""
    warnings: tuple[str, ...]
    """What came with the user's own base file and was left alone."""
    annotations: int
    classes: int


class _Annotation(msgspec.Struct, frozen=True, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: Xywh | None = None
    area: float | None = None
    iscrowd: int | bool = 0
    segmentation: msgspec.Raw = msgspec.Raw(b"")


_ANNOTATIONS = msgspec.json.Decoder(list[_Annotation])


class _Outline(msgspec.Struct, frozen=True):
    size: tuple[int, int]
    counts: str


class _Entry(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True):
    files: list[_Entry]
    finalize: dict[str, Any] = {}


def check_bundle(folder: Path, trainer: TrainerConfig | None = None) -> Checked:
    """Test every invariant of a bundle.

    Args:
        folder: the files of a final, as `mill fetch` leaves them. Digests are tested where there is a manifest.
        trainer: what the bundle is made for. Default: what the manifest says, else none.

    Raises:
        ConfigError: the folder holds no bundle, or a file of it cannot be read.
    """
    faults = list[str]()
    manifest = _read_manifest(folder)
    if manifest is not None:
        faults += check_digests(folder, manifest)
        trainer = trainer or _trainer_of(folder, manifest)
    classes = ClassList.from_json(_read(folder / CLASSES), str(folder / CLASSES))
    faults += check_classes(classes)
    faults += check_weights(classes, _decoded(folder / WEIGHTS, Weights))
    if isinstance(trainer, BaronTrainer) and classes.taxonomy != COCO_80:
        faults.append(
            f"{CLASSES}: a BARON head takes the first 80 rows for COCO's classes, but the taxonomy is another"
        )
    faults += check_embeddings(folder, classes)
    found, warnings, annotations = check_instances(folder, classes)
    if trainer is not None and not isinstance(trainer, NoTrainer):
        resolved, unresolved = check_configs(folder, classes, trainer)
        faults, warnings = [*faults, *resolved], [*warnings, *unresolved]
    return Checked((*faults, *found), tuple(warnings), annotations, len(classes.classes))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); a bundle is what `mill fetch` brings") from error


def _decoded(path: Path, wanted: type[Any]) -> Any:
    try:
        return msgspec.json.decode(_read(path), type=wanted)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}; fetch the bundle again") from error


def _read_manifest(folder: Path) -> _Manifest | None:
    found: _Manifest | None = _decoded(folder / MANIFEST, _Manifest) if (folder / MANIFEST).exists() else None
    return found


def _trainer_of(folder: Path, manifest: _Manifest) -> TrainerConfig:
    named = manifest.finalize.get("finalize", {}).get("trainer", {"kind": "none"})
    try:
        return TypeAdapter[TrainerConfig](TrainerConfig).validate_python(named)
    except ValidationError as error:
        raise ConfigError(f"{folder / MANIFEST}: {' '.join(str(error).split())}; fetch the bundle again") from error


# Files and classes


def check_digests(folder: Path, manifest: _Manifest) -> Iterator[str]:
    """Yield the files of a manifest that are missing or changed."""
    for entry in manifest.files:
        path = folder / entry.name
        if not path.is_file():
            yield f"{entry.name}: missing; fetch the bundle again"
            continue
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
        if digest.hexdigest() != entry.sha256:
            yield f"{entry.name}: its SHA-256 is not the manifest's; it was changed or damaged, fetch the bundle again"


def check_classes(classes: ClassList) -> Iterator[str]:
    """Yield what is wrong with the class list itself."""
    entries = classes.classes
    names, ids = [entry.name for entry in entries], [entry.category_id for entry in entries]
    for what, values in (("name", names), ("category id", ids)):
        twice = [str(value) for value, count in Counter(values).items() if count > 1]
        if twice:
            yield f"{CLASSES}: two classes have one {what}: {_some(twice)}"
    if ids != sorted(ids):
        yield f"{CLASSES}: the category ids do not ascend, so that embeddings and weights come in different orders"
    if tuple(names[: len(classes.taxonomy)]) != classes.taxonomy:
        yield f"{CLASSES}: the classes do not begin with the taxonomy in its order"
    blank = [repr(name) for name in names if name != name.strip() or not name]
    if blank:
        yield f"{CLASSES}: a trainer takes {_some(blank)} for another name than the one without blanks"
    wrong = [entry.name for entry in entries if entry.weight not in (0, 1)]
    if wrong:
        yield f"{CLASSES}: weights are 0 or 1, not so {_some(wrong)}"
    idle = [entry.name for entry in entries if entry.boxes and not entry.weight]
    if idle:
        yield f"{CLASSES}: weight 0 on classes with pseudo-labels makes the loss NaN: {_some(idle)}"


def check_weights(classes: ClassList, weights: Weights) -> Iterator[str]:
    """Yield where weights.json is not what the class list comes to."""
    expected = make_weights(classes)
    if weights.num_classes != expected.num_classes or weights.num_pls != expected.num_pls:
        yield (
            f"{WEIGHTS}: num_classes {weights.num_classes} and num_pls {weights.num_pls}, but {CLASSES} has "
            f"{expected.num_classes} and {expected.num_pls}"
        )
    if weights.extra_classes != expected.extra_classes:
        yield f"{WEIGHTS}: extra_classes are not those of {CLASSES}, in its order"
    if len(weights.class_weight) != expected.num_classes + 1:
        yield (
            f"{WEIGHTS}: {len(weights.class_weight)} class weights for {expected.num_classes} classes and the "
            "background, which comes last"
        )
    elif weights.class_weight != expected.class_weight:
        names = [*(entry.name for entry in classes.classes), "background"]
        pairs = zip(names, weights.class_weight, expected.class_weight, strict=True)
        yield f"{WEIGHTS}: not the weights of {CLASSES}: {_some([name for name, a, b in pairs if a != b])}"


def check_categories(classes: ClassList, categories: Sequence[CocoCategory]) -> Iterator[str]:
    """Yield where the JSON's categories, in the order of its list, are not the class list."""
    found = [(category.id, category.name) for category in categories]
    expected = [(entry.category_id, entry.name) for entry in classes.classes]
    twice = [name for name, count in Counter(name for _, name in found).items() if count > 1]
    if twice:
        yield f"{INSTANCES}: two categories have one name: {_some(twice)}"
    if [id_ for id_, _ in found] != sorted(id_ for id_, _ in found):
        yield f"{INSTANCES}: the categories are not in the order of their ids, so that labels and embeddings differ"
    if found == expected:
        return
    missing = [name for _, name in expected if name not in {name for _, name in found}]
    foreign = [name for _, name in found if name not in {name for _, name in expected}]
    if missing:
        yield f"{INSTANCES}: lacks the categories {_some(missing)}; every later label would shift"
    if foreign:
        yield f"{INSTANCES}: has categories that {CLASSES} does not know: {_some(foreign)}; their boxes would vanish"
    if not missing and not foreign:
        moved = [b for (_, a), (_, b) in zip(found, expected, strict=False) if a != b]
        yield f"{INSTANCES}: the categories are in another order, or have other ids, than in {CLASSES}" + (
            f": {_some(moved)}" if moved else ""
        )


# Embeddings and configs


def check_embeddings(folder: Path, classes: ClassList) -> Iterator[str]:
    """Yield what is wrong with the embedding files that the bundle has."""
    listed: Rows = _decoded(folder / EMBEDDING_ROWS, Rows) if (folder / EMBEDDING_ROWS).exists() else {}
    names = [entry.name for entry in sorted(classes.classes, key=lambda entry: entry.category_id)]
    widths = dict[str, int]()
    for path in sorted(folder.glob("*_embeddings*.npy")):
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            yield f"{path.name}: cannot be read: {error}"
            continue
        if rows.ndim != 2 or rows.dtype != np.float16 or not rows.size:
            yield f"{path.name}: {rows.dtype} of shape {rows.shape}, expected float16 with a row each"
            continue
        if not np.isfinite(rows).all():
            yield f"{path.name}: has values that are not finite"
        form = "attn12" if path.stem.endswith("attn12") else "plain"
        if widths.setdefault(form, rows.shape[1]) != rows.shape[1]:
            yield f"{path.name}: {rows.shape[1]} columns, the other file of that form has {widths[form]}"
        if not path.name.startswith("class_"):
            continue
        if len(rows) != len(names):
            yield f"{path.name}: {len(rows)} rows for {len(names)} classes"
            continue
        found = listed.get(path.name)
        if found is None:
            yield f"{path.name}: {EMBEDDING_ROWS} does not say which row is whose"
        elif [name for name, _ in found] != names:
            yield f"{path.name}: its rows are not in the order of the category ids"
        elif wrong := [name for (name, sha256), row in zip(found, row_digests(path), strict=True) if sha256 != row]:
            yield f"{path.name}: the rows of {_some(wrong)} are not those that were written for these names"
    for name in sorted(listed.keys() - {path.name for path in folder.glob("*.npy")}):
        yield f"{name}: missing; fetch the bundle again"


def check_configs(
    folder: Path, classes: ClassList, trainer: MmdetTrainer | BaronTrainer
) -> tuple[list[str], list[str]]:
    """Test what overlay and patched config come to.

    Returns:
        Faults, and what could not be tested here.
    """
    from mill_jobs.trainer.overlay import EMBEDDING_FILES
    from mill_jobs.trainer.patch import OVERLAY, PATCHED
    from mill_jobs.trainer.resolved import agreement, load_resolved

    resolved, unread = {}, []
    for name in (OVERLAY, PATCHED):
        if (folder / name).exists():
            try:
                resolved[name] = load_resolved(folder / name)
            except ConfigError as error:
                unread.append(f"not tested here: {error}")
    files = [name for name in EMBEDDING_FILES.values() if (folder / name).exists()]
    faults = agreement(
        resolved.get(OVERLAY), resolved.get(PATCHED), classes, trainer.targets, files=files,
        classes_in_code=trainer.metainfo_file is not None,
    )  # fmt: skip
    return faults, unread


# Annotations


@dataclass(frozen=True)
class _Images:
    """The listed images, by ascending id."""

    ids: NDArray[np.int64]
    sizes: NDArray[np.float64]
    """(N, 2) width, height; infinite where the file says none."""


@dataclass
class _Seen:
    """What the annotations come to. Findings are annotation ids by kind."""

    ids: list[NDArray[np.int64]] = field(default_factory=list)
    used: Counter[int] = field(default_factory=Counter)
    """Category id -> annotations."""
    written: Counter[int] = field(default_factory=Counter)
    """Category id -> pseudo-labels."""
    faults: dict[str, list[int]] = field(default_factory=dict)
    warnings: dict[str, list[int]] = field(default_factory=dict)

    def note(self, kind: str, ids: NDArray[np.int64], is_ours: NDArray[np.bool_]) -> None:
        for found, where in ((ids[is_ours], self.faults), (ids[~is_ours], self.warnings)):
            if len(found):
                where.setdefault(kind, []).extend(found.tolist())


def check_instances(folder: Path, classes: ClassList) -> tuple[list[str], list[str], int]:
    """Read instances.json once and test its categories and every annotation.

    Returns:
        Faults, warnings, and the number of annotations.
    """
    ours = pq.read_table(
        folder / REGIONS, columns=["annotation_id", "image_id", "category_id"], filters=[("fate", "==", "kept")]
    ).sort_by("annotation_id")
    written = {name: ours[name].to_numpy() for name in ours.column_names}
    decoders: dict[str, Any] = {"images": IMAGES, "annotations": _ANNOTATIONS, "categories": CATEGORIES}
    rows, categories, waiting, seen = (
        list[tuple[float, ...]](),
        list[CocoCategory](),
        list[list[_Annotation]](),
        _Seen(),
    )
    images: _Images | None = None
    for piece in read_sections(folder / INSTANCES, decoders):
        if not isinstance(piece, Slice):
            if piece.name == "images":
                images = _sorted_images(rows)
                for items in waiting:
                    _check_annotations(items, images, written, seen)
        elif piece.section == "images":
            rows += [(image.id, image.width or np.inf, image.height or np.inf) for image in piece.items]
        elif piece.section == "categories":
            categories += piece.items
        elif images is None:  # nothing says that the images come first
            waiting.append(piece.items)
        else:
            _check_annotations(piece.items, images, written, seen)
    assert images is not None, "the section was read"
    faults = [*check_categories(classes, categories), *_check_sums(classes, images, written, seen)]
    faults += [_line(kind, ids, "pseudo-labels") for kind, ids in seen.faults.items()]
    warnings = [_line(kind, ids, "annotations of the base file") for kind, ids in seen.warnings.items()]
    return faults, warnings, sum(seen.used.values())


def _sorted_images(rows: list[tuple[float, ...]]) -> _Images:
    table = np.array(rows, np.float64).reshape(-1, 3)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return _Images(table[:, 0].astype(np.int64), table[:, 1:])


def _check_annotations(
    items: list[_Annotation], images: _Images, written: dict[str, NDArray[np.int64]], seen: _Seen
) -> None:  # fmt: skip
    """Test some annotations by themselves."""
    count = len(items)
    ids = np.fromiter((item.id for item in items), np.int64, count)
    image_of = np.fromiter((item.image_id for item in items), np.int64, count)
    category_of = np.fromiter((item.category_id for item in items), np.int64, count)
    areas = np.fromiter((np.nan if item.area is None else item.area for item in items), np.float64, count)
    boxes = np.array([item.bbox or (np.nan,) * 4 for item in items], np.float64).reshape(-1, 4)
    place, is_ours = _find(written["annotation_id"], ids)
    image, is_listed = _find(images.ids, image_of)
    seen.ids.append(ids)
    seen.used.update(category_of.tolist())
    seen.written.update(category_of[is_ours].tolist())
    seen.note("lie on an image that is not listed", ids[~is_listed], is_ours[~is_listed])
    is_flat = ~(boxes[:, 2:] >= 1).all(axis=1)
    seen.note("are less than a pixel wide or high, or have no box", ids[is_flat], is_ours[is_flat])
    sizes = images.sizes[image] if len(images.ids) else np.full((count, 2), np.inf)
    ends = boxes[:, :2] + boxes[:, 2:]
    is_outside = ((boxes[:, :2] < 0) | (ends > sizes + 0.011)).any(axis=1) & is_listed
    seen.note("reach out of their image", ids[is_outside], is_ours[is_outside])
    is_without = ~(areas > 0)
    seen.note("have no area", ids[is_without], is_ours[is_without])
    expected = _expected_areas(items, boxes, is_ours)
    is_wrong = is_ours & ~is_without & ~(np.abs(areas - expected) <= AREA_TOLERANCE + 1e-6 * expected)
    seen.note("have another area than their mask or box", ids[is_wrong], is_ours[is_wrong])
    for name, found in (("image_id", image_of), ("category_id", category_of)):
        is_other = is_ours & (written[name][place] != found) if len(place) and len(written[name]) else is_ours
        seen.note(f"have another {name} than in {REGIONS}", ids[is_other], is_ours[is_other])


def _expected_areas(
    items: list[_Annotation], boxes: NDArray[np.float64], is_ours: NDArray[np.bool_]
) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = boxes[:, 2] * boxes[:, 3]
    masked = [index for index in np.flatnonzero(is_ours).tolist() if bytes(items[index].segmentation).startswith(b"{")]
    if masked:
        outlines = [msgspec.json.decode(items[index].segmentation, type=_Outline) for index in masked]
        areas[masked] = mask_areas([Rle(outline.size, outline.counts.encode()) for outline in outlines])
    return areas


def _find(ascending: NDArray[np.int64], wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where each wanted id is, or anywhere, and whether it is there."""
    if not len(ascending):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    place = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    return place, ascending[place] == wanted


def _check_sums(
    classes: ClassList, images: _Images, written: dict[str, NDArray[np.int64]], seen: _Seen
) -> Iterator[str]:  # fmt: skip
    """Yield what is wrong with the annotations as a whole."""
    ids = np.sort(np.concatenate(seen.ids)) if seen.ids else np.zeros(0, np.int64)
    for what, ordered in (("annotations", ids), ("images", images.ids)):
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if len(twice):
            yield (
                f"{INSTANCES}: {len(twice)} ids belong to several {what}, which a trainer refuses or mixes up: "
                + _some(twice.tolist())
            )
    _, is_there = _find(ids, written["annotation_id"])
    if not is_there.all():
        lost = written["annotation_id"][~is_there]
        yield f"{INSTANCES}: lacks {len(lost)} pseudo-labels of {REGIONS}: annotation {_some(lost.tolist())}"
    known = {entry.category_id for entry in classes.classes}
    foreign = sorted(seen.used.keys() - known)
    if foreign:
        yield f"{INSTANCES}: has annotations of categories that {CLASSES} does not know: {_some(foreign)}"
    idle = [entry.name for entry in classes.classes if seen.used[entry.category_id] and not entry.weight]
    if idle:
        yield f"{INSTANCES}: annotations of classes with weight 0 make the loss NaN: {_some(idle)}"
    other = [
        f"{entry.name} ({entry.boxes}, found {seen.written[entry.category_id]})"
        for entry in classes.classes
        if entry.boxes != seen.written[entry.category_id]
    ]
    if other:
        yield f"{CLASSES}: counts other pseudo-labels than {INSTANCES} has: {_some(other)}"


def _line(kind: str, ids: list[int], whose: str) -> str:
    return f"{INSTANCES}: {len(ids)} {whose} {kind}: annotation {_some(ids)}"


def _some(values: Sequence[object]) -> str:
    more = len(values) - NAMED
    return ", ".join(str(value) for value in values[:NAMED]) + (f" and {more} more" if more > 0 else "")
