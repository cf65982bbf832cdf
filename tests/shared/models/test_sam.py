"""The SAM adapter: equal to the package with one mask a point, parity (specs/cotpl.md 8.2), and its errors."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import MaskDecoder
from segment_anything.utils.amg import remove_small_regions

import mill_jobs.demo
from mill_jobs.demo.scenes import HELD_OUT_SEEDS, make_scene
from mill_shared.errors import ConfigError, DeviceLostError, DeviceMemoryError
from mill_shared.geometry import mask_boxes
from mill_shared.models.config import MaskGeneratorSettings, SamConfig
from mill_shared.models.factory import build_mask_generator
from mill_shared.models.protocols import Masks
from mill_shared.models.sam import (
    SamMaskGenerator,
    Sizes,
    WholeObjectGenerator,
    WholeObjectPredictor,
    build_sam,
    clean_mask,
    load_sam,
)

Picture = NDArray[np.uint8]
Record = dict[str, Any]

SIZES = Sizes(
    image_size=64,
    patch_size=8,
    encoder_dim=16,
    encoder_depth=2,
    encoder_heads=2,
    encoder_global_attention=(1,),
    window_size=4,
    prompt_dim=32,
    mask_in_channels=4,
    decoder_depth=2,
    decoder_heads=2,
    decoder_mlp_dim=32,
    iou_head_depth=2,
    iou_head_dim=16,
)
DEMO = Path(mill_jobs.demo.__file__).parent / "models" / "sam.pth"
"""A trained SAM: an untrained one draws the same blot for every point, which tests none of the later steps."""
SETTINGS = MaskGeneratorSettings(points_per_side=4, points_per_batch=10)
"""Few points, in batches that do not come out even; the method's thresholds."""


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained SAM in the official format."""
    path = tmp_path_factory.mktemp("sam") / "tiny.pth"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(build_sam(SIZES).state_dict(), path)
    path.with_suffix(".json").write_bytes(msgspec.json.encode(SIZES))
    return path


@pytest.fixture(scope="module")
def picture() -> Picture:
    """A toy scene that is wider than high, with specks that leave small holes and islands in masks."""
    picture = make_scene(HELD_OUT_SEEDS[0], 3).image_rgb[40:-60].copy()
    rng = np.random.default_rng(5)
    for x, y in rng.integers(0, picture.shape[1::-1], (60, 2)):
        cv2.circle(picture, (int(x), int(y)), 6, rng.integers(0, 256, 3).tolist(), -1)
    return picture


def config(checkpoint: Path, **fields: Any) -> SamConfig:
    return SamConfig(checkpoint=checkpoint, architecture="custom", device="cpu", threads=1, **fields)


class ThirdMaskPredictor(SamPredictor):  # type: ignore[misc]  # segment_anything has no types
    """The package's predictor with the third mask alone. Source: specs/cotpl.md 1.3, step 3."""

    def predict_torch(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        masks, ious, low_res = super().predict_torch(*arguments, **named)
        return masks[:, 2:3], ious[:, 2:3], low_res[:, 2:3]


def package_records(wanted: MaskGeneratorSettings, picture: Picture, checkpoint: Path = DEMO) -> list[Record]:
    """What segment_anything itself makes of a picture, with the third mask alone."""
    model = load_sam(checkpoint, "custom").eval()
    generator = SamAutomaticMaskGenerator(
        model,
        points_per_side=wanted.points_per_side,
        points_per_batch=wanted.points_per_batch,
        pred_iou_thresh=wanted.pred_iou_threshold,
        stability_score_thresh=wanted.stability_threshold,
        stability_score_offset=wanted.stability_offset,
        box_nms_thresh=wanted.box_nms_threshold,
        crop_n_layers=wanted.crop_layers,
        crop_nms_thresh=wanted.crop_nms_threshold,
        crop_overlap_ratio=wanted.crop_overlap_ratio,
        crop_n_points_downscale_factor=wanted.crop_point_downscale,
        min_mask_region_area=wanted.min_mask_region_area_px,
    )
    generator.predictor = ThirdMaskPredictor(model)
    return list(generator.generate(picture))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"points_per_side": 6, "crop_layers": 0},
        {"points_per_side": 6, "crop_layers": 0, "min_mask_region_area_px": 0},
        {"points_per_side": 6, "crop_layers": 0, "stability_threshold": 0.0},
        {"crop_point_downscale": 2, "min_mask_region_area_px": 600, "crop_overlap_ratio": 0.5},
        {"box_nms_threshold": 0.5, "crop_nms_threshold": 0.95, "stability_offset": 1.5},
    ],
    ids=lambda change: " ".join(change) or "as set",
)
def test_equals_the_package_with_the_third_mask_alone(picture: Picture, change: dict[str, Any]) -> None:
    wanted = SETTINGS.model_copy(update=change)
    found = SamMaskGenerator(config(DEMO), wanted).generate(picture, 0)
    records = package_records(wanted, picture)
    assert len(found.masks) == len(records) > 1
    for mask, record in zip(found.masks, records, strict=True):
        assert np.array_equal(mask, record["segmentation"])
    assert found.predicted_ious.tolist() == [record["predicted_iou"] for record in records]
    assert found.stabilities.tolist() == [record["stability_score"] for record in records]
    assert [str(array.dtype) for array in (found.masks, found.predicted_ious, found.stabilities)] == [
        "bool", "float32", "float32"
    ]  # fmt: skip


def test_a_threshold_of_0_lets_everything_through_as_in_the_package(untrained: Path, picture: Picture) -> None:
    wanted = SETTINGS.model_copy(update={"pred_iou_threshold": 0, "stability_threshold": 0, "crop_layers": 0})
    found = SamMaskGenerator(config(untrained), wanted).generate(picture, 0)
    records = package_records(wanted, picture, untrained)
    assert found.predicted_ious.tolist() == [record["predicted_iou"] for record in records]
    assert (found.predicted_ious < 0).any()


@pytest.mark.parametrize("crop_layers", [0, 1])
def test_nothing_found_is_an_empty_result(picture: Picture, crop_layers: int) -> None:
    """Differs: the package ends with an index error, and the original loses the image. Source: specs/cotpl.md 1.3."""
    wanted = SETTINGS.model_copy(update={"stability_threshold": 1.0, "points_per_side": 2, "crop_layers": crop_layers})
    found = SamMaskGenerator(config(DEMO), wanted).generate(picture, 0)
    assert found.masks.shape == (0, *picture.shape[:2])
    assert found.predicted_ious.shape == found.stabilities.shape == (0,)
    if crop_layers:
        with pytest.raises(IndexError):
            package_records(wanted, picture)


class StubPredictor(WholeObjectPredictor):
    """Keeps the crop at hand, for a stub of the network to see, and counts."""

    encodes = 0

    def set_image(self, image: Picture, image_format: str = "RGB") -> None:
        self.encodes += 1
        self.model.crop = image
        super().set_image(image, image_format)


class StubSam(SimpleNamespace):
    """Gives every point on white the white pixels of the crop, in some of the three masks, and other points nothing."""

    device = torch.device("cpu")
    mask_threshold = 0.0
    image_format = "RGB"
    crop: Picture

    def __init__(self, good_masks: tuple[int, ...], score: float) -> None:
        super().__init__(image_encoder=StubEncoder(), prompt_encoder=StubPrompts(), decodes=0)
        self.good_masks, self.score = good_masks, score

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def mask_decoder(
        self, *, sparse_prompt_embeddings: torch.Tensor, multimask_output: bool, **_: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert multimask_output
        self.decodes += 1
        scale = max(self.crop.shape[:2]) / self.image_encoder.img_size
        columns, rows = (sparse_prompt_embeddings[:, 0] * scale).long().T
        is_white = torch.from_numpy(self.crop[..., 0] > 0)[rows, columns]
        ious = torch.zeros(len(is_white), 3)
        ious[:, self.good_masks] = is_white[:, None] * torch.tensor(self.score)
        return torch.where(ious > 0, 10.0, -10.0)[..., None, None], ious

    def postprocess_masks(
        self, low_res: torch.Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
    ) -> torch.Tensor:
        white = torch.from_numpy(np.where(self.crop[..., 0] > 0, 1.0, -1.0)).float()
        return torch.where(low_res > 0, low_res * white, low_res)


class StubEncoder:
    img_size = 1024

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image


class StubPrompts:
    def __call__(self, *, points: tuple[torch.Tensor, torch.Tensor], boxes: None, masks: None) -> Any:
        return points[0], None

    def get_dense_pe(self) -> None:
        return None


def run_stub(picture: Picture, good_masks: tuple[int, ...], score: float = 0.95) -> tuple[Masks, StubPredictor, Any]:
    model = StubSam(good_masks, score)
    defaults = MaskGeneratorSettings()
    generator = WholeObjectGenerator(model, defaults, defaults.points_per_batch)
    generator.predictor = StubPredictor(model)
    return generator.masks_of(picture), generator.predictor, model


@pytest.fixture
def block() -> Picture:
    """160 x 120 with a white block on rows 20 to 60, columns 30 to 90. Source: specs/cotpl.md 8.2."""
    picture = np.zeros((120, 160, 3), np.uint8)
    picture[20:61, 30:91] = 255
    return picture


def test_one_block_gives_one_record(block: Picture) -> None:
    """Source: specs/cotpl.md 8.2: box 30, 20, 60, 40 in inclusive extents, area 2501, 5 encodes, 80 decoder calls."""
    found, predictor, model = run_stub(block, (2,))
    assert mask_boxes(found.masks).tolist() == [[30, 20, 30 + 60 + 1, 20 + 40 + 1]]
    assert np.array_equal(found.masks[0], block[..., 0] > 0)
    assert int(found.masks.sum()) == 2501
    assert [float(iou) for iou in found.predicted_ious] == [0.949999988079071]
    assert found.stabilities.tolist() == [1]
    assert (predictor.encodes, model.decodes) == (5, 80)


def test_the_whole_frame_is_one_record() -> None:
    """Source: specs/cotpl.md 8.2: box 0, 0, 159, 119; what fills a crop touches its edge and goes."""
    found, _, _ = run_stub(np.full((120, 160, 3), 255, np.uint8), (2,))
    assert mask_boxes(found.masks).tolist() == [[0, 0, 160, 120]]


def test_the_first_two_masks_are_never_used(block: Picture) -> None:
    """Source: specs/cotpl.md 8.2. Differs: the original ends with an error."""
    assert len(run_stub(block, (0, 1))[0].masks) == 0


@pytest.mark.parametrize(("score", "count"), [(0.7, 0), (0.7001, 1)])
def test_the_predicted_iou_must_exceed_its_threshold(block: Picture, score: float, count: int) -> None:
    """Source: specs/cotpl.md 1.3, step 4."""
    assert len(run_stub(block, (2,), score)[0].masks) == count


def package_clean(mask: NDArray[np.bool_], least_area_px: int) -> tuple[NDArray[np.bool_], bool]:
    filled, had_holes = remove_small_regions(mask, least_area_px, "holes")
    found, had_islands = remove_small_regions(filled, least_area_px, "islands")
    return found, had_holes or had_islands


@st.composite
def speckled(draw: st.DrawFn) -> NDArray[np.bool_]:
    """Masks of blocks or specks, some at the edges, some in parts of equal size."""
    height, width = draw(st.integers(12, 50)), draw(st.integers(12, 50))
    side, share = draw(st.sampled_from([1, 2, 4, 7])), draw(st.sampled_from([0.02, 0.1, 0.5, 0.8, 0.95, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    coarse = rng.random((height // side + 1, width // side + 1)) < share
    mask = np.kron(coarse, np.ones((side, side), bool))[:height, :width]
    top, left = draw(st.integers(0, 11)), draw(st.integers(0, 11))
    mask[:top], mask[:, :left] = False, False
    return mask


@settings(max_examples=300, deadline=None)
@given(speckled(), st.sampled_from([1, 3, 10, 30, 100]))
def test_small_regions_go_as_in_the_package(mask: NDArray[np.bool_], least_area_px: int) -> None:
    expected, expected_change = package_clean(mask, least_area_px)
    given_mask = mask.copy()
    found, is_changed = clean_mask(mask, least_area_px)
    assert np.array_equal(found, expected)
    assert is_changed == expected_change
    assert np.array_equal(mask, given_mask)


def test_of_equal_islands_the_one_of_the_package_is_kept() -> None:
    """OpenCV numbers components by blocks of 2 x 2, so that a window from an odd row would number them otherwise."""
    mask = np.zeros((30, 30), bool)
    mask[10, 25:27] = True
    mask[11:13, 4] = True
    assert np.array_equal(clean_mask(mask, 100)[0], package_clean(mask, 100)[0])


def test_half_precision_gives_nearly_the_same(picture: Picture) -> None:
    wanted = SETTINGS.model_copy(update={"crop_layers": 0})
    exact = SamMaskGenerator(config(DEMO), wanted).generate(picture, 0)
    found = SamMaskGenerator(config(DEMO, precision="bfloat16"), wanted).generate(picture, 0)
    assert found.predicted_ious.dtype == found.stabilities.dtype == np.float32
    assert not np.array_equal(found.predicted_ious, exact.predicted_ious)
    flat, other = (masks.masks.reshape(len(masks.masks), -1).astype(np.float64) for masks in (exact, found))
    shared = flat @ other.T
    overlap = shared / (flat.sum(axis=1)[:, None] + other.sum(axis=1)[None] - shared)
    assert (overlap.max(axis=1) > 0.9).mean() >= 0.5


def test_the_factory_builds_it(untrained: Path, picture: Picture) -> None:
    wanted = MaskGeneratorSettings(points_per_side=2, crop_layers=0, pred_iou_threshold=0, stability_threshold=0)
    generator = build_mask_generator(config(untrained), wanted)
    first, second = generator.generate(picture, 0), generator.generate(picture, 1)
    assert first.masks.shape[1:] == picture.shape[:2]
    assert len(first.masks) > 0
    assert np.array_equal(first.masks, second.masks)


def test_out_of_memory_asks_for_a_smaller_batch(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = SETTINGS.model_copy(update={"crop_layers": 0, "points_per_batch": 12})
    generator = SamMaskGenerator(config(DEMO), wanted)
    expected = generator.generate(picture, 0)
    decode: Callable[..., Any] = MaskDecoder.forward

    def on_a_small_device(self: Any, *, sparse_prompt_embeddings: torch.Tensor, **others: Any) -> Any:
        if len(sparse_prompt_embeddings) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate 20.00 MiB")
        return decode(self, sparse_prompt_embeddings=sparse_prompt_embeddings, **others)

    monkeypatch.setattr(MaskDecoder, "forward", on_a_small_device)
    for _ in range(2):
        with pytest.raises(DeviceMemoryError, match=r"^CUDA out of memory\. Tried to allocate 20\.00 MiB$"):
            generator.generate(picture, 0)
        assert generator.halve_batch()
    found = generator.generate(picture, 0)
    assert np.array_equal(found.masks, expected.masks)
    assert generator.halve_batch()
    assert not generator.halve_batch()


def test_a_lost_device_is_told(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = SamMaskGenerator(config(DEMO), SETTINGS)

    def lost(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with ...")

    monkeypatch.setattr(MaskDecoder, "forward", lost)
    with pytest.raises(DeviceLostError, match="device-side assert triggered Compile"):
        generator.generate(picture, 0)


def no_file(path: Path) -> None:
    path.unlink()


def no_sizes(path: Path) -> None:
    path.with_suffix(".json").unlink()


def odd_sizes(path: Path) -> None:
    path.with_suffix(".json").write_text('{"image_size": 64}')


def other_sizes(path: Path) -> None:
    path.with_suffix(".json").write_bytes(msgspec.json.encode(msgspec.structs.replace(SIZES, encoder_depth=3)))


def text_file(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 375042383\n")


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_list(path: Path) -> None:
    torch.save([torch.zeros(3)], path)


def a_program(path: Path) -> None:
    torch.save({"run": eval}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_file, r"SAM checkpoint .*sam\.pth: no such file; put it there"),
        (no_sizes, r"SAM sizes .*sam\.json: a custom architecture needs this file"),
        (odd_sizes, r"SAM sizes .*sam\.json: .*missing required field `patch_size`"),
        (other_sizes, r"SAM checkpoint .*sam\.pth: no custom state dict; check .*architecture"),
        (text_file, r"SAM checkpoint .*sam\.pth: no custom state dict"),
        (empty_file, r"SAM checkpoint .*sam\.pth: no custom state dict"),
        (cut_file, r"SAM checkpoint .*sam\.pth: no custom state dict"),
        (a_list, r"SAM checkpoint .*sam\.pth: no custom state dict"),
        (a_program, r"SAM checkpoint .*sam\.pth: no custom state dict"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_loaded_is_named(
    untrained: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "sam.pth"
    path.write_bytes(untrained.read_bytes())
    path.with_suffix(".json").write_bytes(untrained.with_suffix(".json").read_bytes())
    damage(path)
    with pytest.raises(ConfigError, match=message) as caught:
        SamMaskGenerator(config(path), SETTINGS)
    assert "\n" not in str(caught.value)


def test_an_official_architecture_is_checked_against_the_file(untrained: Path) -> None:
    named = SamConfig(checkpoint=untrained, architecture="vit_b", device="cpu", threads=1)
    with pytest.raises(ConfigError, match=r"tiny\.pth: no vit_b state dict"):
        SamMaskGenerator(named, SETTINGS)
