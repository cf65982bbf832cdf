"""The proposal network: cases of the specification, and torchvision's own modules as a second opinion."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn

from mill_shared.errors import ConfigError
from mill_shared.models.config import ProposalsConfig
from mill_shared.models.rpn import (
    BOX_WEIGHTS,
    ProposalNetwork,
    Proposer,
    apply_deltas,
    choose_proposals,
    level_anchors,
    load_network,
    pool_regions,
    pooled_levels,
    prepare_image,
    resized_size,
)
from tiny_rpn import CHANNELS, Reference, detectron_key, detectron_state, make_reference

# Geometry. Source: specs/vlplm.md 1.1 step B, 4, 8.5 and 8.6


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (427, 640, (800, 1199)), (480, 640, (800, 1067)), (640, 480, (1067, 800)), (300, 1000, (400, 1333)),
        (500, 333, (1201, 800)),
    ],
)  # fmt: skip
def test_input_sizes(height: int, width: int, expected: tuple[int, int]) -> None:
    assert resized_size(height, width, 800, 1333) == expected


def test_refinement_adds_up_without_clipping() -> None:
    boxes = torch.tensor([[100.0, 100.0, 200.0, 150.0]])
    deltas = torch.tensor([[[1.0, -2.0, 0.5, 0.0]]])
    for expected in (
        (104.74146, 90, 215.25854, 140), (109.98157, 80, 232.12186, 130), (115.77279, 70, 250.75870, 120),
    ):  # fmt: skip
        boxes = apply_deltas(boxes, deltas, BOX_WEIGHTS)[:, 0]
        assert boxes[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_growth_is_limited() -> None:
    grown = apply_deltas(torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.tensor([[[0.0, 0.0, 100.0, 100.0]]]), (1,) * 4)
    assert grown[0, 0].tolist() == pytest.approx([-492, -492, 508, 508], abs=1e-3)


def test_levels_of_squares() -> None:
    sides = torch.tensor([111, 112, 223.9, 224, 448, 10, 1000])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], dim=1)
    assert pooled_levels(boxes).tolist() == [0, 1, 1, 2, 3, 0, 3]


def test_a_box_turned_inside_out_is_pooled_all_the_same() -> None:
    assert pooled_levels(torch.tensor([[10.0, 0.0, 0.0, 10.0], [5.0, 5.0, 5.0, 5.0]])).tolist() == [0, 0]


def test_anchors_are_not_rounded_and_begin_at_the_corner() -> None:
    anchors = level_anchors(2, 3, 64, 512)
    assert anchors.shape == (18, 4)
    narrow, wide = 512 / math.sqrt(2), 512 * math.sqrt(2)
    for anchor, (width, height) in zip(anchors[:3], [(wide, narrow), (512, 512), (narrow, wide)], strict=True):
        assert anchor.tolist() == pytest.approx([-width / 2, -height / 2, width / 2, height / 2], abs=1e-3)
    assert (anchors[4] - anchors[1]).tolist() == [64, 0, 64, 0]
    assert (anchors[10] - anchors[1]).tolist() == [0, 64, 0, 64]


def test_pooling_is_aligned_to_pixel_centres() -> None:
    ramp = torch.arange(64, dtype=torch.float32).expand(1, 1, 64, 64)
    maps = [ramp, ramp, ramp, ramp]
    box = torch.tensor([[40.0, 32.0, 110.0, 100.0]])  # a small one, from p2 at stride 4
    centres = (40 + (torch.arange(7) + 0.5) * 10) / 4 - 0.5
    assert pool_regions(maps, box)[0, 0, 3].tolist() == pytest.approx(centres.tolist(), abs=1e-4)


def test_pictures_are_blue_first_and_padded_with_zeros_after_the_mean_is_gone() -> None:
    picture = np.zeros((30, 40, 3), np.uint8)
    picture[..., 0], picture[..., 2] = 200, 50
    pixels, height, width = prepare_image(picture, 30, 100)
    assert (height, width, pixels.shape) == (30, 40, (3, 32, 64))
    assert pixels[:, 5, 5].tolist() == pytest.approx([50 - 103.53, -116.28, 200 - 123.675], abs=1e-4)
    assert not pixels[:, 30:].any()
    assert not pixels[:, :, 40:].any()


# Choosing proposals


def scored_boxes(levels: list[list[tuple[float, tuple[float, float, float, float]]]]) -> dict[str, Any]:
    """Return arguments of `choose_proposals` with one cell of anchors a level, sent to the given boxes."""
    scored = []
    for level, lines in enumerate(levels):
        anchors = level_anchors(1, len(lines), 4 * 2**level, 32 * 2**level)
        logits = torch.full((len(anchors),), -20.0)
        deltas = torch.zeros(len(anchors), 4)
        for place, (logit, box) in enumerate(lines):
            anchor = anchors[3 * place]
            size, wanted = anchor[2:] - anchor[:2], torch.tensor(box)
            deltas[3 * place, :2] = (wanted[:2] + wanted[2:] - anchor[:2] - anchor[2:]) / 2 / size
            deltas[3 * place, 2:] = torch.log((wanted[2:] - wanted[:2]) / size)
            logits[3 * place] = logit
        scored.append((logits, deltas))
    return {"scored": scored, "sizes": [(1, len(lines)) for lines in levels]}


def test_proposals_are_sorted_clipped_and_suppressed_inside_their_level() -> None:
    big, near, outside = (20.0, 20.0, 60.0, 60.0), (20.0, 20.0, 60.0, 50.0), (300.0, 0.0, 340.0, 40.0)
    given = scored_boxes([[(2.0, big), (1.0, near), (5.0, outside)], [(3.0, near)]])
    boxes, logits = choose_proposals(**given, height=55, width=100, per_level=3, nms_iou=0.3, most=10)
    # The one behind the picture is empty once clipped; `near` of the other level stays although `big` overlaps it.
    assert logits[:2].tolist() == [3.0, 2.0]
    assert boxes[0].tolist() == pytest.approx([20, 20, 60, 50], abs=1e-3)
    assert boxes[1].tolist() == pytest.approx([20, 20, 60, 55], abs=1e-3)
    assert 1.0 not in logits.tolist()


def test_only_the_best_of_a_level_and_of_all_are_kept() -> None:
    lines = [(float(place), (20.0 * place, 0.0, 20.0 * place + 15, 15.0)) for place in range(1, 6)]
    given = scored_boxes([lines, lines])
    _, logits = choose_proposals(**given, height=50, width=200, per_level=2, nms_iou=0.3, most=100)
    assert logits.tolist() == [5, 5, 4, 4]
    _, logits = choose_proposals(**given, height=50, width=200, per_level=2, nms_iou=0.3, most=3)
    assert logits.tolist() == [5, 5, 4]


# The network against torchvision's modules, through the key map. Source: specs/vlplm.md 4.1 and 4.2


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference(seed=3)


@pytest.fixture(scope="module")
def state(reference: Reference) -> dict[str, Tensor]:
    return detectron_state(reference)


@pytest.fixture
def checkpoint(state: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "proposals.pth"
    extra = {
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
        "pixel_mean": torch.zeros(3, 1, 1),
        "roi_heads.mask_head.predictor.weight": torch.zeros(1, CHANNELS, 1, 1),
    }
    torch.save({"model": {**state, **extra}, "iteration": 89999}, path)
    return path


def test_the_networks_agree(reference: Reference, checkpoint: Path) -> None:
    network = load_network(checkpoint).eval()
    torch.manual_seed(1)
    pixels = torch.randn(1, 3, 96, 160) * 50
    with torch.inference_mode():
        maps, expected = network.backbone(pixels), list(reference.backbone(pixels).values())
        assert [level.shape for level in maps] == [level.shape for level in expected]
        for ours, theirs in zip(maps, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
        logits, deltas = reference.rpn.get_submodule("head")(expected)
        for (our_logits, our_deltas), their_logits, their_deltas in zip(network.rpn(maps), logits, deltas, strict=True):
            assert torch.allclose(our_logits, their_logits[0].permute(1, 2, 0).flatten(), rtol=1e-3, atol=1e-3)
            by_anchor = their_deltas[0].view(3, 4, *their_deltas.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4)
            assert torch.allclose(our_deltas, by_anchor, rtol=1e-3, atol=1e-3)
        boxes = torch.tensor([[10.0, 20.0, 60.0, 70.0], [0.0, 0.0, 159.0, 95.0]])
        heads = reference.roi_heads
        expected_boxes = boxes
        for _ in range(3):
            hidden = heads.get_submodule("box_head")(pool_regions(maps, expected_boxes))
            moves = heads.get_submodule("box_predictor.bbox_pred")(hidden)
            expected_boxes = apply_deltas(expected_boxes, moves[:, None], BOX_WEIGHTS)[:, 0]
        assert not torch.allclose(expected_boxes, boxes, atol=0.5)
        assert torch.allclose(network.refine(maps, boxes, 3), expected_boxes, atol=1e-2)


def test_the_published_architecture_is_built_from_its_keys_alone() -> None:
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
        state = {detectron_key(key): value for key, value in theirs.state_dict().items() if "num_batches" not in key}
        state["roi_heads.box_predictor.bbox_pred.weight"] = torch.zeros(4, 1024)
        state["roi_heads.box_predictor.bbox_pred.bias"] = torch.zeros(4)
        state["roi_heads.mask_head.predictor.weight"] = torch.zeros(1, 256, 1, 1)
        state["roi_heads.mask_head.predictor.bias"] = torch.zeros(1)
        assert (len(state), sum(value.numel() for value in state.values())) == (307, 44_024_278)
        network = ProposalNetwork(state)
    ours = network.state_dict()
    masks = {key for key in state if "mask_head" in key}
    assert len(masks) == 12
    assert ours.keys() == state.keys() - masks
    assert {key: value.shape for key, value in ours.items()} == {key: state[key].shape for key in ours}


def test_deltas_of_several_classes_are_averaged(state: dict[str, Tensor], tmp_path: Path) -> None:
    doubled = dict(state)
    for part in ("weight", "bias"):
        values = state[f"roi_heads.box_predictor.bbox_pred.{part}"]
        doubled[f"roi_heads.box_predictor.bbox_pred.{part}"] = torch.cat([values, -values])
    torch.save(doubled, tmp_path / "k2.pth")
    network = load_network(tmp_path / "k2.pth")
    maps = [torch.randn(1, CHANNELS, 40 // 2**i, 40 // 2**i) for i in range(5)]
    boxes = torch.tensor([[10.0, 20.0, 60.0, 70.0]])
    with torch.inference_mode():
        pooled = pool_regions(maps, boxes).flatten(1)
        head = network.roi_heads.get_submodule("box_head")
        hidden = head.get_submodule("fc2")(head.get_submodule("fc1")(pooled).relu()).relu()
        deltas = network.roi_heads.get_submodule("box_predictor.bbox_pred")(hidden).view(1, 2, 4)
        both = apply_deltas(boxes, deltas, BOX_WEIGHTS)
        assert torch.allclose(network.refine(maps, boxes, 1), both.mean(dim=1), atol=1e-4)


# The adapter


def picture(height: int = 70, width: int = 101) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def config(checkpoint: Path, **changes: Any) -> ProposalsConfig:
    values = {"device": "cpu", "short_side_px": 96, "long_side_px": 160, "kept": 20, "per_level": 200, **changes}
    return ProposalsConfig(checkpoint=checkpoint, **values)


@pytest.fixture(autouse=True)
def forget_determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def test_proposals_of_a_picture(checkpoint: Path) -> None:
    found = Proposer(config(checkpoint)).propose(picture())
    assert found.boxes_xyxy.shape == (20, 4)
    assert found.boxes_xyxy.dtype == found.objectness.dtype == np.float32
    assert (np.diff(found.objectness) <= 0).all()
    assert ((found.objectness > 0) & (found.objectness <= 1)).all()
    again = Proposer(config(checkpoint)).propose(picture())
    assert np.array_equal(found.boxes_xyxy, again.boxes_xyxy)


def test_boxes_are_in_the_frame_of_the_picture_by_the_ratio_of_the_heights(checkpoint: Path) -> None:
    found = Proposer(config(checkpoint, passes=0)).propose(picture())
    # 70 x 101 becomes 96 x 139: x is mapped back by 70 / 96 as well.
    assert found.boxes_xyxy.min() >= 0
    assert found.boxes_xyxy[:, 3].max() <= 70 + 1e-4
    assert found.boxes_xyxy[:, 2].max() <= 139 * 70 / 96 + 1e-4


def test_refining_the_kept_alone_gives_the_same_boxes(checkpoint: Path) -> None:
    all_refined = Proposer(config(checkpoint)).propose(picture())
    few_refined = Proposer(config(checkpoint, keep_before_refining=True)).propose(picture())
    unrefined = Proposer(config(checkpoint, passes=0)).propose(picture())
    assert np.abs(all_refined.boxes_xyxy - few_refined.boxes_xyxy).max() < 1e-2
    assert np.abs(all_refined.boxes_xyxy - unrefined.boxes_xyxy).max() > 1
    assert np.array_equal(all_refined.objectness, few_refined.objectness)
    assert np.array_equal(all_refined.objectness, unrefined.objectness)


def test_old_and_wrapped_checkpoints_load(state: dict[str, Tensor], tmp_path: Path) -> None:
    old = {f"module.{key}": value for key, value in state.items() if not key.endswith(("running_mean", "running_var"))}
    torch.save(old, tmp_path / "old.pth")
    norm = load_network(tmp_path / "old.pth").backbone.bottom_up.get_submodule("res2.0.conv1.norm")
    assert norm.get_buffer("running_mean").tolist() == [0.0] * 4
    assert norm.get_buffer("running_var").tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("backbone.bottom_up.res4.0.conv1.weight", "lacks backbone.bottom_up.res4.0.conv1.weight"),
        ("roi_heads.box_head.fc1.bias", "lacks roi_heads.box_head.fc1.bias"),
        ("roi_heads.box_head.fc2.weight", "lacks roi_heads.box_head.fc2.weight"),
    ],
)
def test_another_architecture_is_refused(state: dict[str, Tensor], tmp_path: Path, drop: str, message: str) -> None:
    torch.save({key: value for key, value in state.items() if key != drop}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=rf"other\.pth: no R-CNN with FPN of Detectron2: .*{re.escape(message)}"):
        load_network(tmp_path / "other.pth")


def test_unknown_parts_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**state, "roi_heads.keypoint_head.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ConfigError, match=r"more\.pth: .* also has roi_heads\.keypoint_head\.weight"):
        load_network(tmp_path / "more.pth")


def test_missing_and_damaged_files_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.pth: no such file"):
        load_network(tmp_path / "nowhere.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"cut\.pth: not a file of torch\.save"):
        load_network(cut)
