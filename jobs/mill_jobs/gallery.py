"""Pictures of labels, beside the truth where there is one. What a newcomer sees first."""

import colorsys
import hashlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from mill_jobs.config import RunConfig
from mill_jobs.evaluate import gather_final
from mill_jobs.final import fetch_final
from mill_jobs.finalize import record_table
from mill_jobs.run import open_images
from mill_jobs.trainer.classes import ClassList
from mill_shared.coco import CocoAnnotation, Slice, read_categories, read_sections, xywh_to_xyxy
from mill_shared.errors import ConfigError, ImageError, KeyMissing
from mill_shared.geometry import Rle, decode_mask
from mill_shared.pictures import Picture, decode_picture
from mill_shared.plan import RunPlan
from mill_shared.storage import Store

log = structlog.get_logger()

Image = NDArray[np.uint8]
Box = tuple[float, float, float, float]
Rgb = tuple[int, int, int]
T = TypeVar("T")

PICTURES = 24
SHEET_PAGES = 12
SHEET_PANELS = 4
"""Panels side by side on the contact sheet: about 2,000 pixels."""
SIDE_PX = 480
CAPTION_PX = 26
GAP_PX = 10
FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.45
CHIP_PX = 17
"""Height of a name."""
PAPER, INK, MUTED = (250, 250, 248), (40, 40, 40), (75, 75, 75)
DARK_RGB, LIGHT_RGB = (20, 20, 20), (255, 255, 255)
MASK_OPACITY = 0.45


@dataclass(frozen=True)
class Drawn:
    """A label to draw."""

    box_xyxy: Box
    """Pixels of the original."""
    name: str
    score: float | None = None
    mask: NDArray[np.bool_] | None = None
    """(H, W) over the whole picture, at any resolution."""
    muted: bool = False
    """In grey, named only where the name fits: there, but not what the labels are about."""


def colour_of(name: str) -> Rgb:
    """Return the RGB colour of a name: always the same, and strong."""
    digest = hashlib.sha256(name.encode()).digest()
    hue, value = int.from_bytes(digest[:2]) / 65536, 0.65 + 0.3 * digest[2] / 255
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return int(red * 255), int(green * 255), int(blue * 255)


def draw_labels(image_rgb: Image, labels: Sequence[Drawn], scale: float) -> Image:
    """Draw masks, boxes and names on a picture.

    Args:
        image_rgb: (H, W, 3).
        labels: what to draw; the largest lies at the bottom.
        scale: pixels of the picture / pixels of the boxes.
    """
    canvas = image_rgb.copy()
    height, width = canvas.shape[:2]

    def order(item: Drawn) -> tuple[bool, float]:
        x0, y0, x1, y1 = item.box_xyxy
        return (not item.muted, -(x1 - x0) * (y1 - y0))

    styled = [(item, MUTED if item.muted else colour_of(item.name)) for item in sorted(labels, key=order)]
    for item, colour in styled:
        if item.mask is not None:
            mask = cv2.resize(item.mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
            tint = np.array(colour, np.float32)
            canvas[mask > 0] = (canvas[mask > 0] * (1 - MASK_OPACITY) + tint * MASK_OPACITY).astype(np.uint8)
            rings, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(canvas, rings, -1, colour, 1, cv2.LINE_AA)
    for item, colour in styled:
        x0, y0, x1, y1 = (round(value * scale) for value in item.box_xyxy)
        cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), colour, 1 if item.muted else 2, cv2.LINE_AA)
    for item, colour in styled:
        text = item.name if item.score is None else f"{item.name} {item.score:.2f}"
        if item.muted and _text_px(text) + 6 > (item.box_xyxy[2] - item.box_xyxy[0]) * scale:
            continue
        _draw_chip(canvas, text, colour, (item.box_xyxy[0] * scale, item.box_xyxy[1] * scale))
    return canvas


def _draw_chip(canvas: Image, text: str, colour: Rgb, corner: tuple[float, float]) -> None:
    """Write on a filled strip: on top of a box if there is room, else inside; never beyond the picture."""
    height, width = canvas.shape[:2]
    text = _fitted(text, width - 6)
    chip_px = _text_px(text) + 6
    left = min(max(round(corner[0]) - 1, 0), width - chip_px)
    top = round(corner[1]) - CHIP_PX
    top = min(max(top if top >= 0 else round(corner[1]), 0), height - CHIP_PX)
    cv2.rectangle(canvas, (left, top), (left + chip_px - 1, top + CHIP_PX - 1), colour, -1)
    red, green, blue = colour
    ink = DARK_RGB if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else LIGHT_RGB
    cv2.putText(canvas, text, (left + 3, top + CHIP_PX - 5), FONT, FONT_SCALE, ink, 1, cv2.LINE_AA)


def _text_px(text: str) -> int:
    return int(cv2.getTextSize(text, FONT, FONT_SCALE, 1)[0][0])


def _fitted(text: str, width_px: int) -> str:
    """Cut a text to a width."""
    if _text_px(text) <= width_px:
        return text
    while text and _text_px(f"{text}...") > width_px:
        text = text[:-1]
    return f"{text}..." if text else ""


def beside(panels: Sequence[tuple[str, Image]]) -> Image:
    """Put captioned pictures of one height side by side on paper."""
    height = panels[0][1].shape[0]
    width = sum(panel.shape[1] for _, panel in panels) + GAP_PX * (len(panels) + 1)
    page = np.full((height + CAPTION_PX + GAP_PX, width, 3), PAPER, np.uint8)
    left = GAP_PX
    for caption, panel in panels:
        text = _fitted(caption, panel.shape[1])
        cv2.putText(page, text, (left, CAPTION_PX - 8), FONT, FONT_SCALE, INK, 1, cv2.LINE_AA)
        page[CAPTION_PX : CAPTION_PX + height, left : left + panel.shape[1]] = panel
        left += panel.shape[1] + GAP_PX
    return page


def contact_sheet(pages: Sequence[Image], columns: int) -> Image:
    """Put pages of any size into one picture, row by row."""
    rows = [pages[start : start + columns] for start in range(0, len(pages), columns)]
    width = max(page.shape[1] for page in pages)
    heights = [max(page.shape[0] for page in row) for row in rows]
    sheet = np.full((sum(heights) + GAP_PX, width * len(rows[0]), 3), PAPER, np.uint8)
    for number, row in enumerate(rows):
        top = GAP_PX // 2 + sum(heights[:number])
        for place, page in enumerate(row):
            sheet[top : top + page.shape[0], place * width : place * width + page.shape[1]] = page
    return sheet


class _TruthRle(msgspec.Struct, frozen=True):
    size: tuple[int, int]
    counts: str | list[int]
    """Compressed, or the run lengths themselves."""


class _TruthItem(CocoAnnotation, frozen=True):
    segmentation: list[list[float]] | _TruthRle | None = None


def read_truth_of(path: Path, image_ids: Collection[int]) -> dict[int, list[_TruthItem]]:
    """Return the annotations of some images, crowds left out."""
    found: dict[int, list[_TruthItem]] = {}
    for piece in read_sections(path, {"annotations": msgspec.json.Decoder(list[_TruthItem])}):
        for item in piece.items if isinstance(piece, Slice) else ():
            if item.image_id in image_ids and item.bbox is not None and not item.iscrowd:
                found.setdefault(item.image_id, []).append(item)
    return found


def _truth_drawn(
    items: Sequence[_TruthItem], names: Mapping[int, str], base: Collection[str], picture: Picture
) -> list[Drawn]:
    drawn = []
    for item in items:
        name, outline, mask = names.get(item.category_id, "?"), item.segmentation, None
        if isinstance(outline, list):
            canvas = np.zeros(picture.image_rgb.shape[:2], np.uint8)
            rings = [np.array(ring[: len(ring) // 2 * 2]).reshape(-1, 2) * picture.scale for ring in outline if ring]
            cv2.fillPoly(canvas, [ring.round().astype(np.int32) for ring in rings], (1,))
            mask = canvas > 0
        elif outline is not None and isinstance(outline.counts, str):
            try:
                mask = decode_mask(Rle(outline.size, outline.counts.encode()))
            except ValueError as error:
                raise ConfigError(
                    f"truth: annotation {item.id}: its segmentation is no run-length code of {outline.size[0]} x "
                    f"{outline.size[1]} pixels"
                ) from error
        assert item.bbox is not None
        drawn.append(Drawn(xywh_to_xyxy(item.bbox), name, None, None if name in base else mask, name in base))
    return drawn


def draw_final(
    config: RunConfig, plan: RunPlan, store: Store, digest: str, truth: Path | None, folder: Path, count: int = PICTURES
) -> Path:
    """Draw the pseudo-labels of images spread over a final, each beside the truth if there is one.

    Args:
        config: the run file.
        plan: the run's plan.
        store: the run's store.
        digest: the final.
        truth: COCO file, or None. Its base classes are drawn in grey.
        folder: where one PNG an image and the contact sheet `index.png` go.
        count: how many images; those without labels only where no image has any.

    Returns:
        The path of the contact sheet.

    Raises:
        ConfigError: no such final, or the truth is no COCO file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mill-gallery-") as name:
        scratch = Path(name)
        fetch_final(store, plan.run, digest, scratch, ("regions.parquet", "classes.json"))
        base = ClassList.from_json((scratch / "classes.json").read_bytes()).base
        with record_table(gather_final(store, plan, digest, scratch), plan, scratch) as table:
            query = table.connection.execute
            table.connection.read_parquet(str(scratch / "regions.parquet")).create_view("settled")
            labelled = query("select distinct row from settled where fate = 'kept' order by row").fetchall()
            usable = labelled or query("select row from records where status <> 'failed' order by row").fetchall()
            rows = [row for (row,) in _spread(usable, count)]
            settled = query("select row, region, name from settled where fate = 'kept' and row in ?", [rows]).fetchall()
            records = query(
                "select row, image_id, key, regions from records where row in ? order by row", [rows]
            ).fetchall()
    kept = {(row, region): name for row, region, name in settled}
    wanted = {} if truth is None else read_truth_of(truth, {image_id for _, image_id, _, _ in records})
    names = {} if truth is None else {category.id: category.name for category in read_categories(truth)}
    images, pages = open_images(config), []
    for row, image_id, key, regions in records:
        try:
            picture = decode_picture(images.get(key), max_side=SIDE_PX, max_pixels=config.dataset.max_pixels)
        except (ImageError, KeyMissing) as error:
            log.warning("image cannot be drawn", image=key, error=str(error))
            continue
        labels = [
            Drawn((r["x0"], r["y0"], r["x1"], r["y1"]), kept[row, position], r["score"], _mask(r["mask"]))
            for position, r in enumerate(regions)
            if (row, position) in kept
        ]
        panels = [(f"pseudo-labels, {Path(key).name}", draw_labels(picture.image_rgb, labels, picture.scale))]
        if truth is not None:
            drawn = _truth_drawn(wanted.get(image_id, ()), names, base, picture)
            caption = "truth" if not base else "truth, base classes in grey"
            panels.append((caption, draw_labels(picture.image_rgb, drawn, picture.scale)))
        pages.append(beside(panels))
        _write(folder / f"{row:06d}-{Path(key).stem}.png", pages[-1])
    sheet = folder / "index.png"
    if pages:
        _write(sheet, contact_sheet(_spread(pages, SHEET_PAGES), SHEET_PANELS // (1 if truth is None else 2)))
    return sheet


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items at equal distances."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def _mask(mask: Mapping[str, int | bytes] | None) -> NDArray[np.bool_] | None:
    if mask is None:
        return None
    height, width, counts = mask["height"], mask["width"], mask["counts"]
    assert isinstance(height, int)
    assert isinstance(width, int)
    assert isinstance(counts, bytes)
    return decode_mask(Rle((height, width), counts))


def _write(path: Path, image_rgb: Image) -> None:
    found, data = cv2.imencode(".png", cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))
    assert found, "a picture of 8 bits always encodes"
    path.write_bytes(data.tobytes())
