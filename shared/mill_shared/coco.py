"""COCO files as a stream: read, check, count, copy with changes. A file is never in memory as a whole.

A file is read in blocks. An array of objects is cut where one object ends and the next begins; the cut is a guess that
decoding proves, since text that ends inside a string or a nested value is not JSON. Where the guess fails, brackets
are counted instead.

Boxes are x0, y0, x1, y1 in memory and x, y, width, height in the file; the conversions live here.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from mill_shared.errors import ConfigError
from mill_shared.presets import base_class_names, taxonomy_names

BLOCK_BYTES = 2**20
"""How much is read and decoded at once; other threads wait that long."""
COPY_BYTES = 2**20
"""Larger blocks cost twice the time: each is fresh memory from the system, page by page."""
GUESS_BYTES = 2**16
"""How far from its end a block is searched for a place to cut."""
NAMED_IN_ERRORS = 5

Xywh = tuple[float, float, float, float]
Xyxy = tuple[float, float, float, float]


class CocoCategory(msgspec.Struct, frozen=True):
    """An entry of `categories`."""

    id: int
    name: str
    supercategory: str = ""


class CocoImage(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """An entry of `images`. What is not known is left out when it is written."""

    id: int
    file_name: str = ""
    width: int | None = None
    height: int | None = None


class CocoAnnotation(msgspec.Struct, frozen=True, gc=False):
    """An entry of `annotations`, without its outline."""

    id: int
    image_id: int
    category_id: int
    bbox: Xywh | None = None
    iscrowd: int | bool = 0


IMAGES = msgspec.json.Decoder(list[CocoImage])
ANNOTATIONS = msgspec.json.Decoder(list[CocoAnnotation])
CATEGORIES = msgspec.json.Decoder(list[CocoCategory])
TEXTS = msgspec.json.Decoder(list[msgspec.Raw])
"""The objects as they stand."""


def xywh_to_xyxy(bbox_xywh: Xywh) -> Xyxy:
    """Return a COCO box as corners."""
    x, y, width, height = bbox_xywh
    return (x, y, x + width, y + height)


def xyxy_to_xywh(box_xyxy: Xyxy) -> Xywh:
    """Return corners as a COCO box."""
    x0, y0, x1, y1 = box_xyxy
    return (x0, y0, x1 - x0, y1 - y0)


@dataclass(frozen=True)
class Slice:
    """Some consecutive objects of a top-level array."""

    section: str
    start: int
    """Offset in the file."""
    text: bytes
    """The objects as they stand, with the commas between them."""
    items: list[Any]
    """What the section's decoder made of them."""


@dataclass(frozen=True)
class Section:
    """A top-level value. Comes after its slices."""

    name: str
    start: int
    """Offset of its first byte; for an array that is the opening bracket."""
    end: int
    """Offset behind its last byte."""


_SPACE = b" \t\n\r"
_NO_SPACE = re.compile(rb"[^ \t\n\r]")
_BOUNDARY = re.compile(rb"\}(?=[ \t\n\r]*,[ \t\n\r]*\{)")
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*\\?("|\Z)|[\[\]{}]', re.DOTALL)
"""A string or a bracket. The group is empty where a string goes on behind the window."""
_AFTER_SCALAR = re.compile(rb"[,\]} \t\n\r]")


class _Reader:
    """A window on a JSON file that only moves forward."""

    def __init__(self, stream: BinaryIO, name: str, digest: "hashlib._Hash | None", block_bytes: int) -> None:
        self._stream, self._name, self._digest, self._block_bytes = stream, name, digest, block_bytes
        self.window = b""
        self.at = 0
        """Where reading goes on, in the window."""
        self._start = 0

    @property
    def offset(self) -> int:
        """Where reading goes on, in the file."""
        return self._start + self.at

    def fault(self, why: object) -> ConfigError:
        return ConfigError(f"{self._name}: not a COCO file: {why}, near byte {self.offset}")

    def _append(self) -> bool:
        """Forget what was passed and append a block; False at the end of the file."""
        block = self._stream.read(self._block_bytes)
        if self._digest is not None:
            self._digest.update(block)
        self._start += self.at
        self.window, self.at = self.window[self.at :] + block, 0
        return bool(block)

    def more(self) -> None:
        if not self._append():
            raise self.fault("the file ends in the middle; is it whole?")

    def fill(self) -> None:
        while len(self.window) - self.at < self._block_bytes and self._append():
            pass

    def peek(self) -> bytes:
        """Pass white space and return the next byte without passing it."""
        while not (found := _NO_SPACE.search(self.window, self.at)):
            self.at = len(self.window)
            self.more()
        self.at = found.start()
        return found[0]

    def take(self, *wanted: bytes) -> bytes:
        """Pass white space and one of the wanted bytes, and return it."""
        found = self.peek()
        if found not in wanted:
            raise self.fault(f"expected {b' or '.join(wanted).decode()}, found {found.decode('latin-1')}")
        self.at += 1
        return found

    def key(self) -> str:
        """Pass the key of an object's entry and its colon."""
        if self.peek() != b'"':
            raise self.fault("expected a key in double quotes")
        while not (token := _TOKEN.match(self.window, self.at)) or not token[1]:
            self.more()
        try:
            name = msgspec.json.decode(token[0], type=str)
        except msgspec.DecodeError as error:
            raise self.fault(error) from error
        self.at = token.end()
        self.take(b":")
        return name

    def skip(self, depth: int) -> None:
        """Pass a value, or the rest of one that is open this deep."""
        if depth == 0 and self.peek() not in b'"[{':
            while not (found := _AFTER_SCALAR.search(self.window, self.at)):
                self.at = len(self.window)
                self.more()
            self.at = found.start()
            return
        while True:
            token = _TOKEN.search(self.window, self.at)
            if token is None or token[1] == b"":
                self.at = len(self.window) if token is None else token.start()
                self.more()
                continue
            self.at = token.end()
            depth += {b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(token[0], 0)
            if depth == 0:
                return

    def cut(self) -> int:
        """Count brackets from the start of an object: return where the last whole one ends, or the array closes."""
        at, depth, found = self.at, 0, None
        while True:
            token = _TOKEN.search(self.window, at)
            if token is None or token[1] == b"":
                if found is not None:
                    return found
                at = (len(self.window) if token is None else token.start()) - self.at
                self.more()
                continue
            at = token.end()
            if token[0] in (b"{", b"["):
                depth += 1
            elif token[0] in (b"}", b"]"):
                depth -= 1
                if depth < 0:
                    return token.start()
                if depth == 0:
                    found = at

    def guess(self) -> int | None:
        """Return where an object of the array seems to end, near the window's end."""
        places = [
            found.end() for found in _BOUNDARY.finditer(self.window, max(self.at, len(self.window) - GUESS_BYTES))
        ]
        return places[-1] if places else None

    def finish(self) -> None:
        """Read to the end and check that nothing follows."""
        while True:
            if _NO_SPACE.search(self.window, self.at):
                raise self.fault("something follows the closing bracket")
            self.at = len(self.window)
            if not self._append():
                return


def _read_array(reader: _Reader, section: str, decoder: "msgspec.json.Decoder[list[Any]]") -> Iterator[Slice]:
    """Yield the objects of an array, from behind its opening bracket to behind its closing one."""
    count = 0
    if reader.peek() == b"]":
        reader.at += 1
        return
    while True:
        reader.peek()
        reader.fill()
        try:
            end = reader.guess()
            try:
                items = None if end is None else decoder.decode(b"[%b]" % reader.window[reader.at : end])
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:
                items = None
            if end is None or items is None:
                end = reader.cut()
                items = decoder.decode(b"[%b]" % reader.window[reader.at : end])
        except msgspec.DecodeError as error:
            after = f" behind the first {count}" if count else ""
            raise reader.fault(f"{section}{after}: {error}") from error
        if not items:
            raise reader.fault(f"{section}: a comma before ]")
        count += len(items)
        piece = Slice(section, reader.offset, reader.window[reader.at : end].rstrip(_SPACE), items)
        reader.at = end
        yield piece
        if reader.take(b",", b"]") == b"]":
            return


def read_sections(
    path: Path, decoders: "Mapping[str, msgspec.json.Decoder[list[Any]]]", *, digest: "hashlib._Hash | None" = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Slice | Section]:  # fmt: skip
    """Yield the slices of the wanted arrays and, behind its slices, every top-level value, in the file's order.

    Args:
        path: a JSON file that holds one object.
        decoders: section -> what its objects are.
        digest: is fed with the file.
        block_bytes: how much is read at once; an object may be larger.

    Raises:
        ConfigError: the file cannot be read, is no such JSON, lacks a wanted section or has one twice, or an object is
            not of its type.
    """
    try:
        stream = path.open("rb", buffering=0)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    with stream:
        reader = _Reader(stream, str(path), digest, block_bytes)
        reader.take(b"{")
        seen = set[str]()
        while reader.peek() != b"}":
            if seen:
                reader.take(b",")
            name = reader.key()
            if name in seen:
                raise reader.fault(f"two sections are called {name}")
            seen.add(name)
            is_array = reader.peek() == b"["
            start = reader.offset
            if not is_array:
                if name in decoders:
                    raise reader.fault(f"{name} is no list")
                reader.skip(0)
            else:
                reader.take(b"[")
                if name in decoders or reader.peek() == b"{":
                    for piece in _read_array(reader, name, decoders.get(name, TEXTS)):
                        if name in decoders:
                            yield piece
                else:
                    reader.skip(1)
            yield Section(name, start, reader.offset)
        reader.take(b"}")
        reader.finish()
        missing = sorted(decoders.keys() - seen)
        if missing:
            raise ConfigError(f"{path}: not a COCO file: it has no section {' and no section '.join(missing)}")


def iterate_annotations(path: Path) -> Iterator[list[CocoAnnotation]]:
    """Yield the annotations of a COCO file, some thousand at a time. Errors as in `read_sections`."""
    for piece in read_sections(path, {"annotations": ANNOTATIONS}):
        if isinstance(piece, Slice):
            yield piece.items


def _read_all(path: Path, section: str, decoder: "msgspec.json.Decoder[list[Any]]") -> list[Any]:
    found = list[Any]()
    for piece in read_sections(path, {section: decoder}):
        if isinstance(piece, Slice):
            found += piece.items
        elif piece.name == section:
            break
    return found


def read_images(path: Path) -> list[CocoImage]:
    """Return the images of a COCO file. Errors as in `read_sections`."""
    return _read_all(path, "images", IMAGES)


def read_categories(path: Path) -> list[CocoCategory]:
    """Return the categories of a COCO file. Errors as in `read_sections`."""
    return _read_all(path, "categories", CATEGORIES)


# The scanned file


@dataclass(frozen=True)
class CocoFile:
    """What a COCO file holds, without the outlines, and where. Arrays are in the file's order."""

    path: Path
    sha256: str
    categories: tuple[CocoCategory, ...]
    image_ids: NDArray[np.int64]
    image_sizes: NDArray[np.int32]
    """(N, 2) width, height; 0 where the file says none."""
    ids: NDArray[np.int64]
    image_of: NDArray[np.int64]
    """Image id of each annotation."""
    category_of: NDArray[np.int64]
    """Category id of each annotation."""
    boxes_xyxy: NDArray[np.float64]
    """(N, 4), pixels; NaN where an annotation has no box."""
    crowd: NDArray[np.bool_]
    faults: Mapping[str, int]
    """What is wrong with the file and how often; it is left alone."""
    sections: tuple[Section, ...]
    slices: tuple[tuple[int, int, int, int], ...]
    """(first byte, behind the last byte, first annotation, behind the last annotation) of each slice."""


def scan_coco(path: Path, *, block_bytes: int = BLOCK_BYTES) -> CocoFile:
    """Read a COCO file once, in flat memory but for a few numbers an annotation. Errors as in `read_sections`."""
    decoders: dict[str, Any] = {"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES}
    digest = hashlib.sha256()
    categories: list[CocoCategory] = []
    image_ids, sizes, ids, image_of, category_of, boxes, crowd = (list[NDArray[Any]]() for _ in range(7))
    sections, slices = list[Section](), list[tuple[int, int, int, int]]()
    first = 0
    no_box = (np.nan, np.nan, np.nan, np.nan)
    for piece in read_sections(path, decoders, digest=digest, block_bytes=block_bytes):
        if isinstance(piece, Section):
            sections.append(piece)
            continue
        items, count = piece.items, len(piece.items)
        if piece.section == "categories":
            categories += items
        elif piece.section == "images":
            image_ids.append(np.fromiter((image.id for image in items), np.int64, count))
            sizes.append(np.array([(image.width or 0, image.height or 0) for image in items], np.int32))
        else:
            slices.append((piece.start, piece.start + len(piece.text), first, first + count))
            first += count
            ids.append(np.fromiter([item.id for item in items], np.int64, count))
            image_of.append(np.fromiter([item.image_id for item in items], np.int64, count))
            category_of.append(np.fromiter([item.category_id for item in items], np.int64, count))
            crowd.append(np.fromiter([item.iscrowd for item in items], np.bool_, count))
            boxes.append(np.array([item.bbox or no_box for item in items], np.float64))
    all_boxes = _joined(boxes, (0, 4), np.float64)
    flat = int(np.count_nonzero((all_boxes[:, 2:] <= 0).any(axis=1)))
    all_boxes[:, 2:] += all_boxes[:, :2]
    found = CocoFile(
        path=path, sha256=digest.hexdigest(), categories=tuple(categories),
        image_ids=_joined(image_ids, (0,), np.int64), image_sizes=_joined(sizes, (0, 2), np.int32),
        ids=_joined(ids, (0,), np.int64), image_of=_joined(image_of, (0,), np.int64),
        category_of=_joined(category_of, (0,), np.int64), boxes_xyxy=all_boxes,
        crowd=_joined(crowd, (0,), np.bool_), faults={}, sections=tuple(sections), slices=tuple(slices),
    )  # fmt: skip
    listed = [category.id for category in categories]
    faults = {
        "annotations without a bbox": int(np.count_nonzero(np.isnan(all_boxes[:, 0]))),
        "annotations with a box of no width or height": flat,
        "annotations of images that it does not list": int(np.count_nonzero(~np.isin(found.image_of, found.image_ids))),
        "annotations of categories that it does not list": int(np.count_nonzero(~np.isin(found.category_of, listed))),
        "annotations with the id of another": _repeated(found.ids),
        "images with the id of another": _repeated(found.image_ids),
    }
    return replace(found, faults={what: count for what, count in faults.items() if count})


def _joined(parts: list[NDArray[Any]], empty: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return the parts as one array, and let go of them."""
    whole = np.concatenate(parts) if parts else np.zeros(empty, dtype)
    parts.clear()
    return whole


def _repeated(ids: NDArray[np.int64]) -> int:
    ordered = np.sort(ids)
    return int(np.count_nonzero(ordered[1:] == ordered[:-1]))


class CocoCopy:
    """Writes a COCO file again with some annotations left out and others, and categories, added. The rest is copied.

    In two steps, so that the first can go on while the new annotations are still being made.
    """

    def __init__(self, scanned: CocoFile, out: BinaryIO, keep: NDArray[np.bool_]) -> None:
        """Prepare a copy.

        Args:
            scanned: the file.
            out: where to.
            keep: (annotations of the file,) which of them stay.
        """
        self._scanned, self._out, self._keep = scanned, out, keep
        sections = {section.name: section for section in scanned.sections}
        inside = sections["annotations"].start + 1
        self._annotations = (scanned.slices[0][0], scanned.slices[-1][1]) if scanned.slices else (inside, inside)
        self._end_of_categories = sections["categories"].end - 1
        self._categories_first = self._end_of_categories < inside
        self._done = 0
        self._wrote = False

    def begin(self) -> None:
        """Write all that comes before the first place where something may be added."""
        with self._scanned.path.open("rb", buffering=0) as source:
            if self._categories_first:
                self._copy(source, self._end_of_categories)
            else:
                self._copy_annotations(source)

    def finish(self, annotations: Iterable[bytes] = (), categories: Sequence[CocoCategory] = ()) -> None:
        """Write the rest.

        Args:
            annotations: JSON text of new ones, in pieces; each object with a comma before it.
            categories: new ones.
        """
        with self._scanned.path.open("rb", buffering=0) as source:
            if self._categories_first:
                self._add_categories(categories)
                self._copy_annotations(source)
            for piece in annotations:
                if piece:
                    self._out.write(piece if self._wrote else piece[1:])
                    self._wrote = True
            if not self._categories_first:
                self._copy(source, self._end_of_categories)
                self._add_categories(categories)
            self._copy(source, self._scanned.path.stat().st_size)

    def _copy(self, source: BinaryIO, end: int) -> None:
        """Copy what is not copied yet, up to an offset."""
        source.seek(self._done)
        while self._done < end:
            block = source.read(min(COPY_BYTES, end - self._done))
            if not block:
                raise ConfigError(f"{self._scanned.path}: became shorter while it was read")
            self._out.write(block)
            self._done += len(block)

    def _add_categories(self, categories: Sequence[CocoCategory]) -> None:
        texts = [msgspec.json.encode(category) for category in categories]
        self._out.write(b"," if texts and self._scanned.categories else b"")
        self._out.write(b",".join(texts))

    def _copy_annotations(self, source: BinaryIO) -> None:
        """Write the kept annotations as they stand; runs of slices that are kept whole go out without a look."""
        first_byte, end_byte = self._annotations
        self._copy(source, first_byte)
        run: tuple[int, int] | None = None
        for start, end, first, last in [*self._scanned.slices, (end_byte, end_byte, 0, 0)]:
            kept = self._keep[first:last]
            if first < last and kept.all():
                run = (start if run is None else run[0], end)
                continue
            if run is not None:
                self._comma()
                self._done = run[0]
                self._copy(source, run[1])
                run = None
            if kept.any():
                source.seek(start)
                texts = TEXTS.decode(b"[%b]" % source.read(end - start))
                self._comma()
                self._out.write(b",".join(text for text, stays in zip(texts, kept.tolist(), strict=True) if stays))
        self._done = end_byte

    def _comma(self) -> None:
        self._out.write(b"," if self._wrote else b"")
        self._wrote = True


def write_coco(
    out: BinaryIO, images: Iterable[CocoImage], annotations: Iterable[bytes], categories: Iterable[CocoCategory]
) -> None:
    """Write a new COCO file; annotations as in `CocoCopy.finish`."""
    parts = (
        (b'{"images":[', (b"," + msgspec.json.encode(image) for image in images)),
        (b'],"annotations":[', annotations),
        (b'],"categories":[', (b"," + msgspec.json.encode(category) for category in categories)),
    )
    for opening, pieces in parts:
        out.write(opening)
        wrote = False
        for piece in pieces:
            if piece:
                out.write(piece if wrote else piece[1:])
                wrote = True
    out.write(b"]}")


# The truth that a final keeps


@dataclass(frozen=True)
class CocoBase:
    """The known classes, and the file whose annotations of base classes are kept."""

    categories: tuple[CocoCategory, ...]
    """The taxonomy with its ids, ascending."""
    base: tuple[str, ...]
    """Classes whose annotations are kept; part of the taxonomy. Empty where none were declared."""
    file: CocoFile | None = None

    @property
    def taxonomy(self) -> tuple[str, ...]:
        """The known classes, in order."""
        return tuple(category.name for category in self.categories)

    def kept(self) -> NDArray[np.bool_]:
        """Return which annotations of the file are of base classes."""
        assert self.file is not None, "only a file has annotations"
        return np.isin(
            self.file.category_of, [category.id for category in self.categories if category.name in self.base]
        )


def _repeats(values: Sequence[Any]) -> list[str]:
    return [str(value) for value in dict.fromkeys(values) if values.count(value) > 1]


def _named(names: Sequence[str]) -> str:
    more = len(names) - NAMED_IN_ERRORS
    return ", ".join(names[:NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")


def open_base(
    path: Path | None,
    taxonomy: Sequence[str] | Literal["coco-80"] | None,
    base_classes: Sequence[str] | Literal["ov-coco-48"] | None,
) -> CocoBase | None:
    """Read the base file, where there is one, and settle the known classes.

    Args:
        path: a COCO file on this disk.
        taxonomy: known classes in order, or a preset. With a file they must be its categories by id; without one they
            get the ids 1 to n.
        base_classes: names, or a preset. Without a file and a taxonomy they are all that is known.

    Returns:
        None where nothing is given.

    Raises:
        ConfigError: says what is wrong with the file or the names.
    """
    known = None if taxonomy is None else taxonomy_names(taxonomy)
    base = None if base_classes is None else base_class_names(base_classes)
    for what, names in (("taxonomy", known), ("base classes", base)):
        if names is not None and _repeats(names):
            raise ConfigError(f"{what}: listed twice: {_named(_repeats(names))}")
    if path is not None and not base:
        raise ConfigError(
            f"base classes are not set: name those whose annotations in {path} are kept, e.g. ov-coco-48; they are "
            "never inferred"
        )
    if path is not None:
        file = scan_coco(path)
        categories, where = _checked_categories(file, known), f"categories of {path}"
    else:
        file = None
        names = known or base
        if not names:
            return None
        categories, where = tuple(CocoCategory(number, name) for number, name in enumerate(names, 1)), "taxonomy"
    missing = [name for name in base or () if name not in {category.name for category in categories}]
    if missing:
        raise ConfigError(f"base classes: not in the {where}: {_named(missing)}")
    return CocoBase(categories, base or (), file)


def _checked_categories(file: CocoFile, known: tuple[str, ...] | None) -> tuple[CocoCategory, ...]:
    categories = file.categories
    for what, values in (
        ("id", [category.id for category in categories]),
        ("name", [category.name for category in categories]),
    ):
        if _repeats(values):
            raise ConfigError(f"{file.path}: two categories have one {what}: {_named(_repeats(values))}")
    if list(categories) != sorted(categories, key=lambda category: category.id):
        raise ConfigError(
            f"{file.path}: the categories are not in ascending order of their ids; sort them, since trainers take the "
            "order of the classes from the list or from the ids"
        )
    names = tuple(category.name for category in categories)
    if known is None or known == names:
        return categories
    for what, found in (
        ("it lacks", [name for name in known if name not in names]),
        ("it also has", [name for name in names if name not in known]),
    ):
        if found:
            raise ConfigError(
                f"taxonomy: differs from the categories of {file.path}: {what} {_named(found)}; leave the taxonomy "
                "out, or mend the file"
            )
    raise ConfigError(f"taxonomy: not in the order of the category ids of {file.path}")


def annotations_per_class(base: CocoBase, image_ids: Collection[int] | None) -> dict[str, int]:
    """Count the kept annotations of each base class.

    Args:
        base: the truth that is kept.
        image_ids: only on these images; None for all.

    Returns:
        Name -> count, without the classes that have none.
    """
    if base.file is None:
        return {}
    kept = base.kept()
    if image_ids is not None:
        kept &= np.isin(base.file.image_of, np.fromiter(image_ids, np.int64, len(image_ids)))
    ids, counts = np.unique_counts(base.file.category_of[kept])
    found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return {category.name: found[category.id] for category in base.categories if category.id in found}


@dataclass(frozen=True)
class SplitCounts:
    """Annotations written to each file."""

    base: int
    novel: int


def split_coco(path: Path, base_names: Sequence[str], base_path: Path, novel_path: Path) -> SplitCounts:
    """Write two copies of a COCO file: one with the base classes' annotations, one with all others.

    Images and categories stay in both, so that ids and image lists agree. Source: specs/cotpl.md 2.3 and 6.

    Raises:
        ConfigError: a name is not among the file's categories, or an output is the input.
    """
    for target in (base_path, novel_path):
        if target.resolve() == path.resolve():
            raise ConfigError(f"{target}: is the file to be split; choose another name")
    if base_path.resolve() == novel_path.resolve():
        raise ConfigError(f"{base_path}: is named for both files; choose two names")
    base = open_base(path, None, base_names)
    assert base is not None
    assert base.file is not None
    kept = base.kept()
    for target, keep in ((base_path, kept), (novel_path, ~kept)):
        with target.open("wb") as out:
            copy = CocoCopy(base.file, out, keep)
            copy.begin()
            copy.finish()
    return SplitCounts(int(kept.sum()), int((~kept).sum()))
