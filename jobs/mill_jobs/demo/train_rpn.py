"""Train the demo's proposal network: `python -m mill_jobs.demo.train_rpn`. About a quarter of an hour on one core.

The network is the pipeline's own, read from sizes as small as they go, and is written as Detectron2 writes its
checkpoints. As the method asks it learns from base shapes only: pictures of TRAIN_SEED that show any other shape are
left out, so novel shapes are found because they look like things, not because they were annotated.
Source: specs/vlplm.md 1.

A number of steps and a seed give the same weights again on the same machine.
"""

import argparse
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_iou, sigmoid_focal_loss

from mill_jobs.demo.scenes import BASE_CLASSES, HELD_OUT_SEEDS, NOVEL_CLASSES, TRAIN_SEED, Scene, make_scene
from mill_shared.models.config import ProposalsConfig
from mill_shared.models.rpn import (
    ANCHOR_SIZES,
    BOX_WEIGHTS,
    POOLED_SIDE,
    RPN_WEIGHTS,
    STRIDES,
    NormedConv,
    ProposalNetwork,
    Proposer,
    apply_deltas,
    level_anchors,
    pool_regions,
    prepare_image,
)

SIDE_PX = 224
"""Of the network's input: half of a scene, which leaves shapes of 50 to 110 pixels."""
CHANNELS, HIDDEN = 32, 128
STAGES = ((16, 32), (24, 48), (32, 64), (48, 96))
"""Narrow and wide channels of res2 to res5, one block each."""

_LOG = structlog.get_logger()
_BATCH = 8
_PEAK_RATE = 2e-3
_RAMP_STEPS = 50
_SURE_IOU, _EMPTY_IOU = 0.6, 0.3
"""Anchors above the first are things, below the second they are not; those between are not learnt from."""
_REGIONS = 24
"""Boxes of each picture that the box head learns to move."""
_REGION_SHIFT, _REGION_GROWTH = 0.3, 0.4
"""How far they lie from the true box: of its sides, and of their logarithm."""
_SAVE_EVERY = 250


@dataclass(frozen=True)
class Example:
    """A picture as the network sees it, and the things in it."""

    pixels: Tensor
    """(3, SIDE_PX, SIDE_PX) float32."""
    boxes_xyxy: Tensor
    """(N, 4) float32, frame of the network's input."""


def shapes_state() -> dict[str, Tensor]:
    """Return tensors without content, of the sizes that `ProposalNetwork` reads."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.bottom_up.stem.conv1.weight": (STAGES[0][0], 3, 7, 7)}
    inside = STAGES[0][0]
    for stage, (narrow, wide) in enumerate(STAGES, start=2):
        block = f"backbone.bottom_up.res{stage}.0"
        shapes |= {
            f"{block}.conv1.weight": (narrow, inside, 1, 1),
            f"{block}.conv3.weight": (wide, narrow, 1, 1),
            f"{block}.shortcut.weight": (wide, inside, 1, 1),
            f"backbone.fpn_lateral{stage}.weight": (CHANNELS, wide, 1, 1),
            f"backbone.fpn_output{stage}.weight": (CHANNELS, CHANNELS, 3, 3),
        }
        inside = wide
    shapes |= {
        "roi_heads.box_head.fc1.weight": (HIDDEN, CHANNELS * POOLED_SIDE**2),
        "roi_heads.box_head.fc2.weight": (HIDDEN, HIDDEN),
        "roi_heads.box_predictor.cls_score.weight": (2, HIDDEN),
        "roi_heads.box_predictor.bbox_pred.weight": (4, HIDDEN),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def build_network() -> ProposalNetwork:
    """Return the untrained network, its normalisations learning."""
    network = ProposalNetwork(shapes_state())
    for module in network.modules():
        if isinstance(module, NormedConv):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            # Frozen in what is loaded later: the names of the numbers are the same.
            module.norm = nn.BatchNorm2d(module.out_channels)  # type: ignore[assignment]
    head = network.proposal_generator.get_submodule("rpn_head")
    nn.init.constant_(head.get_parameter("objectness_logits.bias"), -3.0)
    for name in ("anchor_deltas.weight", "anchor_deltas.bias"):
        nn.init.normal_(head.get_parameter(name), std=0.01)
    nn.init.normal_(network.roi_heads.get_parameter("box_predictor.bbox_pred.weight"), std=0.01)
    return network


def make_example(scene: Scene) -> Example:
    """Return what the network sees of a scene."""
    pixels, height, _ = prepare_image(scene.image_rgb, SIDE_PX, SIDE_PX)
    boxes = torch.tensor([thing.bbox_xyxy for thing in scene.objects], dtype=torch.float32)
    return Example(pixels, boxes * (height / scene.image_rgb.shape[0]))


def draw_examples(scenes: int) -> list[Example]:
    """Return the first scenes of TRAIN_SEED, less those that show anything but base shapes."""
    found = []
    for index in range(scenes):
        scene = make_scene(TRAIN_SEED, index)
        if all(thing.name in BASE_CLASSES for thing in scene.objects):
            found.append(make_example(scene))
    return found


def vary(example: Example, rng: np.random.Generator) -> Example:
    """Return the example, perhaps mirrored, its colours swapped."""
    pixels, boxes = example.pixels[torch.from_numpy(rng.permutation(3))], example.boxes_xyxy
    for axis in (0, 1):
        if rng.random() < 0.5:
            pixels = pixels.flip(2 - axis)
            low, high = SIDE_PX - boxes[:, axis + 2], SIDE_PX - boxes[:, axis]
            boxes = boxes.clone()
            boxes[:, axis], boxes[:, axis + 2] = low, high
    return Example(pixels, boxes)


def encode_deltas(boxes_xyxy: Tensor, wanted_xyxy: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Return the (N, 4) deltas that lead from boxes to the wanted ones: the inverse of `apply_deltas`."""
    sizes, wanted_sizes = (boxes[:, 2:] - boxes[:, :2] for boxes in (boxes_xyxy, wanted_xyxy))
    centres, wanted_centres = (boxes[:, :2] + boxes[:, 2:] for boxes in (boxes_xyxy, wanted_xyxy))
    moves = (wanted_centres - centres) / 2 / sizes
    return torch.cat([moves, torch.log(wanted_sizes / sizes)], dim=1) * torch.tensor(weights)


def proposal_loss(network: ProposalNetwork, maps: list[Tensor], boxes_xyxy: Tensor) -> Tensor:
    """Return the loss of objectness and of the anchors' deltas on one picture."""
    scored = network.rpn(maps)
    logits, deltas = torch.cat([level[0] for level in scored]), torch.cat([level[1] for level in scored])
    anchors = torch.cat(
        [
            level_anchors(level.shape[2], level.shape[3], stride, size)
            for level, stride, size in zip(maps, STRIDES, ANCHOR_SIZES, strict=True)
        ]
    )
    overlaps = box_iou(anchors, boxes_xyxy)
    best, nearest = overlaps.max(dim=1)
    sure = best >= _SURE_IOU
    # Each thing has an anchor, however badly all fit.
    sure[overlaps.argmax(dim=0)] = True
    learnt = sure | (best < _EMPTY_IOU)
    found = sigmoid_focal_loss(logits[learnt], sure[learnt].float(), alpha=0.5, gamma=1.0, reduction="sum")
    wanted = encode_deltas(anchors[sure], boxes_xyxy[nearest[sure]], RPN_WEIGHTS)
    moved = functional.smooth_l1_loss(deltas[sure], wanted, beta=0.1, reduction="sum")
    loss: Tensor = (found + moved) / max(1, int(sure.sum()))
    return loss


def region_loss(network: ProposalNetwork, maps: list[Tensor], boxes_xyxy: Tensor) -> Tensor:
    """Return the loss of the box head on boxes around the true ones, far and near, since it moves its own results."""
    true = boxes_xyxy[torch.randint(len(boxes_xyxy), (_REGIONS,))]
    spoilt = torch.rand(_REGIONS, 1) * (torch.rand(_REGIONS, 4) * 2 - 1)
    limits = torch.tensor([_REGION_SHIFT, _REGION_SHIFT, _REGION_GROWTH, _REGION_GROWTH])
    regions = apply_deltas(true, (spoilt * limits)[:, None], RPN_WEIGHTS)[:, 0]
    nearest = box_iou(regions, boxes_xyxy).argmax(dim=1)
    head = network.roi_heads.get_submodule("box_head")
    hidden = functional.relu(head.get_submodule("fc1")(pool_regions(maps, regions).flatten(1)))
    hidden = functional.relu(head.get_submodule("fc2")(hidden))
    deltas = network.roi_heads.get_submodule("box_predictor.bbox_pred")(hidden)
    wanted = encode_deltas(regions, boxes_xyxy[nearest], BOX_WEIGHTS)
    return functional.smooth_l1_loss(deltas, wanted, beta=0.5)


def save(network: ProposalNetwork, path: Path) -> None:
    """Write the checkpoint in float16, whole or not at all."""
    state = {name: value.half() for name, value in network.state_dict().items() if value.is_floating_point()}
    partial_path = path.with_suffix(".partial")
    torch.save({"model": state}, partial_path)
    partial_path.replace(path)


def demo_proposals(checkpoint: Path) -> ProposalsConfig:
    """Return the settings that the network was made for; the rest is the method's own."""
    return ProposalsConfig(
        checkpoint=checkpoint, device="cpu", threads=1, short_side_px=SIDE_PX, long_side_px=SIDE_PX, kept=30,
        keep_before_refining=True,
    )  # fmt: skip


def measure(checkpoint: Path, seed: int, count: int) -> dict[str, float]:
    """Return the share of base and of novel shapes with a proposal of IoU 0.5 and 0.75, and their mean objectness."""
    proposer = Proposer(demo_proposals(checkpoint))
    overlaps: dict[str, list[float]] = {"base": [], "novel": []}
    sureness: dict[str, list[float]] = {"base": [], "novel": []}
    for index in range(count):
        scene = make_scene(seed, index)
        found = proposer.propose(scene.image_rgb)
        for thing in scene.objects:
            kind = "base" if thing.name in BASE_CLASSES else "novel" if thing.name in NOVEL_CLASSES else "extra"
            if kind == "extra":
                continue
            true: NDArray[np.float32] = np.array([thing.bbox_xyxy], np.float32)
            overlap = box_iou(torch.from_numpy(found.boxes_xyxy), torch.from_numpy(true))[:, 0].numpy()
            overlaps[kind].append(float(overlap.max(initial=0)))
            sureness[kind].append(float(found.objectness[overlap >= 0.5].max(initial=0)))
    return {
        f"{kind}_{what}": value
        for kind, ious in overlaps.items()
        for what, value in (
            ("50", float(np.mean(np.array(ious) >= 0.5))),
            ("75", float(np.mean(np.array(ious) >= 0.75))),
            ("sure", float(np.mean(sureness[kind]))),
            ("above_06", float(np.mean(np.array(sureness[kind]) > 0.6))),
        )
    }


def train(out: Path, steps: int, scenes: int, seed: int) -> None:
    """Train for `steps` batches of pictures from the first `scenes` scenes; write the checkpoint now and then."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    started = time.monotonic()
    examples = draw_examples(scenes)
    _LOG.info("drawn", pictures=len(examples), minutes=round((time.monotonic() - started) / 60, 1))
    network = build_network().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _PEAK_RATE, total_steps=steps, pct_start=min(0.3, _RAMP_STEPS / steps)
    )
    losses: list[tuple[float, float]] = []
    for step in range(1, steps + 1):
        batch = [vary(examples[at], rng) for at in rng.integers(len(examples), size=_BATCH).tolist()]
        maps = network.backbone(torch.stack([example.pixels for example in batch]))
        found, moved = torch.zeros(()), torch.zeros(())
        for place, example in enumerate(batch):
            own = [level[place : place + 1] for level in maps]
            found = found + proposal_loss(network, own, example.boxes_xyxy) / _BATCH
            moved = moved + region_loss(network, own, example.boxes_xyxy) / _BATCH
        (found + moved).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append((found.item(), moved.item()))
        if step % 50 == 0:
            proposals, regions = np.mean(losses[-50:], axis=0).round(4).tolist()
            minutes = round((time.monotonic() - started) / 60, 1)
            _LOG.info("step", step=step, minutes=minutes, proposals=proposals, regions=regions)
        if step % _SAVE_EVERY == 0 or step == steps:
            save(network, out)
            result = measure(out, HELD_OUT_SEEDS[0], 30)
            _LOG.info("held out", step=step, **{name: round(value, 3) for name, value in result.items()})


def main() -> None:
    """Parse the command line and train."""
    models = Path(str(files("mill_jobs.demo"))) / "models"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=models / "rpn.pth")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    train(arguments.out, arguments.steps, arguments.scenes, arguments.seed)


if __name__ == "__main__":
    main()
