"""The original's files: stage-1 scores in and out, and the JSON that its trainers read. Source: specs/vlplm.md 2."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mill_jobs.recipes.vlplm.evidence import SCORED
from mill_shared.coco import TEXTS, CocoCategory, CocoFile, CocoImage, Section, read_sections
from mill_shared.errors import ConfigError
from mill_shared.records import Region

IMAGES_A_FILE = 1000
"""Source: specs/vlplm.md 2.2."""

Number = int | float
Box = tuple[Number, Number, Number, Number]

# Stage-1 files


class _Scores(msgspec.Struct, frozen=True):
    img_ids_list: list[int]
    bbox_all_list: list[list[Box]]
    rpn_score_all_list: list[list[float]]
    clip_score_all_list: list[list[list[float]]]
    clip_catIDs_all_list: list[list[list[int]]]


@dataclass(frozen=True)
class LegacyScores:
    """Stage-1 files of a folder."""

    files: tuple[Path, ...]
    """Those that can be read, in reading order."""
    places: Mapping[int, tuple[Path, int, int]]
    """Image id -> file, place in it, place among all images, in reading order."""
    broken: tuple[tuple[Path, str], ...]
    """Files that were left out, and why."""

    def regions(self, image_id: int) -> tuple[Region, ...] | None:
        """Return the proposals of an image, the surest first; None where no file has it.

        A few files are in memory at a time, so ask in the order of the files.
        """
        if image_id not in self.places:
            return None
        path, index, position = self.places[image_id]
        return tuple(_regions(_read_again(path), index, position))


@lru_cache(maxsize=2)
def _read_again(path: Path) -> "_Scores":
    return _read(path)


def score_files(folder: Path) -> list[Path]:
    """Return the stage-1 files of a folder in the order in which stage 2 reads them: by the text of their names.

    Raises:
        ConfigError: there is none.
    """
    found = sorted((path for path in folder.iterdir() if path.name.endswith(".json")), key=lambda path: path.name)
    if not found:
        raise ConfigError(f"{folder}: no score files (*.json)")
    return found


def read_scores(files: Sequence[Path], *, skip_broken: bool = False) -> LegacyScores:
    """Read stage-1 files.

    Args:
        files: in reading order.
        skip_broken: leave out files that cannot be read, and report them.

    Raises:
        ConfigError: names a file that is no stage-1 file, or an image that two files have: the original would write its
            labels twice.
    """
    places: dict[int, tuple[Path, int, int]] = {}
    broken, usable = [], []
    for path in files:
        try:
            scores = _read(path)
        except ConfigError as error:
            if not skip_broken:
                raise ConfigError(f"{path}: {error}") from error
            broken.append((path, str(error)))
            continue
        usable.append(path)
        for index, image_id in enumerate(scores.img_ids_list):
            if image_id in places:
                raise ConfigError(
                    f"{path}: image {image_id} is scored here and in {places[image_id][0].name}, so its labels would "
                    "come twice; keep one of the files"
                )
            places[image_id] = (path, index, len(places))
    return LegacyScores(tuple(usable), places, tuple(broken))


def _read(path: Path) -> _Scores:
    """Raises ConfigError with what is wrong, without the file's name."""
    try:
        scores = msgspec.json.decode(path.read_bytes(), type=_Scores)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"not a stage-1 file of VL-PLM: {error}") from error
    lists = (scores.bbox_all_list, scores.rpn_score_all_list, scores.clip_score_all_list, scores.clip_catIDs_all_list)
    if any(len(values) != len(scores.img_ids_list) for values in lists):
        raise ConfigError("its five lists differ in length")
    for image_id, boxes, objectness, clip, categories in zip(scores.img_ids_list, *lists, strict=True):
        if not len(boxes) == len(objectness) == len(clip) == len(categories):
            raise ConfigError(f"image {image_id}: its lists of boxes and scores differ in length")
        if not all(clip) or not all(categories):
            raise ConfigError(f"image {image_id}: a box has no class")
    return scores


def _regions(scores: _Scores, index: int, position: int) -> Iterator[Region]:
    for box, objectness, clip, category in zip(
        scores.bbox_all_list[index], scores.rpn_score_all_list[index], scores.clip_score_all_list[index],
        scores.clip_catIDs_all_list[index], strict=True,
    ):  # fmt: skip
        x0, y0, x1, y1 = (float(side) for side in box)
        evidence = {
            "objectness": objectness,
            "category_id": category[0],
            "position": position,
            "whole": sum(1 << place for place, side in enumerate(box) if isinstance(side, int)),
        }
        yield Region((x0, y0, x1, y1), SCORED, score=clip[0], evidence=evidence)


@dataclass(frozen=True)
class ScoreLine:
    """One proposal as a stage-1 file has it."""

    box_xyxy: tuple[float, float, float, float]
    whole: int
    objectness: float
    clip: float
    category_id: int


def write_score_file(images: Sequence[tuple[int, Sequence[ScoreLine]]]) -> bytes:
    """Return a stage-1 file of some images. Source: specs/vlplm.md 2.1."""
    content = {
        "img_ids_list": [image_id for image_id, _ in images],
        "bbox_all_list": [
            [[int(s) if line.whole >> i & 1 else s for i, s in enumerate(line.box_xyxy)] for line in lines]
            for _, lines in images
        ],
        "rpn_score_all_list": [[line.objectness for line in lines] for _, lines in images],
        "clip_score_all_list": [[[line.clip] for line in lines] for _, lines in images],
        "clip_catIDs_all_list": [[[line.category_id] for line in lines] for _, lines in images],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def file_names(count: int) -> list[str]:
    """Return the name of the file that each image is in, for images by ascending id. Source: specs/vlplm.md 2.2."""
    return [
        f"CLIP_scores_{min((index // IMAGES_A_FILE + 1) * IMAGES_A_FILE, count) - 1}.json" for index in range(count)
    ]


def reading_order(image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the place of each image where stage 2 reads its files, by the text of their names."""
    ascending = np.argsort(image_ids, kind="stable")
    names = np.array(file_names(len(image_ids)), dtype=np.str_)
    places = np.zeros(len(image_ids), np.int64)
    places[ascending[np.argsort(names, kind="stable")]] = np.arange(len(image_ids))
    return places


# The file that trainers read


def label_text(
    annotation_id: int, image_id: int, box_xyxy: Sequence[float], category_id: int, confidence: float,
    scores: tuple[float, float] | None,
) -> str:  # fmt: skip
    """Return a pseudo-label as `json.dump` writes the original's. Source: specs/vlplm.md 2.3.

    Args:
        annotation_id: negative.
        image_id: of its image.
        box_xyxy: (4,), float.
        category_id: COCO id.
        confidence: what decided.
        scores: (CLIP's probability, objectness) in MarvelOVD's form.
    """
    x0, y0, x1, y1 = box_xyxy
    both = "" if scores is None else f'"clip_score": {scores[0]!r}, "rpn_score": {scores[1]!r}, '
    return (
        f'{{"segmentation": [[]], "area": 0, "iscrowd": 0, "image_id": {image_id}, '
        f'"bbox": [{x0!r}, {y0!r}, {x1 - x0!r}, {y1 - y0!r}], "category_id": {category_id}, "id": {annotation_id}, '
        f'"confidence": {confidence!r}, {both}"thing_isBase": false, "thing_isNovel": true}}'
    )


def trainer_file(
    file: CocoFile, kept: NDArray[np.bool_], labels: Iterable[str], used: frozenset[int] | None,
    added: Sequence[CocoCategory],
) -> Iterator[str]:  # fmt: skip
    """Yield the base file with labels, as Python's `json.dump` writes it. Source: specs/vlplm.md 2.3.

    Args:
        file: the base file, scanned.
        kept: (annotations,) which of them stay.
        labels: text of each pseudo-label.
        used: ids of the categories that stay; None for all.
        added: categories behind them.
    """
    arrays = {"images": TEXTS, "annotations": TEXTS, "categories": TEXTS}
    opening, wrote, seen = "{", False, 0
    with file.path.open("rb") as stream:
        for piece in read_sections(file.path, arrays):
            name = piece.name if isinstance(piece, Section) else piece.section
            if isinstance(piece, Section) and name not in arrays:
                stream.seek(piece.start)
                value = json.loads(stream.read(piece.end - piece.start))
                yield f"{opening}{json.dumps(name)}: {json.dumps(value)}"
                opening = ", "
                continue
            if opening:
                yield f"{opening}{json.dumps(name)}: ["
                opening, wrote = "", False
            if isinstance(piece, Section):
                last: Iterable[str] = ()
                if name == "annotations":
                    last = labels
                elif name == "categories":
                    last = (json.dumps(msgspec.to_builtins(category)) for category in added)
                for text in last:
                    yield f"{', ' if wrote else ''}{text}"
                    wrote = True
                yield "]"
                opening = ", "
                continue
            items: list[Any] = [json.loads(bytes(item)) for item in piece.items]
            if name == "annotations":
                stays = kept[seen : seen + len(items)].tolist()
                seen += len(items)
                items = [item for item, stay in zip(items, stays, strict=True) if stay]
            elif name == "categories" and used is not None:
                items = [item for item in items if item["id"] in used]
            if items:
                yield f"{', ' if wrote else ''}{json.dumps(items)[1:-1]}"
                wrote = True
    yield "}"


def trainer_file_without_base(
    images: Iterable[CocoImage], labels: Iterable[str], categories: Iterable[CocoCategory]
) -> Iterator[str]:  # fmt: skip
    """Yield a new file in the same form."""
    parts: tuple[tuple[str, Iterable[str]], ...] = (
        ('{"images": [', (json.dumps(msgspec.to_builtins(image)) for image in images)),
        ('], "annotations": [', labels),
        ('], "categories": [', (json.dumps(msgspec.to_builtins(category)) for category in categories)),
    )
    for opening, texts in parts:
        yield opening
        for index, text in enumerate(texts):
            yield f"{', ' if index else ''}{text}"
    yield "]}"
