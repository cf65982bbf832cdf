"""Train the demo's tiny SAM on the toy scenes: `python -m mill_jobs.demo.train_sam --steps N OUT.pth`.

The network is segment-anything's own, only smaller; sam.json beside the checkpoint names its sizes. Of its outputs only
mask index 2 is trained, since the pipeline uses no other (Source: specs/cotpl.md 1.3).

A number of steps and a seed give the same weights again on the same machine. The shipped checkpoint is not such a run:
1600 steps of a schedule of about 3200, then 400 steps of `--steps 2600 --resume-step 1600`, where training was stopped;
its learning rate never fell to zero and its logits are not calibrated. `--steps 2600` from nothing is its like.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec
import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.nn import functional as F

from mill_jobs.demo.scenes import FRAME, HELD_OUT_SEEDS, TRAIN_SEED, Scene, make_scene
from mill_jobs.recipes.cotpl.masks import suppress_masks
from mill_shared.geometry import box_iou, mask_boxes
from mill_shared.models.config import MaskGeneratorSettings, SamConfig
from mill_shared.models.protocols import MaskGenerator
from mill_shared.models.sam import WHOLE_OBJECT, SamMaskGenerator, Sizes, build_sam

SIZES = Sizes(
    image_size=160,
    patch_size=8,
    encoder_dim=96,
    encoder_depth=4,
    encoder_heads=4,
    encoder_global_attention=(1, 3),
    window_size=10,
    prompt_dim=128,
    mask_in_channels=16,
    decoder_depth=2,
    decoder_heads=4,
    decoder_mlp_dim=256,
    iou_head_depth=3,
    iou_head_dim=128,
)
"""1.3 million weights. A narrower prompt_dim leaves too few channels to tell colours apart in the mask."""
SETTINGS = MaskGeneratorSettings(points_per_side=12, crop_layers=0)
"""The demo's mask generator; its thresholds are those of the method."""

_LOG = structlog.get_logger()
_BATCH = 4
_POINTS = 16
_PEAK_RATE = 2e-3
_WARM_SHARE = 0.15
_FALL_SHARE = 0.5
_RAMP_STEPS = 20
_SAVE_EVERY = 400


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
    return masks[:, WHOLE_OBJECT], ious[:, WHOLE_OBJECT]


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


def find_regions(generator: MaskGenerator, image_rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the (N, H, W) masks of a picture that the pipeline would ask about."""
    found = generator.generate(image_rgb, 0)
    kept = found.masks[list(suppress_masks(found.masks, found.predicted_ious, found.stabilities).kept)]
    boxes = mask_boxes(kept)
    # Source: specs/cotpl.md 1.5.
    return kept[(boxes[:, 2] - boxes[:, 0] - 1) * (boxes[:, 3] - boxes[:, 1] - 1) >= 10_000]


def measure(checkpoint: Path, seed: int, count: int, settings: MaskGeneratorSettings = SETTINGS) -> dict[str, float]:
    """Return how the regions of `count` scenes fit the truth.

    recall_box50, recall_mask80: share of objects with a region of that box or mask IoU; bands_found: share of bands
    with one of mask IoU 0.7; regions: a picture; good: those that show one whole object (mask IoU 0.75);
    spurious: those that are no whole object and yet more than a tenth on objects, which the chat model must refuse.
    """
    generator = SamMaskGenerator(
        SamConfig(checkpoint=checkpoint, architecture="custom", device="cpu", threads=1), settings
    )
    things = bands = regions = found_box = found_mask = bands_found = good = spurious = 0
    for index in range(count):
        scene = make_scene(seed, index)
        masks = find_regions(generator, scene.image_rgb)
        split = len(scene.objects)
        things, bands, regions = things + split, bands + len(scene.bands), regions + len(masks)
        if not len(masks):
            continue
        true_boxes = np.array([thing.bbox_xyxy for thing in scene.objects], np.float64)
        found_box += int((box_iou(true_boxes, mask_boxes(masks)).max(axis=1) >= 0.5).sum())
        truth = np.stack([thing.mask for thing in scene.objects] + [band.mask for band in scene.bands])
        flat, flat_truth = masks.reshape(len(masks), -1).astype(np.float32), truth.reshape(len(truth), -1)
        shared = flat_truth.astype(np.float32) @ flat.T
        overlap = shared / (flat_truth.sum(axis=1)[:, None] + flat.sum(axis=1)[None] - shared)
        found_mask += int((overlap[:split].max(axis=1) >= 0.8).sum())
        bands_found += int((overlap[split:].max(axis=1) >= 0.7).sum())
        is_good = overlap[:split].max(axis=0) >= 0.75
        good += int(is_good.sum())
        spurious += int((~is_good & (shared[:split].sum(axis=0) > 0.1 * flat.sum(axis=1))).sum())
    return {
        "recall_box50": found_box / things,
        "recall_mask80": found_mask / things,
        "bands_found": bands_found / bands,
        "regions": regions / count,
        "good": good / count,
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


def train(out: Path, steps: int, seed: int, resume_step: int) -> None:
    """Train for `steps` batches; write checkpoint and sizes now and then.

    With a `resume_step` the weights in `out` are taken up as those of that step; the optimizers start afresh.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, resume_step])
    sam = build_sam(SIZES)
    prepare(sam)
    if resume_step:
        sam.load_state_dict(torch.load(out, weights_only=True), strict=True)
    out.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(SIZES)) + b"\n")
    width = SIZES.prompt_dim
    head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width // 8))
    optimizers = make_optimizers(nn.ModuleList([sam, head]))
    started = time.monotonic()
    losses: list[float] = []
    ious: list[float] = []
    warm_steps = int(_WARM_SHARE * steps)
    phase_start = resume_step
    for step in range(resume_step, steps):
        in_warm_up = step < warm_steps
        if step == warm_steps:
            phase_start = step
        ramp = min(1.0, (step - phase_start + 1) / _RAMP_STEPS, (1 - step / steps) / _FALL_SHARE)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _PEAK_RATE * ramp
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
        if (step + 1) % 50 == 0:
            elapsed = round((time.monotonic() - started) / 60, 1)
            loss_now, iou_now = float(np.mean(losses[-50:])), float(np.mean(ious[-50:] or [0]))
            _LOG.info("step", step=step + 1, minutes=elapsed, loss=round(loss_now, 4), iou=round(iou_now, 4))
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            save(sam, out)
            if not in_warm_up:
                result = measure(out, HELD_OUT_SEEDS[0], 12)
                _LOG.info("held out", step=step + 1, **{name: round(value, 3) for name, value in result.items()})


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume-step", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    train(arguments.out, arguments.steps, arguments.seed, arguments.resume_step)


if __name__ == "__main__":
    main()
