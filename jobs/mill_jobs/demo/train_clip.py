"""Train the demo's tiny CLIP: `python -m mill_jobs.demo.train_clip`. About a quarter of an hour on one core.

The folder is in the official Hugging Face format with a small tokenizer of its own. As the real one does, it learns
pictures with texts: crops of shapes from TRAIN_SEED, each with one of the 63 prompts that the recipe asks with. It
knows every shape's name, as the real one knows the novel classes, and `background` for whatever shows no whole shape.

A number of steps and a seed give the same weights again on the same machine.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import structlog
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from mill_jobs.demo.scenes import (
    BASE_CLASSES,
    EXTRA_CLASSES,
    FRAME,
    HELD_OUT_SEEDS,
    NOVEL_CLASSES,
    TRAIN_SEED,
    Scene,
    make_scene,
)
from mill_jobs.demo.train_sam import make_optimizers
from mill_jobs.recipes.vlplm.crops import crop, mean_feature, scale_boxes
from mill_jobs.trainer.templates import ensemble_prompts
from mill_shared.geometry import box_iou
from mill_shared.models.clip import MEAN_RGB, STD_RGB, Clip, prepare_crop
from mill_shared.models.config import ClipConfig

NAMES = (*BASE_CLASSES, *NOVEL_CLASSES, *EXTRA_CLASSES, "background")
BACKGROUND = len(NAMES) - 1
SIDE_PX, PATCH_PX = 64, 8
PROJECTED = 64
SCALES = (1.0, 1.5)
"""Source: specs/vlplm.md 1.1 step H."""

_LOG = structlog.get_logger()
_START, _END = "<|startoftext|>", "<|endoftext|>"
_VOCABULARY = 900
_WHOLE_IOU, _PART_IOU = 0.75, 0.4
"""Boxes above the first show a shape, below the second they show none; those between are not learnt from."""
_BATCH = 64
_FIRST_SCALE, _LAST_SCALE = 10.0, 100.0
"""Of the cosines: in the end that of the method. Source: specs/vlplm.md 1.1 step K."""
_PEAK_RATE = 2e-3
_RAMP_STEPS = 50
_SAVE_EVERY = 400

Image = NDArray[np.uint8]


def make_tokenizer() -> tuple[dict[str, int], list[str]]:
    """Return ids and merges of byte pairs, trained on the prompts, laid out as OpenAI's."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer: Any = trainers.BpeTrainer
    trained = trainer(
        vocab_size=_VOCABULARY, min_frequency=1, show_progress=False, end_of_word_suffix="</w>",
        continuing_subword_prefix="", initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((text.lower() for name in NAMES for text in ensemble_prompts(name)), trained)
    merges = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges)]
    tokens = [*dict.fromkeys(tokens), _START, _END]
    return {token: number for number, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path) -> int:
    """Write the tokenizer's files and return the number of its tokens."""
    ids, merges = make_tokenizer()
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges, "")), encoding="utf-8")
    about = {
        "tokenizer_class": "CLIPTokenizer", "bos_token": _START, "eos_token": _END, "unk_token": _END,
        "pad_token": _END, "model_max_length": 77,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return len(ids)


def build_model(vocabulary: int) -> Any:
    """Return the untrained model."""
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1, "projection_dim": PROJECTED,
    }  # fmt: skip
    vision = {
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": SIDE_PX, "patch_size": PATCH_PX, "projection_dim": PROJECTED,
    }  # fmt: skip
    config: Any = transformers.CLIPConfig
    make: Any = transformers.CLIPModel
    return make(config(text_config=text, vision_config=vision, projection_dim=PROJECTED))


def draw_crops(scene: Scene, rng: np.random.Generator, each: int) -> Iterator[tuple[Image, int]]:
    """Yield (SIDE_PX square crop, index of its name) of one scene: shapes, parts of them, and what lies between."""
    true = np.array([thing.bbox_xyxy for thing in scene.objects], np.float64)
    names = [NAMES.index(thing.name) for thing in scene.objects]
    centres, sizes = (true[:, :2] + true[:, 2:]) / 2, true[:, 2:] - true[:, :2]
    for _ in range(each):
        near = len(true)
        moved = centres + sizes * rng.uniform(-0.08, 0.08, (near, 2))
        grown = sizes * np.exp(rng.uniform(-0.1, 0.1, (near, 2)))
        close = np.concatenate([moved - grown / 2, moved + grown / 2], axis=1)
        moved = centres + sizes * rng.uniform(-0.6, 0.6, (near, 2))
        grown = sizes * np.exp(rng.uniform(-0.9, 0.6, (near, 2)))
        far = np.concatenate([moved - grown / 2, moved + grown / 2], axis=1)
        corners, sides = rng.uniform(0, FRAME - 40, (2, 2)), rng.uniform(25, 260, (2, 2))
        anywhere = np.concatenate([corners, corners + sides], axis=1)
        boxes = scale_boxes(np.concatenate([close, far, anywhere]), 1.0, FRAME, FRAME)
        overlaps = box_iou(boxes, true)
        for box, overlap in zip(boxes, overlaps, strict=True):
            if (box[2:] - box[:2] < 12).any() or _PART_IOU <= overlap.max() < _WHOLE_IOU:
                continue
            name = names[int(overlap.argmax())] if overlap.max() >= _WHOLE_IOU else BACKGROUND
            (wide,) = scale_boxes(box[None], float(rng.choice(SCALES)), FRAME, FRAME)
            yield _shrink(crop(scene.image_rgb, wide, square=False)), name


def _shrink(picture: Image) -> Image:
    """Return the model's input before it is normalised."""
    values = prepare_crop(picture, SIDE_PX).transpose(1, 2, 0) * STD_RGB + MEAN_RGB
    found: Image = np.rint(values * 255).clip(0, 255).astype(np.uint8)
    return found


def draw_pool(scenes: int, each: int, rng: np.random.Generator) -> tuple[Image, NDArray[np.int64]]:
    """Return (N, SIDE_PX, SIDE_PX, 3) crops of the first scenes of TRAIN_SEED and the (N,) indices of their names."""
    crops, names = [], []
    for index in range(scenes):
        for picture, name in draw_crops(make_scene(TRAIN_SEED, index), rng, each):
            crops.append(picture)
            names.append(name)
    return np.stack(crops), np.array(names)


def normalise(crops_rgb: Image, rng: np.random.Generator) -> Tensor:
    """Return (N, 3, SIDE_PX, SIDE_PX) float32, the colours of each crop swapped and its brightness changed."""
    values = crops_rgb.astype(np.float32) / 255
    for number in range(len(values)):
        values[number] = values[number][..., rng.permutation(3)] * np.float32(rng.uniform(0.8, 1.2))
    return torch.from_numpy(((values.clip(0, 1) - MEAN_RGB) / STD_RGB).transpose(0, 3, 1, 2).copy())


class Texts:
    """The prompts of every name as ids."""

    def __init__(self, folder: Path) -> None:
        make: Any = transformers.CLIPTokenizer
        tokenizer = make.from_pretrained(folder, local_files_only=True)
        self._ids = [tokenizer([*ensemble_prompts(name)])["input_ids"] for name in NAMES]
        self._end = tokenizer.eos_token_id

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return (len(NAMES), L) ids of a random prompt of each name and (len(NAMES),) where its end lies."""
        rows = [prompts[int(rng.integers(len(prompts)))] for prompts in self._ids]
        longest = max(map(len, rows))
        return (
            torch.tensor([row + [self._end] * (longest - len(row)) for row in rows]),
            torch.tensor([len(row) - 1 for row in rows]),
        )


def encode_texts(model: Any, ids: Tensor, ends: Tensor) -> Tensor:
    """Return (N, D) features of length 1."""
    hidden = model.text_model(input_ids=ids).last_hidden_state[torch.arange(len(ids)), ends]
    return functional.normalize(model.text_projection(hidden), dim=1)


def save(model: Any, folder: Path) -> None:
    """Write the weights in float16 and the configuration."""
    halved = build_model(model.config.text_config.vocab_size)
    halved.load_state_dict(model.state_dict())
    halved.half().save_pretrained(folder)


def held_out_crops(seed: int, scenes: int) -> tuple[list[list[Image]], list[int]]:
    """Return, for each shape of some scenes, its crops in SCALES at full size, and the index of its name."""
    crops, names = [], []
    for index in range(scenes):
        scene = make_scene(seed, index)
        for thing in scene.objects:
            box = np.array([thing.bbox_xyxy], np.float64)
            wide = [scale_boxes(box, scale, FRAME, FRAME)[0] for scale in SCALES]
            crops.append([crop(scene.image_rgb, found, square=False) for found in wide])
            names.append(NAMES.index(thing.name))
    return crops, names


def measure(folder: Path, seed: int, scenes: int, names: Sequence[str] = NAMES) -> float:
    """Return the share of shapes with one of these names that is called so among them, looked at as the recipe does."""
    clip = Clip(ClipConfig(model=folder, device="cpu", threads=1, precision="float32"))
    prompts = [ensemble_prompts(name) for name in names]
    texts = clip.encode_text([text for own in prompts for text in own]).plain
    texts = mean_feature(texts.reshape(len(names), len(prompts[0]), -1))
    crops, wanted = held_out_crops(seed, scenes)
    asked = [number for number, name in enumerate(wanted) if NAMES[name] in names]
    features = clip.encode_images([picture for number in asked for picture in crops[number]])
    said = (mean_feature(features.reshape(len(asked), len(SCALES), -1)) @ texts.T).argmax(axis=1).tolist()
    return float(np.mean([names[best] == NAMES[wanted[number]] for best, number in zip(said, asked, strict=True)]))


def train(folder: Path, steps: int, scenes: int, seed: int) -> None:
    """Train for `steps` batches of crops from the first `scenes` scenes; write the folder now and then."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = build_model(write_tokenizer(folder))
    texts = Texts(folder)
    started = time.monotonic()
    crops, names = draw_pool(scenes, 3, rng)
    # Half of a batch shows no shape: most proposals do not.
    shapes, rest = np.flatnonzero(names != BACKGROUND), np.flatnonzero(names == BACKGROUND)
    _LOG.info("drawn", shapes=len(shapes), others=len(rest), minutes=round((time.monotonic() - started) / 60, 1))
    optimizers = make_optimizers(model)
    losses: list[tuple[float, float]] = []
    for step in range(1, steps + 1):
        factor = min(1.0, step / _RAMP_STEPS, (1 - step / steps) / 0.6 + 1e-3)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _PEAK_RATE * factor
        chosen = np.concatenate([rng.choice(shapes, _BATCH * 5 // 8), rng.choice(rest, _BATCH * 3 // 8)])
        pixels, wanted = normalise(crops[chosen], rng), torch.from_numpy(names[chosen])
        seen = functional.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))
        scale = min(_LAST_SCALE, _FIRST_SCALE + (_LAST_SCALE - _FIRST_SCALE) * step / (0.6 * steps))
        logits = scale * seen @ encode_texts(model, *texts.draw(rng)).T
        loss = functional.cross_entropy(logits, wanted, label_smoothing=0.02)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append((loss.item(), float((logits.argmax(1) == wanted).float().mean())))
        if step % 50 == 0:
            loss_now, right = np.mean(losses[-50:], axis=0).round(3).tolist()
            minutes = round((time.monotonic() - started) / 60, 1)
            _LOG.info("step", step=step, minutes=minutes, loss=loss_now, right=right)
        if step % _SAVE_EVERY == 0 or step == steps:
            save(model, folder)
            _LOG.info("held out", step=step, right=round(measure(folder, HELD_OUT_SEEDS[0], 30), 3))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(str(files("mill_jobs.demo"))) / "models" / "clip")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--scenes", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    train(arguments.folder, arguments.steps, arguments.scenes, arguments.seed)


if __name__ == "__main__":
    main()
