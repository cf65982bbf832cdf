"""Every kind of picture gets sensible upright RGB pixels; every broken one its reason."""

import contextlib
import io
import struct
import sys
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mill_shared.errors import ImageError
from mill_shared.pictures import decode_picture, picture_size

PHOTOS = sorted((Path(__file__).parents[1] / "data" / "coco-sample" / "images").iterdir())
RED, GREEN, BLUE, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def corners(width: int = 48, height: int = 32) -> Image.Image:
    """Red, green / blue, white quarters: shows every turn and mirror."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def rgb(data: bytes, max_side: int = 1024, max_pixels: int = 10**8) -> np.ndarray:
    picture = decode_picture(data, max_side=max_side, max_pixels=max_pixels)
    image = picture.image_rgb
    assert image.dtype == np.uint8
    assert image.shape[2:] == (3,)
    assert image.flags.c_contiguous
    assert picture_size(data) == (picture.width, picture.height)
    return image


def reason(data: bytes, max_pixels: int = 10**8) -> str:
    with pytest.raises(ImageError) as caught:
        decode_picture(data, max_side=1024, max_pixels=max_pixels)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


def test_photographs_have_the_pixels_that_opencv_reads() -> None:
    for path in PHOTOS:
        data = path.read_bytes()
        theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert theirs is not None
        np.testing.assert_array_equal(rgb(data), theirs[..., ::-1], err_msg=path.name)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_camera_held_in_any_way_gives_an_upright_picture(kind: str, orientation: int) -> None:
    T = Image.Transpose
    lying = {
        1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90,
        7: T.TRANSVERSE, 8: T.ROTATE_270,
    }[orientation]  # fmt: skip
    upright = corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(
        upright if lying is None else upright.transpose(lying),
        kind,
        exif=exif,
        quality=95,
        subsampling=0,
        lossless=True,
    )
    found = rgb(data)
    assert np.abs(found.astype(int) - np.asarray(upright)).max() <= 3
    assert picture_size(data) == (48, 32)


def test_a_broken_camera_note_costs_no_picture() -> None:
    data = saved(corners(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    assert rgb(data).shape == (32, 48, 3)


def test_cmyk_is_converted() -> None:
    found = rgb(saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(found.astype(int) - RED).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_black_and_white_are_spread_over_the_channels(mode: str) -> None:
    image = Image.new(mode, (4, 2), 0)
    image.paste(255, (2, 0, 4, 2))
    found = rgb(saved(image, "PNG"))
    np.testing.assert_array_equal(found[0, :, :], [BLACK, BLACK, WHITE, WHITE])


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 257, 32768, 65535]], dtype=np.uint16)
    assert rgb(saved(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == [0, 1, 1, 128, 255]
    assert rgb(saved(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def test_sixteen_bit_colour_is_scaled() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 32768, 0, 0, 257, 65535)
    found = rgb(png(2, 1, (b"IDAT", zlib.compress(row)), bits=16))
    np.testing.assert_array_equal(found[0], [(255, 128, 0), (0, 1, 255)])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(mode: str) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    np.testing.assert_array_equal(rgb(saved(image.convert(mode), "PNG"))[0], [WHITE, BLACK, (204, 204, 204)])


@pytest.mark.parametrize("transparency", [0, b"\0\xff"], ids=["one colour", "alpha a colour"])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_transparency_lies_over_white(kind: str, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *RED])
    image.putdata([0, 1])
    if kind == "GIF":
        transparency = 0
    np.testing.assert_array_equal(rgb(saved(image, kind, transparency=transparency))[0], [WHITE, RED])


def test_an_animation_is_its_first_frame() -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    for kind in ("GIF", "PNG", "WEBP"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        data = saved(first, kind, save_all=True, append_images=[second], duration=100, **lossless)
        np.testing.assert_array_equal(rgb(data)[4, 4], RED)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "PNG"])
def test_other_formats_are_read_exactly(kind: str) -> None:
    np.testing.assert_array_equal(rgb(saved(corners(), kind)), np.asarray(corners()))


def test_one_pixel() -> None:
    assert rgb(saved(Image.new("RGB", (1, 1), GREEN), "PNG")).tolist() == [[list(GREEN)]]


def test_a_picture_at_the_limit_is_left_alone_and_one_above_is_made_smaller() -> None:
    at = decode_picture(saved(corners(64, 48), "PNG"), max_side=64, max_pixels=64 * 48)
    assert (at.image_rgb.shape, at.scale) == ((48, 64, 3), 1.0)
    above = decode_picture(saved(corners(1001, 333), "PNG"), max_side=500, max_pixels=10**6)
    assert (above.width, above.height, above.scale) == (1001, 333, 500 / 1001)
    assert above.image_rgb.shape == (166, 500, 3)  # 333 * 500 / 1001 = 166.3
    np.testing.assert_array_equal(above.image_rgb[[0, 0, -1, -1], [0, -1, 0, -1]], [RED, GREEN, BLUE, WHITE])


def test_making_smaller_averages_areas() -> None:
    checks = Image.fromarray(np.indices((200, 200)).sum(axis=0).astype(np.uint8) % 2 * 255)
    assert set(np.unique(rgb(saved(checks, "PNG"), max_side=100))) <= {127, 128}


def test_a_thread_of_pixels_keeps_one_pixel_of_height() -> None:
    assert rgb(saved(Image.new("RGB", (5000, 1), RED), "PNG"), max_side=100).shape == (1, 100, 3)


def test_twenty_megapixels() -> None:
    data = saved(corners(5472, 3648), "JPEG")
    picture = decode_picture(data, max_side=1024, max_pixels=200_000_000)
    assert (picture.width, picture.height, picture.image_rgb.shape) == (5472, 3648, (683, 1024, 3))


def test_an_empty_file() -> None:
    assert reason(b"") == "empty_file"


@pytest.mark.parametrize("data", [b"this is a letter", b"\0" * 5000, b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture(data: bytes) -> None:
    assert reason(data) == "not_an_image"
    with pytest.raises(ImageError, match="no known picture format"):
        picture_size(data)


@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG", "PNG", "16-bit PNG", "GIF", "BMP", "TIFF"])
def test_a_picture_cut_anywhere_is_whole_or_refused_and_never_filled(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257 if kind == "16-bit PNG" else noise)
    data = saved(image, kind.split()[-1], **({"progressive": True} if kind.startswith("progressive") else {}))
    whole = rgb(data)
    reasons = set()
    for size in range(len(data) // 2, len(data), max(1, len(data) // 97)):
        try:
            np.testing.assert_array_equal(rgb(data[:size]), whole)
        except ImageError as error:
            reasons.add(error.reason)
    assert reasons == {"truncated"}


@pytest.mark.parametrize("missing", [1, 2, 20])
def test_a_jpeg_that_misses_its_last_bytes_is_truncated(missing: int) -> None:
    assert reason(PHOTOS[0].read_bytes()[:-missing]) == "truncated"


def test_a_download_that_left_zeros_is_truncated() -> None:
    data = PHOTOS[0].read_bytes()
    half = len(data) // 2
    assert reason(data[:half] + bytes(len(data) - half)) == "truncated"


def test_bytes_behind_a_jpeg_do_no_harm() -> None:
    data = PHOTOS[0].read_bytes()
    np.testing.assert_array_equal(rgb(data + b"\xff\xda a film of the same moment"), rgb(data))


def test_damaged_pixels_are_a_fault_of_decoding() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "PNG")
    half = len(data) // 2
    assert reason(data[:half] + b"\xff" * (len(data) - half)) == "decode"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_random_damage_has_no_other_outcome_than_a_picture_or_a_reason(kind: str) -> None:
    data = saved(corners(), kind, **({"exif": Image.Exif().tobytes()} if kind == "JPEG" else {}))
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(0, min(len(data), 300), 4)] = rng.integers(0, 256, 4)
        with contextlib.suppress(ImageError):
            decode_picture(damaged.tobytes(), max_side=64, max_pixels=10**6)
        with contextlib.suppress(ImageError):
            picture_size(damaged.tobytes())


def test_a_bomb_is_refused_by_its_header_without_taking_memory() -> None:
    bomb = png(30_000, 30_000, (b"IDAT", zlib.compress(bytes(1000))))
    tracemalloc.start()
    before = peak_rss_bytes()
    try:
        assert reason(bomb, max_pixels=200_000_000) == "too_many_pixels"
        assert picture_size(bomb) == (30_000, 30_000)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert peak_rss_bytes() - before < 50 * 2**20


def peak_rss_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_the_limit_on_pixels_is_inclusive_and_named() -> None:
    data = saved(corners(10, 10), "PNG")
    assert rgb(data, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match=r"10 x 10 pixels, dataset\.max_pixels is 99"):
        decode_picture(data, max_side=64, max_pixels=99)


def test_the_size_of_a_png_needs_no_pixels() -> None:
    assert picture_size(png(7, 5)) == (7, 5)


def test_warnings_of_the_reader_stay_inside_from_many_threads() -> None:
    # Pillow warns about this TIFF's broken tag; warnings are errors here.
    data = bytearray(saved(corners(), "TIFF"))
    (at,) = struct.unpack_from("<I", data, 4)
    entries = [at + 2 + 12 * i for i in range(struct.unpack_from("<H", data, at)[0])]
    spare = next(entry for entry in entries if struct.unpack_from("<H", data, entry)[0] == 284)
    struct.pack_into("<HHII", data, spare, 305, 2, 100, len(data) + 50)
    with pytest.warns(UserWarning, match="Truncated File Read"):
        Image.open(io.BytesIO(bytes(data))).load()
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(rgb, [bytes(data)] * 200))
    assert len(pictures) == 200
    assert warnings.filters == filters
