"""What people put into image folders: each file gets a picture, or a failed record that says why."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mill_jobs.config import read_config
from mill_jobs.finalize import gather_chunks, record_table
from mill_jobs.label import Shard
from mill_jobs.run import label_shard, open_run
from mill_shared.errors import ExitCode
from runs import SAMPLE, last_error, mill, write_run


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def huge_png() -> bytes:
    """A picture of 30,000 x 30,000 pixels by its header, with next to nothing behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


def photo(width: int = 64, height: int = 48) -> Image.Image:
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def grey16() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16))


SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6
FRAMES = [photo(), photo(32, 24).resize((64, 48))]

FILES: dict[str, tuple[bytes, str, str | None, tuple[int, int] | None]] = {
    "a plain photo.jpg": (saved(photo(), "JPEG"), "empty", None, (64, 48)),
    "schöne größe 猫.jpeg": (saved(photo(), "JPEG"), "empty", None, (64, 48)),
    "animated.gif": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "empty", None, (64, 48)),
    "cmyk.jpg": (saved(photo().convert("CMYK"), "JPEG"), "empty", None, (64, 48)),
    "grey.png": (saved(photo().convert("L"), "PNG"), "empty", None, (64, 48)),
    "grey16.png": (saved(grey16(), "PNG"), "empty", None, (64, 48)),
    "one pixel.png": (saved(photo(1, 1), "PNG"), "empty", None, (1, 1)),
    "sideways.jpg": (saved(photo(), "JPEG", exif=SIDEWAYS), "empty", None, (48, 64)),
    "twenty megapixels.jpg": (saved(photo().resize((5472, 3648)), "JPEG"), "empty", None, (5472, 3648)),
    "transparent.png": (saved(photo().convert("RGBA"), "PNG"), "empty", None, (64, 48)),
    "upper case.JPG": (saved(photo(), "JPEG"), "empty", None, (64, 48)),
    "empty.jpg": (b"", "failed", "empty_file", None),
    "huge.png": (huge_png(), "failed", "too_many_pixels", None),
    "text.jpg": (b"this is a letter to my landlord", "failed", "not_an_image", None),
    "truncated.jpg": (saved(photo(640, 480), "JPEG")[:4000], "failed", "truncated", None),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str | None, int | None, int | None]]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").mkdir()
    for name, (data, *_) in FILES.items():
        (folder / "images" / name).write_bytes(data)
    missing = folder / "images" / "gone.jpg"
    missing.write_bytes(saved(photo(), "JPEG"))
    (folder / "images" / "notes.txt").write_text("not a picture, and not called one")
    path = write_run(folder, dataset={"images": str(folder / "images"), "coco": None})
    store, plan = open_run(read_config(_planned(path)))
    missing.unlink()
    label_shard(read_config(path), Shard(0, 1))
    with record_table(gather_chunks(store, plan, folder), plan, folder) as table:
        rows = table.connection.execute("select key, status, reason, width, height from records").fetchall()
    assert len(rows) == len(FILES) + 1
    return {key: (status, reason, width, height) for key, status, reason, width, height in rows}


def _planned(path: Path) -> Path:
    assert mill("plan", path).returncode == 0
    return path


@pytest.mark.parametrize("name", FILES)
def test_each_file_gets_a_picture_or_a_reason(
    records: dict[str, tuple[str, str | None, int | None, int | None]], name: str
) -> None:
    _, status, reason, size = FILES[name]
    assert records[name] == (status, reason, *(size or (None, None)))


def test_a_file_that_is_gone_since_the_plan_is_missing(
    records: dict[str, tuple[str, str | None, int | None, int | None]],
) -> None:
    assert records["gone.jpg"] == ("failed", "missing", None, None)


def test_two_files_with_one_id_are_a_plan_error_that_names_both(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("7.jpg", "0007.png"):
        (images / name).write_bytes(saved(photo(), name[-3:].upper().replace("JPG", "JPEG")))
    path = write_run(tmp_path, dataset={"images": str(images), "coco": None})
    ended = mill("plan", path)
    assert ended.returncode == ExitCode.CONFIG
    assert "images 0007.png and 7.jpg have one id, 7" in last_error(ended)
    assert mill("plan", path, "--set", "dataset.ids=path").returncode == 0


def test_own_classes_without_coco_and_without_a_base_file(tmp_path: Path) -> None:
    """A folder of pictures and nothing else: ids from 1, every weight 1."""
    path = write_run(tmp_path, images=45, finalize={"base": None, "base_classes": None})
    ended = mill("local", path, "--workers", 2, "--set", "recipe.finalize.selection.at_least=1")
    assert ended.returncode == 0, ended.stderr
    target = tmp_path / "bundle"
    assert mill("fetch", path, "--to", target).returncode == 0
    written = json.loads((target / "instances.json").read_text())
    assert [category["id"] for category in written["categories"]] == list(range(1, len(written["categories"]) + 1))
    assert written["annotations"]
    weights = {entry["name"]: entry["weight"] for entry in json.loads((target / "classes.json").read_text())["classes"]}
    assert set(weights.values()) == {1}
    names = {category["id"]: category["name"] for category in written["categories"]}
    truth = json.loads((SAMPLE / "instances.json").read_text())
    known = {category["name"] for category in truth["categories"]}
    assert {names[annotation["category_id"]] for annotation in written["annotations"]} <= known
