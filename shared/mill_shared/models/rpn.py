"""A class-agnostic proposal network: Detectron2's R-CNN with FPN, its RPN and its box head, in torch and torchvision.

Modules bear Detectron2's names, so that its checkpoints load as they are, and every size is read from the checkpoint.
Source: specs/vlplm.md 4. The mask head and the class scores of the box head are not used.
"""

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops.boxes import batched_nms

from mill_shared.errors import ConfigError, DeviceLostError, DeviceMemoryError
from mill_shared.models.config import ProposalsConfig
from mill_shared.models.device import one_line, prepare_torch, use_tf32

PIXEL_MEAN_BGR = (103.530, 116.280, 123.675)
"""Subtracted from the pixels, which are not divided. Source: specs/vlplm.md 1.1 step C."""
SIZE_DIVISOR = 32
STRIDES = (4, 8, 16, 32, 64)
"""Of p2 to p6. Never computed from the size of a map, which the padding makes odd. Source: specs/vlplm.md 4.2."""
ANCHOR_SIZES = (32, 64, 128, 256, 512)
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
"""Height / width. Source: specs/vlplm.md 4."""
RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MAX_LOG_GROWTH = math.log(1000 / 16)
"""Limit of the logarithm by which a delta may grow a side. Source: specs/vlplm.md 4."""
POOLED_SIDE = 7
POOLED_LEVELS = 4
"""Regions are pooled from p2 to p5."""
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4
"""A square of this side is pooled from this level. Source: specs/vlplm.md 4."""

IGNORED_PREFIXES = ("roi_heads.mask_head.", "proposal_generator.anchor_generator.", "pixel_mean", "pixel_std")
"""Parts of a checkpoint that are not used. Source: specs/vlplm.md 4.1."""

_UNREADABLE = (
    OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, AttributeError, LookupError, ImportError,
    RuntimeError,
)  # fmt: skip
"""What torch.load raises, depending on where a file stops making sense."""
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Proposals:
    """Refined boxes of one picture, the surest first."""

    boxes_xyxy: NDArray[np.float32]
    """(N, 4), pixels of the picture as it was given; may reach out of it."""
    objectness: NDArray[np.float32]
    """(N,), in (0, 1), of the proposals before refinement."""


# Geometry


def resized_size(height: int, width: int, short_side_px: int, long_side_px: int) -> tuple[int, int]:
    """Return (height, width) of the network's input. Source: specs/vlplm.md 1.1 step B."""
    scale = short_side_px / min(height, width)
    new_height, new_width = (
        (float(short_side_px), scale * width) if height < width else (scale * height, float(short_side_px))
    )
    longer = max(new_height, new_width)
    if longer > long_side_px:
        scale = long_side_px / longer
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


def apply_deltas(boxes_xyxy: Tensor, deltas: Tensor, weights: Sequence[float]) -> Tensor:
    """Return boxes moved and grown by deltas, not clipped. Source: specs/vlplm.md 4.

    Args:
        boxes_xyxy: (N, 4).
        deltas: (N, K, 4): dx, dy, dw, dh.
        weights: what each of the four was multiplied with.

    Returns:
        (N, K, 4).
    """
    sizes = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2])[:, None]
    centres = boxes_xyxy[:, None, :2] + 0.5 * sizes
    dx, dy, dw, dh = (deltas[..., index] / weight for index, weight in enumerate(weights))
    moved = torch.stack([dx, dy], dim=2) * sizes + centres
    grown = torch.exp(torch.stack([dw, dh], dim=2).clamp(max=MAX_LOG_GROWTH)) * sizes
    return torch.cat([moved - 0.5 * grown, moved + 0.5 * grown], dim=2)


def pooled_levels(boxes_xyxy: Tensor) -> Tensor:
    """Return the level that each box is pooled from, 0 for p2. Source: specs/vlplm.md 4."""
    sides = torch.sqrt((boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1]))
    levels = torch.floor(CANONICAL_LEVEL + torch.log2(sides / CANONICAL_SIDE + 1e-8))
    # A box without an area, or with sides of opposite sign, has no level of its own.
    return levels.nan_to_num(2, neginf=2).clamp(2, POOLED_LEVELS + 1).long() - 2


def level_anchors(height: int, width: int, stride: int, size: float) -> Tensor:
    """Return the (height x width x 3, 4) anchors of a level, row by row. Source: specs/vlplm.md 4."""
    cells = []
    for ratio in ANCHOR_RATIOS:
        anchor_width = math.sqrt(size**2 / ratio)
        anchor_height = ratio * anchor_width
        cells.append([-anchor_width / 2, -anchor_height / 2, anchor_width / 2, anchor_height / 2])
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32) * stride, torch.arange(width, dtype=torch.float32) * stride,
        indexing="ij",
    )  # fmt: skip
    shifts = torch.stack([x, y, x, y], dim=2).reshape(-1, 1, 4)
    return (shifts + torch.tensor(cells, dtype=torch.float32)).reshape(-1, 4)


# The network, under Detectron2's names


class FrozenNorm(nn.Module):
    """A batch normalisation whose numbers never change; without statistics it only scales and shifts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        mean, var, weight, bias = (self.get_buffer(n) for n in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)


class NormedConv(nn.Conv2d):
    """A convolution without bias, and its normalisation."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = FrozenNorm(outside)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise (N, C, H, W)."""
        found: Tensor = self.norm(super().forward(x))
        return found


class Bottleneck(nn.Module):
    """A residual block; the stride is in its first convolution. Source: specs/vlplm.md 4."""

    def __init__(self, inside: int, narrow: int, outside: int, stride: int, has_shortcut: bool) -> None:
        super().__init__()
        self.shortcut = NormedConv(inside, outside, 1, stride) if has_shortcut else None
        self.conv1 = NormedConv(inside, narrow, 1, stride)
        self.conv2 = NormedConv(narrow, narrow, 3)
        self.conv3 = NormedConv(narrow, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of (N, C, H, W)."""
        found = self.conv3(functional.relu(self.conv2(functional.relu(self.conv1(x)))))
        return functional.relu(found + (x if self.shortcut is None else self.shortcut(x)))


def _sizes(state: Mapping[str, Tensor], key: str) -> torch.Size:
    try:
        return state[key].shape
    except KeyError as error:
        raise ConfigError(f"lacks {key}") from error


class BottomUp(nn.Module):
    """The residual network."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        prefix = "backbone.bottom_up."
        stem, colours, kernel, _ = _sizes(state, f"{prefix}stem.conv1.weight")
        self.stem = nn.Module()
        self.stem.conv1 = NormedConv(colours, stem, kernel, 2)
        inside = stem
        for stage in (2, 3, 4, 5):
            blocks: list[Bottleneck] = []
            while f"{prefix}res{stage}.{len(blocks)}.conv1.weight" in state:
                block = f"{prefix}res{stage}.{len(blocks)}."
                narrow = _sizes(state, f"{block}conv1.weight")[0]
                outside = _sizes(state, f"{block}conv3.weight")[0]
                stride = 2 if stage > 2 and not blocks else 1
                blocks.append(Bottleneck(inside, narrow, outside, stride, f"{block}shortcut.weight" in state))
                inside = outside
            if not blocks:
                raise ConfigError(f"lacks {prefix}res{stage}.0.conv1.weight")
            setattr(self, f"res{stage}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of strides 4 to 32."""
        x = functional.max_pool2d(functional.relu(self.stem.get_submodule("conv1")(x)), 3, 2, 1)
        found = []
        for stage in (2, 3, 4, 5):
            x = self.get_submodule(f"res{stage}")(x)
            found.append(x)
        return found


class Backbone(nn.Module):
    """The residual network and the feature pyramid on it."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.bottom_up = BottomUp(state)
        for stage in (2, 3, 4, 5):
            channels, inside, _, _ = _sizes(state, f"backbone.fpn_lateral{stage}.weight")
            setattr(self, f"fpn_lateral{stage}", nn.Conv2d(inside, channels, 1))
            setattr(self, f"fpn_output{stage}", nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return p2 to p6 of (1, 3, H, W), whose sides are multiples of 32."""
        maps = self.bottom_up(x)
        top: Tensor | None = None
        found: list[Tensor] = []
        for stage in (5, 4, 3, 2):
            lateral = self.get_submodule(f"fpn_lateral{stage}")(maps[stage - 2])
            top = lateral if top is None else lateral + functional.interpolate(top, scale_factor=2.0, mode="nearest")
            found.insert(0, self.get_submodule(f"fpn_output{stage}")(top))
        return [*found, functional.max_pool2d(found[-1], 1, 2, 0)]


class ProposalNetwork(nn.Module):
    """Backbone, RPN and box head. Sizes are those of the state dict; its numbers are not loaded here."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.backbone = Backbone(state)
        channels = _sizes(state, "backbone.fpn_output2.weight")[0]
        head = nn.Module()
        head.conv = nn.Conv2d(channels, channels, 3, padding=1)
        head.objectness_logits = nn.Conv2d(channels, len(ANCHOR_RATIOS), 1)
        head.anchor_deltas = nn.Conv2d(channels, 4 * len(ANCHOR_RATIOS), 1)
        self.proposal_generator = nn.Module()
        self.proposal_generator.rpn_head = head
        self.roi_heads = nn.Module()
        box_head, predictor = nn.Module(), nn.Module()
        hidden = _sizes(state, "roi_heads.box_head.fc1.weight")[0]
        box_head.fc1 = nn.Linear(channels * POOLED_SIDE**2, hidden)
        box_head.fc2 = nn.Linear(hidden, _sizes(state, "roi_heads.box_head.fc2.weight")[0])
        last = box_head.fc2.out_features
        predictor.cls_score = nn.Linear(last, _sizes(state, "roi_heads.box_predictor.cls_score.weight")[0])
        predictor.bbox_pred = nn.Linear(last, _sizes(state, "roi_heads.box_predictor.bbox_pred.weight")[0])
        self.roi_heads.box_head, self.roi_heads.box_predictor = box_head, predictor

    def rpn(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return (logits (A,), deltas (A, 4)) of each level's anchors."""
        head = self.proposal_generator.get_submodule("rpn_head")
        found = []
        for level in maps:
            hidden = functional.relu(head.get_submodule("conv")(level))
            logits = head.get_submodule("objectness_logits")(hidden)[0]
            deltas = head.get_submodule("anchor_deltas")(hidden)[0]
            anchors, height, width = logits.shape
            deltas = deltas.view(anchors, 4, height, width).permute(2, 3, 0, 1)
            found.append((logits.permute(1, 2, 0).flatten().float(), deltas.reshape(-1, 4).float()))
        return found

    def refine(self, maps: Sequence[Tensor], boxes_xyxy: Tensor, passes: int) -> Tensor:
        """Move boxes by the box head, again and again, without clipping. Source: specs/vlplm.md 1.1 step E.

        Args:
            maps: p2 to p6.
            boxes_xyxy: (N, 4), frame of the network's input.
            passes: how often.
        """
        head = self.roi_heads.get_submodule("box_head")
        bbox_pred = self.roi_heads.get_submodule("box_predictor.bbox_pred")
        for _ in range(passes):
            pooled = pool_regions(maps, boxes_xyxy).flatten(1)
            hidden = functional.relu(head.get_submodule("fc1")(pooled))
            hidden = functional.relu(head.get_submodule("fc2")(hidden))
            deltas = bbox_pred(hidden).float()
            # With several classes, a box would go to the mean of where they send it.
            boxes_xyxy = apply_deltas(boxes_xyxy, deltas.view(len(deltas), -1, 4), BOX_WEIGHTS).mean(dim=1)
        return boxes_xyxy


def pool_regions(maps: Sequence[Tensor], boxes_xyxy: Tensor) -> Tensor:
    """Return (N, C, 7, 7) features of boxes, each from the level of its size. Source: specs/vlplm.md 4."""
    levels = pooled_levels(boxes_xyxy)
    pooled = torch.zeros(
        (len(boxes_xyxy), maps[0].shape[1], POOLED_SIDE, POOLED_SIDE), dtype=torch.float32, device=boxes_xyxy.device
    )
    rois = functional.pad(boxes_xyxy, (1, 0))
    for index in range(POOLED_LEVELS):
        at = torch.nonzero(levels == index)[:, 0]
        # The operator itself: under deterministic algorithms the function around it takes another way on a GPU, ten
        # times slower, because of the backward pass. Forwards it is deterministic. Sampling 0 is as fine as needed.
        pooled[at] = torch.ops.torchvision.roi_align(
            maps[index].float(), rois[at], 1 / STRIDES[index], POOLED_SIDE, POOLED_SIDE, 0, True
        )
    return pooled


def choose_proposals(
    scored: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[tuple[int, int]], height: int, width: int, *,
    per_level: int, nms_iou: float, most: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the best boxes and their logits, the surest first. Source: specs/vlplm.md 1.1 step D.

    Args:
        scored: (logits, deltas) of each level's anchors.
        sizes: (height, width) of each level's map.
        height: of the picture without padding, to which boxes are clipped.
        width: the same.
        per_level: anchors of a level that are looked at.
        nms_iou: IoU above which the worse of two boxes of a level is left out.
        most: boxes in all.
    """
    boxes, logits, levels = [], [], []
    for level, ((level_logits, deltas), (rows, columns)) in enumerate(zip(scored, sizes, strict=True)):
        anchors = level_anchors(rows, columns, STRIDES[level], ANCHOR_SIZES[level]).to(deltas.device)
        best, at = level_logits.topk(min(per_level, len(level_logits)))
        boxes.append(apply_deltas(anchors[at], deltas[at][:, None], RPN_WEIGHTS)[:, 0])
        logits.append(best)
        levels.append(torch.full((len(at),), level, device=deltas.device))
    all_boxes, all_logits, all_levels = torch.cat(boxes), torch.cat(logits), torch.cat(levels)
    usable = torch.isfinite(all_boxes).all(dim=1) & torch.isfinite(all_logits)
    limits = torch.tensor([width, height, width, height], dtype=torch.float32, device=all_boxes.device)
    all_boxes = torch.minimum(all_boxes.clamp(min=0), limits)
    usable &= (all_boxes[:, 2:] > all_boxes[:, :2]).all(dim=1)
    all_boxes, all_logits, all_levels = all_boxes[usable], all_logits[usable], all_levels[usable]
    keep = batched_nms(all_boxes, all_logits, all_levels, nms_iou)[:most]
    return all_boxes[keep], all_logits[keep]


# From a checkpoint to proposals


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a Detectron2 checkpoint: those under `model`, or of a bare state dict.

    Raises:
        ConfigError: missing or unreadable.
    """
    if not path.is_file():
        raise ConfigError(f"proposal checkpoint {path}: no such file; put it there or correct the run file")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("model", loaded)
        tensors = {str(key).removeprefix("module."): value for key, value in state.items()}
    except _UNREADABLE as error:
        raise ConfigError(
            f"proposal checkpoint {path}: not a file of torch.save with tensors; copy it again: {one_line(error)}"
        ) from error
    return {
        key: value
        for key, value in tensors.items()
        if isinstance(value, Tensor) and not key.startswith(IGNORED_PREFIXES)
    }


def load_network(path: Path) -> ProposalNetwork:
    """Load a Detectron2 checkpoint of an R-CNN with FPN and bottleneck blocks, e.g. mask_rcnn_R_50_FPN.

    Raises:
        ConfigError: missing, unreadable, or of another architecture.
    """
    state = read_checkpoint(path)
    try:
        network = ProposalNetwork(state)
        found = network.load_state_dict(state, strict=False)
    except (ConfigError, RuntimeError, ValueError) as error:
        raise ConfigError(f"proposal checkpoint {path}: no R-CNN with FPN of Detectron2: {one_line(error)}") from error
    # Old files may lack the statistics of a frozen normalisation; then they are 0 and 1.
    missing = [key for key in found.missing_keys if not key.endswith((".running_mean", ".running_var"))]
    if missing or found.unexpected_keys:
        what = f"lacks {missing[0]}" if missing else f"also has {found.unexpected_keys[0]}"
        raise ConfigError(f"proposal checkpoint {path}: no R-CNN with FPN of Detectron2: it {what}")
    return network


def prepare_image(image_rgb: NDArray[np.uint8], short_side_px: int, long_side_px: int) -> tuple[Tensor, int, int]:
    """Resize, normalise and pad a picture. Source: specs/vlplm.md 1.1 steps B and C.

    Args:
        image_rgb: (H, W, 3).
        short_side_px: of the resized picture, unless the longer one would be too long.
        long_side_px: at most this.

    Returns:
        (3, H', W') float32 in BGR, padded to multiples of 32; height and width without the padding.
    """
    height, width = resized_size(image_rgb.shape[0], image_rgb.shape[1], short_side_px, long_side_px)
    # Pillow on whole numbers, whose rounding and antialiasing the network was trained with.
    resized = Image.fromarray(image_rgb).resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)[..., ::-1].astype(np.float32))
    pixels = (pixels - torch.tensor(PIXEL_MEAN_BGR)).permute(2, 0, 1)
    return functional.pad(pixels, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR)), height, width


class Proposer:
    """Finds boxes of objects, whatever they are."""

    def __init__(self, config: ProposalsConfig) -> None:
        self._config = config
        self._device = prepare_torch(config)
        self._tf32 = config.precision == "tf32"
        self._autocast = _AUTOCAST.get(config.precision)
        try:
            self._network = load_network(config.checkpoint).to(self._device).eval()
        except torch.AcceleratorError as error:
            raise DeviceLostError(f"{config.checkpoint}: the device failed: {one_line(error)}") from error

    def propose(self, image_rgb: NDArray[np.uint8]) -> Proposals:
        """Return the refined proposals of a (H, W, 3) picture; none is no error.

        Raises:
            DeviceMemoryError: the device is out of memory.
            DeviceLostError: the device failed for the rest of this process.
        """
        use_tf32(self._tf32)
        try:
            return self._propose(image_rgb)
        except torch.OutOfMemoryError as error:
            full = one_line(error)
        except torch.AcceleratorError as error:
            raise DeviceLostError(f"the device failed while proposals were made: {one_line(error)}") from error
        # Raised out here, since the frames of the cause would keep the picture in memory.
        torch.cuda.empty_cache()
        raise DeviceMemoryError(full)

    @torch.inference_mode()
    def _propose(self, image_rgb: NDArray[np.uint8]) -> Proposals:
        config = self._config
        pixels, height, width = prepare_image(image_rgb, config.short_side_px, config.long_side_px)
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            maps = self._network.backbone(pixels[None].to(self._device))
            scored = self._network.rpn(maps)
        boxes, logits = choose_proposals(
            scored, [(level.shape[2], level.shape[3]) for level in maps], height, width,
            per_level=config.per_level, nms_iou=config.nms_iou, most=config.refined,
        )  # fmt: skip
        if config.keep_before_refining:
            boxes, logits = boxes[: config.kept], logits[: config.kept]
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            boxes = self._network.refine(maps, boxes, config.passes)
        # The original maps both axes back with the ratio of the heights. Source: specs/vlplm.md 1.1 step B.
        boxes = boxes[: config.kept] * (image_rgb.shape[0] / height)
        return Proposals(boxes.float().cpu().numpy(), torch.sigmoid(logits[: config.kept]).cpu().numpy())
