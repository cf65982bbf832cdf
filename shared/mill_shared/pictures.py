"""Bytes of a picture to upright RGB pixels, or the reason why not."""

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mill_shared.errors import ImageError

Image.MAX_IMAGE_PIXELS = None  # our own limit below answers with a reason instead of a warning
EXIF_ORIENTATION = 0x0112
SIDEWAYS = frozenset({5, 6, 7, 8})


@dataclass(frozen=True)
class Picture:
    """An upright picture in the frame that is labelled."""

    image_rgb: NDArray[np.uint8]
    """(H, W, 3), longer side at most `max_side`."""
    width: int
    """Pixels of the upright original."""
    height: int
    scale: float
    """Labelled / original pixels, at most 1."""


def decode_picture(data: bytes, *, max_side: int, max_pixels: int) -> Picture:
    """Decode a picture: first frame, EXIF orientation applied, transparency over white, 16 bits scaled to 8.

    Args:
        data: the file.
        max_side: longer side in pixels above which the picture is made smaller (area interpolation).
        max_pixels: pictures with more pixels are refused before anything is decoded.

    Raises:
        ImageError: empty_file, not_an_image, truncated, too_many_pixels or decode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        if image.width * image.height > max_pixels:
            raise ImageError(
                "too_many_pixels", f"{image.width} x {image.height} pixels, dataset.max_pixels is {max_pixels}"
            )
        try:
            image.load()
            rgb = _to_rgb(ImageOps.exif_transpose(image))
        except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
            cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
            raise ImageError("truncated" if cut else "decode", str(error) or type(error).__name__) from error
    height, width = rgb.shape[:2]
    scale = min(1.0, max_side / max(width, height))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    return Picture(np.ascontiguousarray(rgb), width, height, scale)


def picture_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of the upright picture from its header.

    Raises:
        ImageError: empty_file or not_an_image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        sideways = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    return (image.height, image.width) if sideways else (image.width, image.height)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty_file", "the file has 0 bytes")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"no known picture format; it begins with {data[:16]!r}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError("decode", str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        white = max(values.max(), 1) if image.mode == "F" else 65535
        grey = np.clip(values / white * 255, 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        backdrop = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(backdrop, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))
