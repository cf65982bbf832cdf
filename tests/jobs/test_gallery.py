"""Pictures of labels: that what is drawn is where and what it should be. How they look is for the eye."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mill_jobs.gallery import PAPER, Drawn, beside, colour_of, contact_sheet, draw_final, draw_labels
from mill_shared.errors import ConfigError
from mill_shared.geometry import encode_masks
from mill_shared.presets import COCO_80
from oracle_run import OracleRun

Image = NDArray[np.uint8]


def grey(width: int = 200, height: int = 120) -> Image:
    return np.full((height, width, 3), 128, np.uint8)


def read(path: Path) -> Image:
    image = cv2.imread(str(path))
    assert image is not None
    return np.asarray(image[..., ::-1], np.uint8)


def changed(before: Image, after: Image) -> tuple[int, int, int, int]:
    """Return x0, y0, x1, y1 of the pixels that differ."""
    rows, columns = np.nonzero((before != after).any(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_a_box_is_drawn_in_the_scale_of_the_picture_and_the_original_is_left_alone() -> None:
    image = grey()
    drawn = draw_labels(image, [Drawn((100, 80, 380, 220), "cat")], scale=0.5)
    assert (image == 128).all()
    x0, y0, x1, y1 = changed(image, drawn)
    assert max(abs(x0 - 50), abs(x1 - 190), abs(y1 - 110)) <= 2, "half of the line's width"
    assert y0 < 40, "the name is on top of the box"
    assert (drawn[44:106, 54:186] == 128).all(), "nothing inside"


def test_a_mask_tints_its_pixels_alone_whatever_its_resolution() -> None:
    mask = np.zeros((60, 100), bool)
    mask[30:50, 40:80] = True
    drawn = draw_labels(grey(), [Drawn((80, 60, 160, 100), "cat", mask=mask)], scale=1.0)
    inside, outside = drawn[64:96, 84:156].reshape(-1, 3), drawn[104:].reshape(-1, 3)
    assert (outside == 128).all()
    expected = 128 * 0.55 + np.array(colour_of("cat")) * 0.45
    assert np.abs(inside - expected).max() <= 1


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 200, 120), (200, 120)),
        ((190, 110, 200, 120), (200, 120)),
        ((-30, -30, 500, 500), (200, 120)),
        ((0, 0, 6, 4), (6, 4)),
    ],
)
def test_names_stay_inside_the_picture(box: tuple[float, float, float, float], size: tuple[int, int]) -> None:
    image = grey(*size)
    drawn = draw_labels(image, [Drawn(box, "a name that is much too long for this picture", 0.5)], scale=1.0)
    assert drawn.shape == image.shape
    assert (drawn != image).any()


def test_colours_are_stable_and_names_can_be_read_on_them() -> None:
    assert colour_of("cat") == colour_of("cat")
    assert len({colour_of(name) for name in COCO_80}) == len(COCO_80)
    for name in COCO_80:
        drawn = draw_labels(grey(300, 60), [Drawn((10, 30, 250, 55), name)], scale=1.0)
        chip = drawn[14:28, 11:60].astype(float) @ (0.299, 0.587, 0.114)
        assert chip.max() - chip.min() > 90, name


def test_base_truth_is_grey_and_named_only_where_there_is_room() -> None:
    room = draw_labels(grey(), [Drawn((20, 40, 180, 100), "person", muted=True)], scale=1.0)
    assert (room.max(axis=2) == room.min(axis=2)).all(), "no colour"
    tight = draw_labels(grey(), [Drawn((20, 40, 40, 100), "person", muted=True)], scale=1.0)
    assert (tight[:39] == 128).all(), "no name"


def test_pages_hold_their_panels_side_by_side_and_captions_are_cut_to_them() -> None:
    left, right = np.full((50, 40, 3), 10, np.uint8), np.full((50, 90, 3), 20, np.uint8)
    page = beside([("a caption that is far too long for a panel of forty pixels", left), ("b", right)])
    assert (page == 10).all(axis=2).sum() >= 50 * 40
    assert (page[-60:-10, 60:150] == 20).all()
    assert (page[:20, 52:58] == PAPER).all(), "the first caption ends where its panel ends"
    sheet = contact_sheet([page, page, page], columns=2)
    assert sheet.shape[1] == 2 * page.shape[1]
    assert (sheet == 20).all(axis=2).sum() == 3 * 50 * 90


def test_a_final_is_drawn_beside_the_truth(oracle_run: OracleRun, tmp_path: Path) -> None:
    run = oracle_run
    sheet = draw_final(run.config, run.plan, run.store, run.final, run.truth, tmp_path / "pictures")
    pages = sorted((tmp_path / "pictures").glob("0*.png"))
    assert sheet == tmp_path / "pictures" / "index.png"
    assert [path.name for path in pages] == sorted({path.name for path in pages})
    assert len(pages) == 6
    assert pages[0].stem == "000000-000000000790"
    page = read(pages[0])
    half = page.shape[1] // 2
    ours, truth = page[:, :half], page[:, half:]
    table = np.array(colour_of("dining table"))
    for panel in (ours, truth):
        assert (np.abs(panel.astype(int) - table).max(axis=2) <= 3).sum() > 500, "the dining table's box"
    dog = np.array(colour_of("dog"))
    assert (np.abs(truth.astype(int) - dog).max(axis=2) <= 3).sum() > 100
    assert read(sheet).shape[0] > page.shape[0]


def test_a_final_is_drawn_without_a_truth_and_an_image_that_is_gone_is_skipped(
    oracle_run: OracleRun, tmp_path: Path
) -> None:
    run = oracle_run
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(Path(run.config.dataset.images).glob("*.jpg")):
        if path.stem in ("000000000790", "000000252639"):
            (images / path.name).symlink_to(path)
    dataset = run.config.dataset.model_copy(update={"images": str(images)})
    config = run.config.model_copy(update={"dataset": dataset})
    draw_final(config, run.plan, run.store, run.final, None, tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 2
    page = read(next((tmp_path / "pictures").glob("000000-*.png")))
    assert page.shape[1] == 500, "one panel"


def test_fewer_pictures_are_spread_over_the_final(oracle_run: OracleRun, tmp_path: Path) -> None:
    run = oracle_run
    draw_final(run.config, run.plan, run.store, run.final, run.truth, tmp_path, count=2)
    assert sorted(int(path.name[:6]) for path in tmp_path.glob("0*.png")) == [0, 3]


def test_outlines_in_run_lengths_are_drawn_and_a_broken_truth_is_an_error(
    oracle_run: OracleRun, tmp_path: Path
) -> None:
    run = oracle_run
    content = json.loads(run.truth.read_bytes())
    left_half = np.zeros((1, 422, 640), bool)
    left_half[..., :320] = True
    outline = {"size": [422, 640], "counts": encode_masks(left_half)[0].counts.decode()}
    item = {"id": 1, "image_id": 790, "category_id": 17, "bbox": [0, 0, 320, 422], "segmentation": outline}
    content["annotations"] = [item]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(content))
    draw_final(run.config, run.plan, run.store, run.final, truth, tmp_path / "a", count=1)
    page = read(next((tmp_path / "a").glob("0*.png")))
    original = cv2.imread(str(Path(run.config.dataset.images) / "000000000790.jpg"))
    assert original is not None
    plain = cv2.resize(original[..., ::-1], (480, 316), interpolation=cv2.INTER_AREA)
    panel = page[26 : 26 + 316, 500:980]
    differs = np.abs(panel.astype(int) - plain).max(axis=2) > 8
    left, right = differs[30:310, 10:230], differs[30:310, 250:470]
    assert left.mean() > 0.95
    assert right.mean() < 0.05
    outline["counts"] = "0P`U4P`U4"
    truth.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"truth: annotation 1: its segmentation is no run-length code"):
        draw_final(run.config, run.plan, run.store, run.final, truth, tmp_path / "b", count=1)
    truth.write_text("[]")
    with pytest.raises(ConfigError, match=r"truth\.json"):
        draw_final(run.config, run.plan, run.store, run.final, truth, tmp_path / "b")
