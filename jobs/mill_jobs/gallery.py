"""Pictures of labels, beside the truth where there is one. What a newcomer sees first."""

import colorsys
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import duckdb
import numpy as np
from numpy.typing import NDArray

from mill_jobs.config import RunConfig
from mill_jobs.finalize import fetch_final, gather_chunks, record_table
from mill_jobs.run import open_images
from mill_shared.coco import iterate_annotations, read_categories, xywh_to_xyxy
from mill_shared.errors import ImageError, KeyMissing
from mill_shared.geometry import Rle, decode_mask
from mill_shared.pictures import decode_picture
from mill_shared.plan import RunPlan
from mill_shared.storage import Store

Image = NDArray[np.uint8]
Box = tuple[float, float, float, float]

PICTURES = 24
SHEET_COLUMNS = 3
SIDE_PX = 640
CAPTION_PX = 30
GAP_PX = 10
FONT = cv2.FONT_HERSHEY_SIMPLEX
PAPER, INK = (250, 250, 248), (40, 40, 40)
MASK_OPACITY = 0.45


@dataclass(frozen=True)
class Drawn:
    """A label to draw: box in pixels of the original, its name, a score, and a mask in the labelled frame."""

    box_xyxy: Box
    name: str
    score: float | None = None
    mask: NDArray[np.bool_] | None = None


def colour_of(name: str) -> tuple[int, int, int]:
    """Return the RGB colour of a name: always the same, strong and not too light."""
    hue = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2]) / 65536
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.82)
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
    ordered = sorted(
        labels, key=lambda item: -(item.box_xyxy[2] - item.box_xyxy[0]) * (item.box_xyxy[3] - item.box_xyxy[1])
    )
    for item in ordered:
        if item.mask is not None:
            mask = cv2.resize(item.mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
            tint = np.array(colour_of(item.name), np.float32)
            canvas[mask] = (canvas[mask] * (1 - MASK_OPACITY) + tint * MASK_OPACITY).astype(np.uint8)
    for item in ordered:
        x0, y0, x1, y1 = (round(value * scale) for value in item.box_xyxy)
        cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), colour_of(item.name), 2, cv2.LINE_AA)
    for item in ordered:
        x0, y0 = round(item.box_xyxy[0] * scale), round(item.box_xyxy[1] * scale)
        text = item.name if item.score is None else f"{item.name} {item.score:.2f}"
        (text_width, text_height), below = cv2.getTextSize(text, FONT, 0.5, 1)
        left = min(max(x0, 0), max(0, width - text_width - 8))
        top = min(max(y0 - text_height - below - 4, 0), height - text_height - below - 4)
        corner = (left + text_width + 8, top + text_height + below + 4)
        cv2.rectangle(canvas, (left, top), corner, colour_of(item.name), -1)
        cv2.putText(canvas, text, (left + 4, top + text_height + 2), FONT, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    return canvas


def beside(panels: Sequence[tuple[str, Image]]) -> Image:
    """Put captioned pictures of one height side by side on paper."""
    height = panels[0][1].shape[0]
    width = sum(panel.shape[1] for _, panel in panels) + GAP_PX * (len(panels) + 1)
    page = np.full((height + CAPTION_PX + GAP_PX, width, 3), PAPER, np.uint8)
    left = GAP_PX
    for caption, panel in panels:
        cv2.putText(page, caption, (left, CAPTION_PX - 9), FONT, 0.55, INK, 1, cv2.LINE_AA)
        page[CAPTION_PX : CAPTION_PX + height, left : left + panel.shape[1]] = panel
        left += panel.shape[1] + GAP_PX
    return page


def contact_sheet(pages: Sequence[Image], columns: int = SHEET_COLUMNS) -> Image:
    """Put pages of any size into one picture, row by row."""
    width, height = max(page.shape[1] for page in pages), max(page.shape[0] for page in pages)
    rows = -(-len(pages) // columns)
    sheet = np.full((rows * height, min(columns, len(pages)) * width, 3), PAPER, np.uint8)
    for position, page in enumerate(pages):
        top, left = position // columns * height, position % columns * width
        sheet[top : top + page.shape[0], left : left + page.shape[1]] = page
    return sheet


def _truth(path: Path, image_ids: frozenset[int]) -> dict[int, list[Drawn]]:
    names = {category.id: category.name for category in read_categories(path)}
    found: dict[int, list[Drawn]] = {}
    for part in iterate_annotations(path):
        for item in part:
            if item.image_id in image_ids and item.bbox is not None and not item.iscrowd:
                drawn = Drawn(xywh_to_xyxy(item.bbox), names.get(item.category_id, "?"))
                found.setdefault(item.image_id, []).append(drawn)
    return found


def draw_final(
    config: RunConfig, plan: RunPlan, store: Store, digest: str, truth: Path | None, folder: Path, count: int = PICTURES
) -> Path:
    """Draw the pseudo-labels of images spread over a final, each beside the truth if there is one.

    Args:
        config: the run file.
        plan: the run's plan.
        store: the run's store.
        digest: the final.
        truth: COCO file, or None.
        folder: where one PNG an image and the contact sheet `index.png` go.
        count: how many images, those with labels before those without.

    Returns:
        The path of the contact sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mill-gallery-") as name:
        scratch = Path(name)
        fetch_final(store, plan.run, digest, scratch, ("regions.parquet",))
        with duckdb.connect() as connection:
            kept = connection.execute(
                "select row, region, name from read_parquet(?) where fate = 'kept' order by row, region",
                [str(scratch / "regions.parquet")],
            ).fetchall()
        with record_table(gather_chunks(store, plan, scratch), plan, scratch) as table:
            usable = [row for (row,) in table.connection.execute(
                "select row from records where status <> 'failed' order by row").fetchall()]  # fmt: skip
            names = {(row, region): name for row, region, name in kept}
            labelled = {row for row, _ in names}
            preferred = [row for row in usable if row in labelled] or usable
            chosen = [
                preferred[k * len(preferred) // min(count, len(preferred))] for k in range(min(count, len(preferred)))
            ]
            records = table.connection.execute(
                "select row, image_id, key, regions from records where row in ? order by row", [chosen]
            ).fetchall()
    wanted = {} if truth is None else _truth(truth, frozenset(image_id for _, image_id, _, _ in records))
    images, pages = open_images(config), []
    for row, image_id, key, regions in records:
        try:
            picture = decode_picture(images.get(key), max_side=SIDE_PX, max_pixels=config.dataset.max_pixels)
        except (ImageError, KeyMissing):
            continue
        labels = [
            Drawn((r["x0"], r["y0"], r["x1"], r["y1"]), names[row, position], r["score"], _mask(r["mask"]))
            for position, r in enumerate(regions)
            if (row, position) in names
        ]
        panels = [(f"pseudo-labels of {Path(key).name}", draw_labels(picture.image_rgb, labels, picture.scale))]
        if truth is not None:
            panels.append(("truth", draw_labels(picture.image_rgb, wanted.get(image_id, []), picture.scale)))
        pages.append(beside(panels))
        _write(folder / f"{Path(key).stem}.png", pages[-1])
    sheet = folder / "index.png"
    if pages:
        _write(sheet, contact_sheet(pages[:12]))
    return sheet


def _mask(mask: dict[str, object] | None) -> NDArray[np.bool_] | None:
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
