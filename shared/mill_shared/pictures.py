"""Bytes of a picture to upright RGB pixels, or the reason why not.

Pillow decodes, because it says when a file ends too early (OpenCV fills the rest with grey) and tells the size before
it takes memory. Ordinary JPEGs get the same pixels from both; a test holds that.
"""

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mill_shared.errors import ImageError

Image.MAX_IMAGE_PIXELS = None  # our own limit below answers with a reason instead of a warning
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""What is read. Pillow knows more, among them formats that start other programs (EPS)."""
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright. Source: EXIF 2.32, 4.6.4 A, Orientation."""
SIDEWAYS = frozenset({5, 6, 7, 8})
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    MemoryError,
    struct.error,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
)
"""What Pillow's readers raise on files that break their format."""
CUT = ("truncated", "cannot load this image", "unexpected end", "not enough data")
"""Words of Pillow's messages about files that end too early."""


@dataclass(frozen=True)
class Picture:
    """An upright picture in the frame that is labelled."""

    image_rgb: NDArray[np.uint8]
    """(H, W, 3), longer side at most `max_side`."""
    width: int
    """Pixels of the upright original."""
    height: int
    scale: float
    """Labelled / original pixels, at most 1; each side is rounded to a whole pixel, so the sides' own ratios may differ
    from it by half a pixel."""


def decode_picture(data: bytes, *, max_side: int, max_pixels: int) -> Picture:
    """Decode a picture: first frame, EXIF orientation applied, transparency over white, 16 bits scaled to 8.

    Args:
        data: the file.
        max_side: longer side in pixels above which the picture is made smaller (area interpolation). Sides become
            `round(side * scale)`, halves to even, and at least 1.
        max_pixels: pictures with more pixels are refused before anything is decoded.

    Raises:
        ImageError: empty_file, not_an_image, truncated, too_many_pixels or decode.
    """
    with _QUIET.hold():
        image = _open(data)
        if image.width * image.height > max_pixels:
            raise ImageError(
                "too_many_pixels", f"{image.width} x {image.height} pixels, dataset.max_pixels is {max_pixels}"
            )
        try:
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image if turn is None else image.transpose(turn))
        except BROKEN as error:
            raise _fault(error) from error
    height, width = rgb.shape[:2]
    scale = min(1.0, max_side / max(width, height))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return Picture(np.ascontiguousarray(rgb), width, height, scale)


def picture_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of the upright picture from its header; no pixel is decoded.

    The orientation of a PNG counts where it stands before the pixels.

    Raises:
        ImageError: empty_file, not_an_image, truncated or decode.
    """
    with _QUIET.hold():
        image = _open(data)
        # Pillow decodes a PNG in search of EXIF behind the pixels.
        searches = image.format == "PNG" and "exif" not in image.info
        sideways = not searches and _orientation(image) in SIDEWAYS
    return (image.height, image.width) if sideways else (image.width, image.height)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty_file", "the file has 0 bytes")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"no known picture format; it begins with {data[:16]!r}") from error
    except BROKEN as error:
        raise _fault(error) from error


def _fault(error: Exception) -> ImageError:
    text = " ".join(str(error).split()) or type(error).__name__
    cut = isinstance(error, EOFError) or any(words in text.lower() for words in CUT)
    return ImageError("truncated" if cut else "decode", text)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except BROKEN:
        return 1  # a broken note about the camera costs no picture


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        white = max(values.max(), 1) if image.mode == "F" else 65535
        grey = np.clip(values / white * 255, 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        backdrop = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(backdrop, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


class _Quiet:
    """Silence warnings while any thread is inside.

    `warnings.catch_warnings` alone is not for threads: leaving in another order than entering loses the old filters.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._outer = contextlib.ExitStack()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._outer.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._outer.close()


_QUIET = _Quiet()
