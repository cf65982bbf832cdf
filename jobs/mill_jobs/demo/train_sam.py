"""Train the demo's tiny SAM on the toy scenes: `python -m mill_jobs.demo.train_sam --steps N OUT.pth`.

The network is segment-anything's own, only smaller; sam.json beside the checkpoint names its sizes. Of its outputs only
mask index 2 is trained, since the pipeline uses no other (Source: specs/cotpl.md 1.3).
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.amg import build_point_grid, calculate_stability_score
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou, masks_to_boxes, nms

from mill_jobs.demo.scenes import FRAME, HELD_OUT_SEEDS, TRAIN_SEED, Scene, make_scene

_LOG = structlog.get_logger()
_BATCH = 4
_POINTS = 16
_PEAK_RATE = 2e-3
_WARM_SHARE = 0.05
_FALL_SHARE = 0.5
_RAMP_STEPS = 20
_SAVE_EVERY = 400


@dataclass(frozen=True)
class Architecture:
    """Sizes of a SAM, as sam.json spells them; what is not named here is as in the official checkpoints."""

    image_size: int = 160
    patch_size: int = 8
    encoder_dim: int = 96
    encoder_depth: int = 4
    encoder_heads: int = 4
    encoder_global_attention: tuple[int, ...] = (1, 3)
    window_size: int = 10
    prompt_dim: int = 128
    mask_in_channels: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 4
    decoder_mlp_dim: int = 256
    iou_head_depth: int = 3
    iou_head_dim: int = 128


def build_sam(sizes: Architecture) -> Sam:
    """Return an untrained SAM of these sizes."""
    side = sizes.image_size // sizes.patch_size
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            embed_dim=sizes.encoder_dim,
            depth=sizes.encoder_depth,
            num_heads=sizes.encoder_heads,
            out_chans=sizes.prompt_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=sizes.window_size,
            global_attn_indexes=sizes.encoder_global_attention,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=sizes.prompt_dim,
            image_embedding_size=(side, side),
            input_image_size=(sizes.image_size, sizes.image_size),
            mask_in_chans=sizes.mask_in_channels,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=sizes.prompt_dim,
            transformer=TwoWayTransformer(
                depth=sizes.decoder_depth,
                embedding_dim=sizes.prompt_dim,
                num_heads=sizes.decoder_heads,
                mlp_dim=sizes.decoder_mlp_dim,
            ),
            num_multimask_outputs=3,
            iou_head_depth=sizes.iou_head_depth,
            iou_head_hidden_dim=sizes.iou_head_dim,
        ),
    )
    return sam


@torch.no_grad()
def prepare(sam: Sam) -> None:
    """Start where the task is nearly solved: colour is what tells these objects apart.

    The patch embedding begins with the mean colours of 4 x 4 cells of each patch, the neck passes them on, and the
    decoder's queries and keys are tied, so that a token looks at places whose position code is like its own.
    """
    patches = sam.image_encoder.patch_embed.proj.weight
    cell = patches.shape[-1] // 4
    patches.mul_(0.3)
    for number, (y, x, colour) in enumerate(np.ndindex(4, 4, 3)):
        patches[number] = 0
        patches[number, colour, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell] = 1 / cell**2
    narrow, spread = sam.image_encoder.neck[0].weight, sam.image_encoder.neck[2].weight
    narrow.mul_(0.3)
    spread.mul_(0.3)
    for channel in range(min(narrow.shape[:2])):
        narrow[channel, channel] = 1
    for channel in range(len(spread)):
        spread[channel, channel, 1, 1] += 1
    for module in sam.mask_decoder.transformer.modules():
        if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
            module.k_proj.weight.copy_(module.q_proj.weight)


@dataclass(frozen=True)
class Batch:
    """Pictures with points and what lies under each point."""

    pictures: Tensor
    """(B, 3, S, S) float32, normalised."""
    points: Tensor
    """(B, P, 2) float32: x, y in the model's frame."""
    targets: Tensor
    """(B, P, S / 2, S / 2) float32: 1 on the whole object or band under the point."""


def entity_map(scene: Scene) -> NDArray[np.uint8]:
    """Return a (FRAME, FRAME) map that numbers every object and band of a scene."""
    result = np.zeros((FRAME, FRAME), np.uint8)
    for number, mask in enumerate([band.mask for band in scene.bands] + [thing.mask for thing in scene.objects]):
        result[mask] = number
    return result


def make_batch(sam: Sam, first_index: int, rng: np.random.Generator) -> Batch:
    """Draw the training scenes from `first_index` on; half of the points lie on objects, the others anywhere."""
    size = sam.image_encoder.img_size
    resize = ResizeLongestSide(size)
    pictures, points, targets = [], [], []
    for index in range(first_index, first_index + _BATCH):
        scene = make_scene(TRAIN_SEED, index)
        pictures.append(sam.preprocess(torch.from_numpy(resize.apply_image(scene.image_rgb)).permute(2, 0, 1)))
        entities = entity_map(scene)
        places = rng.integers(0, FRAME, (_POINTS, 2))
        on_objects = np.argwhere(entities >= len(scene.bands))[:, ::-1]
        places[: _POINTS // 2] = rng.choice(on_objects, _POINTS // 2)
        small = cv2.resize(entities, (size // 2, size // 2), interpolation=cv2.INTER_NEAREST)
        under = entities[places[:, 1], places[:, 0]]
        targets.append(torch.from_numpy(small[None] == under[:, None, None]).float())
        points.append(torch.from_numpy(places * (size / FRAME)).float())
    return Batch(torch.stack(pictures), torch.stack(points), torch.stack(targets))


def decode(sam: Sam, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return mask index 2, (P, S / 2, S / 2) logits, and its predicted IoU, (P,), for (P, 2) points on one picture."""
    labels = torch.ones(len(points), 1)
    sparse, dense = sam.prompt_encoder(points=(points[:, None], labels), boxes=None, masks=None)
    masks, ious = sam.mask_decoder(
        image_embeddings=embedding[None],
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )
    return masks[:, 2], ious[:, 2]


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy plus dice of (N, H, W) masks."""
    probability = logits.sigmoid()
    overlap = (probability * targets).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2)) + targets.sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, targets) + dice.mean()


def similarity_loss(sam: Sam, head: nn.Module, embeddings: Tensor, batch: Batch) -> Tensor:
    """Compare the feature under each point with every pixel: teaches encoder and upscaling before the decoder."""
    where = (2 * batch.points / sam.image_encoder.img_size - 1)[:, :, None]
    features = F.grid_sample(embeddings, where, align_corners=False)[..., 0].transpose(1, 2)
    logits = torch.einsum("bpc,bchw->bphw", head(features), sam.mask_decoder.output_upscaling(embeddings))
    return mask_loss(logits.flatten(0, 1), batch.targets.flatten(0, 1))


def decoder_loss(sam: Sam, embeddings: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """Return the loss of mask index 2 and of its predicted IoU, and the mean true IoU."""
    outputs = [decode(sam, embedding, points) for embedding, points in zip(embeddings, batch.points, strict=True)]
    logits = torch.cat([logits for logits, _ in outputs])
    predicted = torch.cat([ious for _, ious in outputs])
    targets = batch.targets.flatten(0, 1)
    with torch.no_grad():
        found = logits > 0
        true = targets > 0
        ious = (found & true).sum((1, 2)) / (found | true).sum((1, 2)).clamp(min=1)
    return mask_loss(logits, targets) + F.mse_loss(predicted, ious), float(ious.mean())


@dataclass(frozen=True)
class Thresholds:
    """What the demo asks of a mask. The names are those of specs/cotpl.md 1.3 and 1.4; the values may be the demo's."""

    points_per_side: int = 12
    predicted_iou: float = 0.7
    stability: float = 0.85
    score: float = 0.7


@torch.no_grad()
def find_regions(sam: Sam, image_rgb: NDArray[np.uint8], thresholds: Thresholds) -> Tensor:
    """Return the (N, H, W) bool masks that survive filters, box NMS, mask suppression and the size filter."""
    picture = torch.from_numpy(ResizeLongestSide(sam.image_encoder.img_size).apply_image(image_rgb)).permute(2, 0, 1)
    embedding = sam.image_encoder(sam.preprocess(picture)[None])[0]
    points = torch.from_numpy(build_point_grid(thresholds.points_per_side)).float() * sam.image_encoder.img_size
    outputs = [decode(sam, embedding, chunk) for chunk in points.split(64)]
    low, ious = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    keep = ious > thresholds.predicted_iou
    size = (sam.image_encoder.img_size, sam.image_encoder.img_size)
    logits, ious = sam.postprocess_masks(low[keep][:, None], size, image_rgb.shape[:2])[:, 0], ious[keep]
    stabilities = calculate_stability_score(logits, 0.0, 1.0)
    keep = (stabilities >= thresholds.stability) & (logits > 0).any(2).any(1)
    masks: Tensor = logits[keep] > 0
    ious, stabilities = ious[keep], stabilities[keep]
    if not len(masks):
        return masks
    keep = nms(masks_to_boxes(masks), ious, 0.7)
    masks, scores = masks[keep], ious[keep] * stabilities[keep]
    order = scores.argsort(descending=True)
    masks, scores = masks[order], scores[order]
    flat = masks.flatten(1).float()
    shared, areas = flat @ flat.T, flat.sum(1)
    overlap = shared / (areas[:, None] + areas[None] - shared)
    duplicate = (overlap.triu(1) > 0.8).any(0)
    inside = shared / areas[None]  # [big, part]
    inner = ((inside >= 0.85) & (shared / areas[:, None] < 0.5)).any(0)
    boxes = masks_to_boxes(masks)
    large = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) >= 10_000
    kept: Tensor = masks[~duplicate & ~inner & (scores > thresholds.score) & large]
    return kept


def measure(sam: Sam, seed: int, count: int, thresholds: Thresholds) -> dict[str, float]:
    """Return how well the regions of `count` scenes fit: see the keys."""
    things = found = found_well = bands = bands_found = regions = spurious = good_objects = 0
    for index in range(count):
        scene = make_scene(seed, index)
        masks = find_regions(sam, scene.image_rgb, thresholds)
        regions += len(masks)
        entities = [thing.mask for thing in scene.objects] + [band.mask for band in scene.bands]
        truth = torch.from_numpy(np.stack(entities)).flatten(1).float()
        split = len(scene.objects)
        things += split
        bands += len(scene.bands)
        if not len(masks):
            continue
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        box_overlap = box_iou(torch.tensor([thing.bbox_xyxy for thing in scene.objects]).float(), boxes)
        flat = masks.flatten(1).float()
        shared = truth @ flat.T
        overlap = shared / (truth.sum(1)[:, None] + flat.sum(1)[None] - shared)
        found += int((box_overlap.max(1).values >= 0.5).sum())
        found_well += int((overlap[:split].max(1).values >= 0.8).sum())
        bands_found += int((overlap[split:].max(1).values >= 0.7).sum())
        good_objects += int((overlap[:split].max(0).values >= 0.75).sum())
        # Not a whole object, and not mostly background: these are what the chat model must refuse.
        on_objects = shared[:split].sum(0) / flat.sum(1)
        spurious += int(((overlap[:split].max(0).values < 0.75) & (on_objects > 0.1)).sum())
    return {
        "recall_box50": found / things,
        "recall_mask80": found_well / things,
        "bands_found": bands_found / bands,
        "regions": regions / count,
        "good": good_objects / count,
        "spurious": spurious / count,
    }


def save(sam: Sam, path: Path) -> None:
    """Write the state dict in float16, whole or not at all."""
    partial_path = path.with_suffix(".partial")
    torch.save({name: value.half() for name, value in sam.state_dict().items()}, partial_path)
    partial_path.replace(path)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are made orthogonal: far fewer steps than Adam needs for small transformers.

    torch.optim.Muon computes in bfloat16, which most CPUs only emulate; this one stays in float32.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                moment = self.state[matrix].setdefault("moment", torch.zeros_like(matrix))
                moment.lerp_(matrix.grad, 1 - group["momentum"])
                update = _orthogonal(matrix.grad.lerp(moment, group["momentum"]))
                # Scaled to the size of an AdamW update, so that both share one rate.
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with singular values around 1, by five Newton-Schulz steps."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


def make_optimizers(modules: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of linear layers and AdamW for the rest."""
    layers = [module for module in modules.modules() if isinstance(module, nn.Linear)]
    matrices = [weight for layer in layers for name, weight in layer.named_parameters() if name == "weight"]
    known = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in modules.parameters() if id(parameter) not in known]
    return [Muon(matrices, _PEAK_RATE), torch.optim.AdamW(others, lr=_PEAK_RATE, weight_decay=0.01)]


def train(out: Path, steps: int | None, minutes: float, seed: int) -> None:
    """Train for `steps` batches, or, where they are None, for some minutes; write checkpoint and sizes now and then.

    Only a number of steps gives the same weights again.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sizes = Architecture()
    sam = build_sam(sizes)
    prepare(sam)
    out.with_suffix(".json").write_text(json.dumps(asdict(sizes), indent=2) + "\n", encoding="utf-8")
    width = sizes.prompt_dim
    head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width // 8))
    optimizers = make_optimizers(nn.ModuleList([sam, head]))
    started = time.monotonic()
    losses: list[float] = []
    ious: list[float] = []
    step = phase_start = 0
    progress = 0.0
    in_warm_up = True
    while progress < 1:
        if in_warm_up and progress >= _WARM_SHARE:
            in_warm_up, phase_start = False, step
        ramp = min(1.0, (step - phase_start + 1) / _RAMP_STEPS)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _PEAK_RATE * ramp * min(1.0, (1 - progress) / _FALL_SHARE)
        batch = make_batch(sam, step * _BATCH, rng)
        embeddings = sam.image_encoder(batch.pictures)
        if in_warm_up:
            loss = similarity_loss(sam, head, embeddings, batch)
        else:
            loss, iou = decoder_loss(sam, embeddings, batch)
            ious.append(iou)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        elapsed = (time.monotonic() - started) / 60
        progress = elapsed / minutes if steps is None else step / steps
        if step % 50 == 0:
            loss_now, iou_now = float(np.mean(losses[-50:])), float(np.mean(ious[-50:] or [0]))
            _LOG.info("step", step=step, minutes=round(elapsed, 1), loss=round(loss_now, 4), iou=round(iou_now, 4))
        if step % _SAVE_EVERY == 0 or progress >= 1:
            save(sam, out)
            if not in_warm_up:
                sam.eval()
                result = measure(sam, HELD_OUT_SEEDS[0], 12, Thresholds())
                _LOG.info("held out", step=step, **{name: round(value, 3) for name, value in result.items()})
                sam.train()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    train(arguments.out, arguments.steps, arguments.minutes, arguments.seed)


if __name__ == "__main__":
    main()
