"""A final in other layouts: YOLO text files, or COCO with the pseudo-labels alone."""

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import pyarrow.parquet as pq
import yaml

from mill_jobs.trainer.classes import ClassList
from mill_shared.coco import CocoAnnotation, CocoImage, Slice, iterate_annotations, read_images, read_sections
from mill_shared.errors import ConfigError


@dataclass(frozen=True)
class Exported:
    """What was written."""

    images: int
    labels: int
    left_out: int
    """Annotations that the layout cannot hold: no box, less than a pixel, or on an image of unknown size."""


def export_coco(bundle: Path, target: Path) -> Exported:
    """Write the pseudo-labels of a bundle, without the base annotations, as one COCO file.

    Images and categories stay as they are, and so do the annotations with their scores and masks.

    Raises:
        ConfigError: the folder is no bundle.
    """
    written = _pseudo_ids(bundle)
    decoder = msgspec.json.Decoder(list[msgspec.Raw])
    ids = msgspec.json.Decoder(CocoAnnotation)
    sections: dict[str, list[msgspec.Raw]] = {"images": [], "annotations": [], "categories": []}
    for piece in read_sections(bundle / "instances.json", dict.fromkeys(sections, decoder)):
        if isinstance(piece, Slice) and piece.section == "annotations":
            sections["annotations"] += [item for item in piece.items if ids.decode(item).id in written]
        elif isinstance(piece, Slice):
            sections[piece.section] += piece.items
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, msgspec.json.encode(sections))
    return Exported(len(sections["images"]), len(sections["annotations"]), len(written) - len(sections["annotations"]))


def export_yolo(bundle: Path, folder: Path, images: str, *, pseudo_only: bool = False) -> Exported:
    """Write a bundle as a YOLO dataset: `labels/<image>.txt`, `train.txt` and `data.yaml`.

    A line of a text file is class, centre x, centre y, width, height, all but the class as shares of the image; classes
    count from 0 in the order of the trainer's class list. An image without labels has an empty file: nothing is there.
    Where the pictures lie in a folder, `images` is a link to it.

    Args:
        bundle: the files of a final.
        folder: is made; must not hold a `labels` folder yet.
        images: folder or URL of the pictures.
        pseudo_only: leave the base annotations out.

    Raises:
        ConfigError: the folder is no bundle, is not empty, or two images would share one text file.
    """
    if (folder / "labels").exists():
        raise ConfigError(f"{folder / 'labels'}: exists already; choose another folder, old labels would stay in it")
    classes = _classes(bundle)
    class_of = {entry.category_id: index for index, entry in enumerate(classes.classes)}
    listed = read_images(bundle / "instances.json")
    _refuse_shared_names(listed)
    of_image = {image.id: image for image in listed}
    wanted = _pseudo_ids(bundle) if pseudo_only else None
    lines = defaultdict[int, list[str]](list)
    labels = left_out = 0
    for items in iterate_annotations(bundle / "instances.json"):
        for item in items:
            if wanted is not None and item.id not in wanted:
                continue
            line = None if item.image_id not in of_image else _yolo_line(item, of_image[item.image_id], class_of)
            if line is None or item.iscrowd:
                left_out += 1
            else:
                lines[item.image_id].append(line)
                labels += 1
    folder.mkdir(parents=True, exist_ok=True)
    if not images.startswith("s3://") and not (folder / "images").exists():
        (folder / "images").symlink_to(Path(images).resolve(), target_is_directory=True)
    for image in listed:
        path = folder / "labels" / _text_name(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines.get(image.id, ())), encoding="utf-8")
    (folder / "train.txt").write_text("".join(f"./images/{image.file_name}\n" for image in listed), encoding="utf-8")
    names = {index: entry.name for index, entry in enumerate(classes.classes)}
    data: dict[str, Any] = {"path": str(folder.resolve()), "train": "train.txt", "val": "train.txt", "names": names}
    (folder / "data.yaml").write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Exported(len(listed), labels, left_out)


def _yolo_line(item: CocoAnnotation, image: CocoImage, class_of: dict[int, int]) -> str | None:
    if item.bbox is None or not image.width or not image.height or item.category_id not in class_of:
        return None
    x, y, width, height = item.bbox
    if width <= 0 or height <= 0:
        return None
    x0, x1 = (min(max(side / image.width, 0), 1) for side in (x, x + width))
    y0, y1 = (min(max(side / image.height, 0), 1) for side in (y, y + height))
    shares = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
    return f"{class_of[item.category_id]} {' '.join(f'{share:.6f}' for share in shares)}\n"


def _text_name(image: CocoImage) -> PurePosixPath:
    return PurePosixPath(image.file_name).with_suffix(".txt")


def _refuse_shared_names(images: Sequence[CocoImage]) -> None:
    seen: dict[PurePosixPath, str] = {}
    for image in images:
        if not image.file_name or ".." in PurePosixPath(image.file_name).parts or image.file_name.startswith("/"):
            raise ConfigError(f"instances.json: image {image.id}: unusable file name {image.file_name!r}")
        other = seen.setdefault(_text_name(image), image.file_name)
        if other != image.file_name:
            raise ConfigError(
                f"{other} and {image.file_name}: YOLO would read both from {_text_name(image)}; rename one"
            )


def _pseudo_ids(bundle: Path) -> set[int]:
    try:
        kept = pq.read_table(bundle / "regions.parquet", columns=["annotation_id"], filters=[("fate", "==", "kept")])
    except OSError as error:
        raise ConfigError(f"{bundle}: no regions.parquet in it; a bundle is what `mill fetch` brings") from error
    return set(kept["annotation_id"].to_numpy().tolist())


def _classes(bundle: Path) -> ClassList:
    path = bundle / "classes.json"
    try:
        return ClassList.from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); a bundle is what `mill fetch` brings") from error


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    shutil.move(part, path)
