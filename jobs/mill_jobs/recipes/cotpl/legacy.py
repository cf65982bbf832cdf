"""The original's files, in and out; misspelt names included: its scripts expect them. Source: specs/cotpl.md 2."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from mill_jobs.recipes.base import FinalWriter
from mill_jobs.trainer.classes import ClassList, printed_classes, printed_weights
from mill_shared.coco import TEXTS, Section, read_sections, xywh_to_xyxy, xyxy_to_xywh
from mill_shared.errors import ConfigError
from mill_shared.records import Region

RAW = "raw_psuedo_labels.json"
UNSEEN = "unseen_psuedo_labels.json"
TOPK = "topk_unseen_psuedo_labels.json"
COCO = "instances_train2017_pseudo.json"
STAGE_3 = "stage3.txt"
STAGE_6 = "stage6.txt"

Number = int | float
Bbox = tuple[Number, Number, Number, Number]

# Shards in


class _Layer(msgspec.Struct, frozen=True):
    bbox: list[Bbox] = []
    category: list[str] = []


class _Entry(msgspec.Struct, frozen=True):
    foreground: _Layer
    background: _Layer = _Layer()


@dataclass(frozen=True)
class LegacyImage:
    """One image's labels. Foreground first, then background, each in the file's order."""

    image_id: int
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class LegacyShards:
    """Shard files of the original, looked through once."""

    files: tuple[Path, ...]
    """Those that can be read, in the order of merging."""
    image_ids: tuple[int, ...]
    """In the order of the merged file: where an image first appears."""
    replaced: tuple[tuple[int, Path, Path], ...]
    """(image, file whose labels were replaced, file whose labels count)."""
    broken: tuple[tuple[Path, str], ...]
    """Files that were left out, and why."""


def shard_files(folder: Path) -> list[Path]:
    """Return the shard files of a folder in the order of the numbers in their names; others follow by name.

    Raises:
        ConfigError: there is none.
    """
    found = [path for path in folder.iterdir() if path.name.endswith(".json") and path.is_file()]
    if not found:
        raise ConfigError(f"{folder}: no shard files (*.json)")
    numbers = {path: int(path.stem) if path.stem.isdecimal() else None for path in found}
    return sorted(found, key=lambda path: (numbers[path] is None, numbers[path] or 0, path.name))


def _read_shard(path: Path) -> dict[int, _Entry]:
    """Raises ConfigError with what is wrong, without the file's name."""
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=dict[str, _Entry])
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"not a shard of the original: {error}") from error
    found = {}
    for key, entry in entries.items():
        if not key.isdecimal():
            raise ConfigError(f"image id {key!r} is no number")
        boxes, names = len(entry.foreground.bbox), len(entry.foreground.category)
        if boxes != names or len(entry.background.category) > len(entry.background.bbox):
            raise ConfigError(f"image {key}: the lists of boxes and names differ in length")
        found[int(key)] = entry
    return found


def open_shards(files: Sequence[Path], *, skip_broken: bool = False) -> LegacyShards:
    """Look through shard files and settle the order. Source: specs/cotpl.md 3, stage 1.

    Args:
        files: in the order of merging: of an image that is in two files the later labels count, in the earlier place.
        skip_broken: leave out files that cannot be read, and report them.

    Raises:
        ConfigError: names a file that is truncated or no shard.
    """
    source: dict[int, Path] = {}
    replaced, broken, usable = [], [], []
    for path in files:
        try:
            entries = _read_shard(path)
        except ConfigError as error:
            if not skip_broken:
                raise ConfigError(f"{path}: {error}") from error
            broken.append((path, str(error)))
            continue
        usable.append(path)
        for image_id in entries:
            if image_id in source:
                replaced.append((image_id, source[image_id], path))
            source[image_id] = path
    return LegacyShards(tuple(usable), tuple(source), tuple(replaced), tuple(broken))


def read_shards(shards: LegacyShards) -> Iterator[LegacyImage]:
    """Yield the images in the order of the merged file. One shard is in memory at a time, beside replaced images."""
    later = {image_id: path for image_id, _, path in shards.replaced}
    kept = {
        image_id: entry
        for path in dict.fromkeys(later.values())
        for image_id, entry in _read_shard(path).items()
        if later.get(image_id) == path
    }
    done = set[int]()
    for path in shards.files:
        for image_id, entry in _read_shard(path).items():
            if image_id not in done:
                done.add(image_id)
                yield LegacyImage(image_id, tuple(_regions(kept.get(image_id, entry))))


def _regions(entry: _Entry) -> Iterator[Region]:
    for fate, layer in (("foreground", entry.foreground), ("background", entry.background)):
        names = [*layer.category, *[None] * (len(layer.bbox) - len(layer.category))]
        for bbox, name in zip(layer.bbox, names, strict=True):
            float_box = any(isinstance(number, float) for number in bbox)
            yield Region(xywh_to_xyxy(bbox), fate, label=name, evidence={"float_box": float_box, "answers": []})


# Files out


def write_legacy(
    image_ids: Iterable[tuple[int, int]], batches: Iterable[pa.Table], classes: ClassList, printed: Sequence[str],
    out: FinalWriter, *, keep_names: bool,
) -> None:  # fmt: skip
    """Write the original's files of stages 1 to 6, byte for byte as its scripts would. Source: specs/cotpl.md 2.2, 8.5.

    Args:
        image_ids: (row, image id) of the images that have a record and did not fail, in order.
        batches: the settled regions, in the same order; instances.json is written already.
        classes: the class list.
        printed: names that stage 3 prints.
        out: where to.
        keep_names: boxes that stage 2 moves to the background bring their names; the original loses them.
    """
    regions = ((row, list(group)) for row, group in groupby(_rows(batches), key=lambda region: region["row"]))
    waiting = next(regions, None)
    with out.create(RAW) as raw, out.create(UNSEEN) as unseen, out.create(TOPK) as topk:
        opening = b"{"
        for row, image_id in image_ids:
            found: list[dict[str, Any]] = []
            if waiting is not None and waiting[0] == row:
                found, waiting = waiting[1], next(regions, None)
            stages = _stages(found, keep_names=keep_names)
            for stream, entry in zip((raw, unseen, topk), stages, strict=True):
                text = json.dumps({str(image_id): entry}, indent=2, ensure_ascii=False)
                stream.write(opening + text[1:-2].encode())
            opening = b","
        for stream in (raw, unseen, topk):
            stream.write(b"{}" if opening == b"{" else b"\n}")
    assert waiting is None, "every region belongs to an image"
    with out.create(COCO) as stream:
        for piece in _indented(out.path("instances.json")):
            stream.write(piece)
    for name, text in ((STAGE_3, printed_classes(printed)), (STAGE_6, printed_weights(classes))):
        with out.create(name) as stream:
            stream.write(text.encode())


def _rows(batches: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    columns = ["row", "label", "name", "fate", "x0", "y0", "x1", "y1", "float_box"]
    for batch in batches:
        yield from batch.select(columns).to_pylist()


def _bbox(region: dict[str, Any]) -> list[Number]:
    """Integers, unless the original would write floats. Source: specs/cotpl.md 0, fact 5."""
    numbers = xyxy_to_xywh((region["x0"], region["y0"], region["x1"], region["y1"]))
    return [number if region["float_box"] or number != int(number) else int(number) for number in numbers]


def _layer(regions: Sequence[dict[str, Any]], name: str) -> dict[str, list[Any]]:
    return {
        "bbox": [_bbox(region) for region in regions],
        "category": [region[name] for region in regions if region[name] is not None],
    }


def _stages(regions: Sequence[dict[str, Any]], *, keep_names: bool) -> Iterator[dict[str, dict[str, list[Any]]]]:
    """Yield an image's entry after stages 1, 2 and 4."""
    foreground = [region for region in regions if region["name"] is not None]
    background = [region for region in regions if region["fate"] == "background"]
    yield {"foreground": _layer(foreground, "label"), "background": _layer(background, "label")}
    moved = [region for region in foreground if region["fate"] in ("base_class", "excluded")]
    behind = _layer(background, "label")
    behind["bbox"] += [_bbox(region) for region in moved]
    if keep_names:
        behind["category"] += [region["name"] for region in moved]
    unseen = [region for region in foreground if region["fate"] not in ("base_class", "excluded")]
    yield {"foreground": _layer(unseen, "name"), "background": behind}
    kept = [region for region in unseen if region["fate"] == "kept"]
    yield {"foreground": _layer(kept, "name"), "background": behind}


def _indented(path: Path) -> Iterator[bytes]:
    """Yield a COCO file as `json.dump(..., indent=2)` writes it, a slice at a time."""
    arrays = {"images": TEXTS, "annotations": TEXTS, "categories": TEXTS}
    opening, inside = b"{", 0
    with path.open("rb") as stream:
        for piece in read_sections(path, arrays):
            if isinstance(piece, Section):
                if piece.name not in arrays:
                    stream.seek(piece.start)
                    text = _indent(stream.read(piece.end - piece.start), 2)
                    yield b"%b\n  %b: %b" % (opening, json.dumps(piece.name).encode(), text)
                elif inside:
                    yield b"\n  ]"
                else:
                    yield b"%b\n  %b: []" % (opening, json.dumps(piece.name).encode())
                opening, inside = b",", 0
                continue
            lines = io.BytesIO()
            for item in piece.items:
                if not inside:
                    lines.write(b"%b\n  %b: [" % (opening, json.dumps(piece.section).encode()))
                lines.write(b"%b\n    %b" % (b"," if inside else b"", _indent(bytes(item), 4)))
                inside += 1
            yield lines.getvalue()
    yield b"\n}"


def _indent(text: bytes, spaces: int) -> bytes:
    return json.dumps(json.loads(text), indent=2).replace("\n", "\n" + " " * spaces).encode()
