"""Trains the demo's tiny Qwen2-VL on toy scenes: `python -m mill_jobs.demo.train_chat`. About an hour on one core.

First the vision tower alone learns to say, cell by cell, what is highlighted in a picture; then the whole model learns
the three questions in their exact wording. Regions are drawn as the pipeline draws them and spoilt as a tiny SAM
spoils them: ragged edges, halves, unions, strips of background. Everything comes from TRAIN_SEED.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import structlog
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import ByteLevelBPETokenizer
from torch import nn

from mill_jobs.demo.scenes import (
    BACKGROUND_CLASSES,
    BASE_CLASSES,
    EXTRA_CLASSES,
    HELD_OUT_SEEDS,
    NOVEL_CLASSES,
    TRAIN_SEED,
    Scene,
    make_scene,
)
from mill_jobs.demo.train_sam import Muon
from mill_jobs.recipes.cotpl.prompts import DEFAULT_PROMPTS
from mill_jobs.recipes.cotpl.render import boost_colours, render_region
from mill_shared.models.chat import TransformersChat
from mill_shared.models.config import TransformersChatConfig
from mill_shared.models.protocols import ChatModel, Question

log = structlog.get_logger()

FOLDER = Path(__file__).parent / "models" / "chat"
COMMAND = "python -m mill_jobs.demo.train_chat"
THINGS = (*BASE_CLASSES, *NOVEL_CLASSES, *EXTRA_CLASSES)
NAMES = (*THINGS, *BACKGROUND_CLASSES)
SIDE_PX = 196
PATCH_PX = 14
MERGE = 2
CELLS = SIDE_PX // (PATCH_PX * MERGE)
"""A picture becomes CELLS x CELLS image tokens."""
CLEAR_IOU = 0.75
"""A mask that covers one object at this IoU or better shows it clearly."""
KIND_SHARES = {
    "clean": 0.24, "ragged": 0.36, "band": 0.06, "part": 0.15, "union": 0.12, "piece": 0.04, "speck": 0.03,
}  # fmt: skip
"""How often each kind of region is drawn. Background is learnt in minutes, whole and spoilt objects need practice."""
FRESH_SCENES = 3
"""New scenes at each step: with fewer, the model learns the scenes by heart."""
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Mask = NDArray[np.bool_]
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Example:
    """A rendered region with the right answers. `name` is None where nothing clear is shown."""

    kind: str
    picture_rgb: Image
    presence: str
    name: str | None


def draw_examples(scene: Scene, boosted: Image, rng: np.random.Generator, count: int) -> Iterator[Example]:
    """Yield regions of one scene, clean and spoilt, with the answers that the pipeline should get."""
    made = 0
    while made < count:
        example = draw_example(scene, boosted, str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values()))), rng)
        if example is not None:
            yield example
            made += 1


def draw_example(scene: Scene, boosted: Image, kind: str, rng: np.random.Generator) -> Example | None:
    """Return a region of the kind, or None where this draw gives none."""
    found = _region(scene, kind, rng)
    if found is None:
        return None
    mask, presence, name = found
    return Example(kind, render_region(scene.image_rgb, boosted, mask, _bbox_xywh(mask)), presence, name)


def held_out_examples(seed: int, scenes: int) -> list[Example]:
    """Return up to one region of each kind from each of the first scenes of a seed."""
    rng = np.random.default_rng([seed, 3])
    examples: list[Example] = []
    for index in range(scenes):
        scene = make_scene(seed, index)
        boosted = boost_colours(scene.image_rgb)
        drawn = [draw_example(scene, boosted, kind, rng) for kind in KIND_SHARES]
        examples += [example for example in drawn if example is not None]
    return examples


@dataclass(frozen=True)
class Mark:
    """One answer: `key` is kind of region and question, e.g. `ragged.name`."""

    key: str
    wanted: str
    said: str


def ask_as_pipeline(chat: ChatModel, examples: Sequence[Example]) -> list[Mark]:
    """Return what a chat model says to every question of both profiles; question 3 gets its own answer to 2."""
    prompts = DEFAULT_PROMPTS
    named = [example for example in examples if example.name is not None]
    layers = ["Background" if example.name in BACKGROUND_CLASSES else "Foreground" for example in named]
    names = [str(example.name) for example in named]

    def ask(which: str, asked: Sequence[Example], texts: Sequence[str], wanted: Sequence[str]) -> list[Mark]:
        answers = chat.ask([Question(e.picture_rgb, text) for e, text in zip(asked, texts, strict=True)])
        return [Mark(f"{e.kind}.{which}", w, a.text) for e, w, a in zip(asked, wanted, answers, strict=True)]

    marks = ask("presence", examples, [prompts.presence] * len(examples), [example.presence for example in examples])
    first = ask("name", named, [prompts.name] * len(named), names)
    marks += first + ask("name_again", named, [prompts.name_again] * len(named), names)
    own = [prompts.layer.replace("{name}", mark.said) for mark in first]
    marks += ask("layer", named, own, layers)
    return marks + ask("layer_reference", named, [prompts.layer] * len(named), layers)


def accuracy(marks: Sequence[Mark]) -> dict[str, float]:
    """Return the share of right answers by key; a rejected region may be called No or Unsure, which is the same."""
    tally: Counter[str] = Counter()
    for mark in marks:
        refused = mark.wanted in ("No", "Unsure") and mark.said in ("No", "Unsure")
        tally[mark.key] += mark.said == mark.wanted or refused
        tally[f"{mark.key}.all"] += 1
    return {key: round(tally[key] / tally[f"{key}.all"], 3) for key in sorted(tally) if not key.endswith(".all")}


def _region(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[Mask, str, str | None] | None:
    """Return (mask, answer to question 1, name) of a region of the kind, or None where this draw gives none."""
    if kind == "speck":
        y, x = (int(value) for value in rng.integers(40, scene.image_rgb.shape[0] - 90, 2))
        mask = np.zeros(scene.image_rgb.shape[:2], bool)
        side = int(rng.integers(4, 26))
        mask[y : y + side, x : x + side] = True
        return mask, "No", None
    if kind in ("band", "piece"):
        band = scene.bands[int(rng.integers(len(scene.bands)))]
        mask = band.mask
        if kind == "piece" or rng.random() < 0.4:
            mask = _cut(mask, rng, 0.3, 0.9)
        mask = _ragged(mask, rng)
        return (mask, "Yes", band.name) if mask.sum() > 6000 else None
    thing = scene.objects[int(rng.integers(len(scene.objects)))]
    if kind == "clean":
        return thing.mask, "Yes", thing.name
    if kind == "ragged":
        mask = _ragged(thing.mask, rng)
        if rng.random() < 0.3:
            mask = _with_neighbour(scene, mask, rng, 0.05, 0.2)
    elif kind == "part":
        mask = _ragged(_cut(thing.mask, rng, 0.3, 0.62), rng)
    else:
        others = [other.mask for other in scene.objects if other is not thing]
        whole = others[int(rng.integers(len(others)))] if others and rng.random() < 0.5 else None
        mask = _ragged(thing.mask, rng)
        mask = mask | _ragged(whole, rng) if whole is not None else _with_neighbour(scene, mask, rng, 0.45, 1.2)
    iou = (mask & thing.mask).sum() / max(1, (mask | thing.mask).sum())
    if kind == "ragged":
        return (mask, "Yes", thing.name) if iou >= CLEAR_IOU else None
    return (mask, "Unsure", None) if 0.15 < iou < CLEAR_IOU - 0.08 and mask.sum() > 2500 else None


def _ragged(mask: Mask, rng: np.random.Generator) -> Mask:
    """Return the mask grown or shrunk, its edge torn by smooth noise, perhaps shifted or with a hole."""
    height, width = mask.shape
    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
    outside = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3)
    cells = int(rng.choice([6, 12, 28]))
    noise = cv2.resize(
        rng.normal(size=(cells, cells)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    torn = inside - outside + noise * rng.uniform(0, 6) + rng.uniform(-4, 4) > 0
    if rng.random() < 0.25:
        shift = np.array([[1, 0, rng.uniform(-5, 5)], [0, 1, rng.uniform(-5, 5)]], np.float32)
        torn = cv2.warpAffine(torn.astype(np.uint8), shift, (width, height)) > 0
    if rng.random() < 0.1 and torn.any():
        rows, columns = np.nonzero(torn)
        at = int(rng.integers(len(rows)))
        hole = np.zeros(mask.shape, np.uint8)
        cv2.circle(hole, (int(columns[at]), int(rows[at])), int(rng.integers(4, 14)), 1, -1)
        torn &= hole == 0
    return torn if torn.any() else mask


def _cut(mask: Mask, rng: np.random.Generator, least: float, most: float) -> Mask:
    """Return the part of a mask on one side of a straight line: a share between least and most of its pixels."""
    rows, columns = np.nonzero(mask)
    angle = rng.uniform(0, 2 * math.pi)
    along = rows * math.sin(angle) + columns * math.cos(angle)
    limit = np.quantile(along, rng.uniform(least, most))
    part = np.zeros_like(mask)
    part[rows[along <= limit], columns[along <= limit]] = True
    return part


def _with_neighbour(scene: Scene, mask: Mask, rng: np.random.Generator, least: float, most: float) -> Mask:
    """Return the mask with a blob of what lies beside it, of a share between least and most of its area."""
    rows, columns = np.nonzero(mask)
    at = int(rng.integers(len(rows)))
    radius = math.sqrt(mask.sum() * rng.uniform(least, most) / math.pi)
    edge = max(radius, 1.0)
    angle = rng.uniform(0, 2 * math.pi)
    centre = (int(columns[at] + edge * math.cos(angle)), int(rows[at] + edge * math.sin(angle)))
    blob = np.zeros(mask.shape, np.uint8)
    cv2.circle(blob, centre, int(edge), 1, -1)
    return mask | (blob > 0)


def _bbox_xywh(mask: Mask) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]), int(rows[-1] - rows[0])


class ScenePool:
    """Scenes of one seed, drawn once and used for many regions; some are replaced at each step."""

    def __init__(self, seed: int, size: int, first: int = 0) -> None:
        self._seed, self._next = seed, first + size
        self._scenes = [self._draw(first + index) for index in range(size)]
        self._small = [_shrink(*drawn) for drawn in self._scenes]

    def _draw(self, index: int) -> tuple[Scene, Image]:
        scene = make_scene(self._seed, index)
        return scene, boost_colours(scene.image_rgb)

    def step(self, rng: np.random.Generator) -> None:
        """Replace FRESH_SCENES scenes by the seed's next ones."""
        for at in rng.integers(len(self._scenes), size=FRESH_SCENES).tolist():
            self._scenes[at] = self._draw(self._next)
            self._small[at] = _shrink(*self._scenes[at])
            self._next += 1

    def pick(self, rng: np.random.Generator) -> tuple[Scene, Image]:
        """Return a scene and its boosted picture."""
        return self._scenes[int(rng.integers(len(self._scenes)))]

    def pick_small(self, rng: np.random.Generator) -> "SmallScene":
        """Return a scene at the size that the model sees."""
        return self._small[int(rng.integers(len(self._small)))]


@dataclass(frozen=True)
class SmallScene:
    """A scene at SIDE_PX: its blurred grey and boosted pictures, and (name, mask) of objects and bands."""

    grey_rgb: Image
    boosted_rgb: Image
    parts: tuple[tuple[str, Mask], ...]


def _shrink(scene: Scene, boosted: Image) -> SmallScene:
    size = (SIDE_PX, SIDE_PX)
    grey = cv2.GaussianBlur(cv2.cvtColor(scene.image_rgb, cv2.COLOR_RGB2GRAY), (31, 31), 0)
    masks = [(thing.name, thing.mask) for thing in scene.objects] + [(band.name, band.mask) for band in scene.bands]
    parts = tuple(
        (name, cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_AREA) > 0) for name, mask in masks
    )
    return SmallScene(
        cv2.cvtColor(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2RGB).astype(np.uint8),
        cv2.resize(boosted, size, interpolation=cv2.INTER_AREA).astype(np.uint8),
        parts,
    )


def build_processor() -> Any:
    """Train the tokenizer on the prompts and answers and return the processor."""
    prompts = DEFAULT_PROMPTS
    texts = [prompts.presence, prompts.name, prompts.name_again, prompts.layer.replace("{name}", "star"), prompts.layer]
    answers = ["Yes", "No", "Unsure", "Foreground", "Background", *NAMES]
    trained = ByteLevelBPETokenizer()
    corpus = texts * 3 + [f"{answer} {answer}" for answer in answers] * 40 + ["system\nuser\nassistant\n"] * 40
    trained.train_from_iterator(corpus, vocab_size=640, min_frequency=2, show_progress=False)
    state = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(pair) for pair in state["merges"]]  # typed as strings, but pairs are what it takes
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=state["vocab"], merges=merges, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL_TOKENS),
    )  # fmt: skip
    area = SIDE_PX * SIDE_PX
    images = transformers.Qwen2VLImageProcessor(patch_size=PATCH_PX, merge_size=MERGE, min_pixels=area, max_pixels=area)
    videos = transformers.Qwen2VLVideoProcessor(patch_size=PATCH_PX, merge_size=MERGE)
    make: Any = transformers.Qwen2VLProcessor  # its constructor has no types
    return make(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def build_model(processor: Any) -> Any:
    """Return the untrained tiny model that fits the processor's tokens."""
    tokenizer = processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    vision = {
        "depth": 3, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 4, "patch_size": PATCH_PX,
        "spatial_merge_size": MERGE, "hidden_size": 128,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration(config)
    settings: Any = transformers.GenerationConfig  # its constructor has no types
    model.generation_config = settings(
        do_sample=False, bos_token_id=None, pad_token_id=ids["<|endoftext|>"], eos_token_id=[ids["<|im_end|>"]]
    )
    return model


def optimizers(parameters: Sequence[tuple[str, nn.Parameter]], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases."""
    matrices = [p for name, p in parameters if p.ndim == 2 and "embed" not in name and "head" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in parameters if id(p) not in chosen]
    return [Muon(matrices, lr=rate), torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))]


def set_rate(chosen: Sequence[torch.optim.Optimizer], share: float) -> None:
    """Warm up for 5 % of the training, hold until 50 %, then fall to zero along a cosine."""
    factor = min(1.0, share / 0.05) if share < 0.5 else 0.5 * (1 + math.cos(math.pi * (share - 0.5) / 0.5))
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * max(factor, 1e-3)


class Trainer:
    """Model, processor and data of one training."""

    def __init__(self, seed: int, pool: int, start: Path | None) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        self.rng = np.random.default_rng(seed)
        self.processor = build_processor()
        self.model = build_model(self.processor)
        self.commands: list[str] = []
        first_scene = 0
        if start is not None:
            self.model = type(self.model).from_pretrained(start, dtype=torch.float32)
            self.commands = json.loads((start / "mill-demo.json").read_text(encoding="utf-8"))["commands"]
            first_scene = 1_000_000 * len(self.commands)  # scenes that the earlier training has not seen
        self.scenes = ScenePool(TRAIN_SEED, pool, first_scene)
        tokenizer = self.processor.tokenizer
        self.end, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def features(self, pictures: Sequence[Image]) -> torch.Tensor:
        """Return (N, CELLS * CELLS, 128) image tokens of N pictures."""
        made = self.processor.image_processor(list(pictures), return_tensors="pt")
        out = self.model.model.visual(made["pixel_values"], grid_thw=made["image_grid_thw"])
        tokens = getattr(out, "pooler_output", out)
        tokens = torch.cat(list(tokens)) if isinstance(tokens, (tuple, list)) else tokens
        return tokens.reshape(len(pictures), CELLS * CELLS, -1)

    def train_vision(self, steps: int, batch: int) -> None:
        """Let the vision tower say for each cell what is highlighted there; the head is thrown away."""
        self.model.train()
        head = nn.Linear(128, len(NAMES) + 1)
        named = [*self.model.model.visual.named_parameters(), *(("head." + n, p) for n, p in head.named_parameters())]
        chosen = optimizers(named, 2e-3)
        started = time.monotonic()
        for step in range(steps):
            set_rate(chosen, step / steps)
            self.scenes.step(self.rng)
            pictures, cells = zip(*(self._mosaic() for _ in range(batch)), strict=True)
            logits = head(self.features(pictures))
            wanted = torch.from_numpy(np.stack(cells))
            things = (wanted >= 0) & (wanted < len(THINGS))
            rest = wanted >= len(THINGS)
            loss = nn.functional.cross_entropy(logits[things], wanted[things])
            loss = loss + 0.2 * nn.functional.cross_entropy(logits[rest], wanted[rest])
            _descend(chosen, loss, [p for _, p in named])
            if step % 50 == 0:
                right = (logits.argmax(-1) == wanted)[things].float().mean()
                log.info("vision", step=step, loss=round(loss.item(), 3), things=round(right.item(), 3),
                         minutes=round((time.monotonic() - started) / 60, 1))  # fmt: skip

    def _mosaic(self) -> tuple[Image, NDArray[np.int64]]:
        """Return a picture with several regions highlighted, and per cell which class it shows; -100 at edges."""
        scene = self.scenes.pick_small(self.rng)
        picture = scene.grey_rgb.copy() if self.rng.random() < 0.5 else np.zeros_like(scene.grey_rgb)
        classes = np.full((SIDE_PX, SIDE_PX), len(NAMES), np.int64)
        for name, mask in scene.parts:
            if self.rng.random() < (0.75 if name in THINGS else 0.15):
                torn = mask if self.rng.random() < 0.6 else _ragged(mask, self.rng)
                picture[torn] = scene.boosted_rgb[torn]
                classes[torn] = NAMES.index(name)
        side = classes.shape[0] // CELLS
        blocks = classes.reshape(CELLS, side, CELLS, side).swapaxes(1, 2).reshape(CELLS * CELLS, -1)
        cells = np.full(CELLS * CELLS, -100, np.int64)
        for position, block in enumerate(blocks):
            values, counts = np.unique(block, return_counts=True)
            if counts.max() >= 0.6 * block.size:
                cells[position] = values[counts.argmax()]
        return picture, cells

    def questions(self, example: Example) -> list[tuple[str, str, str]]:
        """Return (which, question, answer) in the pipeline's wording: question 1 and one of the others."""
        prompts = DEFAULT_PROMPTS
        pairs = [("presence", prompts.presence, example.presence)]
        if example.name is not None and self.rng.random() < 0.85:
            pairs.append(("name", prompts.name if self.rng.random() < 0.75 else prompts.name_again, example.name))
        elif example.name is not None:
            layer = "Background" if example.name in BACKGROUND_CLASSES else "Foreground"
            given = example.name if self.rng.random() < 0.8 else str(self.rng.choice(NAMES))
            text = prompts.layer.replace("{name}", given) if self.rng.random() < 0.8 else prompts.layer
            pairs.append(("layer", text, layer))
        return pairs

    def answer_loss(self, examples: Sequence[Example]) -> tuple[torch.Tensor, list[tuple[int, str, bool]]]:
        """Return the mean loss over answer tokens, and (example, which question, all tokens right) of each."""
        image = self.features([example.picture_rgb for example in examples])
        rows: list[tuple[int, str, list[int], int]] = []
        for position, example in enumerate(examples):
            for which, question, answer in self.questions(example):
                ids, start = self._tokens(question, answer)
                rows.append((position, which, ids, start))
        longest = max(len(ids) for _, _, ids, _ in rows)
        tokens = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        labels = torch.full((len(rows), longest), -100)
        for row, (_, _, ids, start) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            labels[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
        embedded = self.model.get_input_embeddings()(tokens)
        at = tokens == self.model.config.image_token_id
        embedded = embedded.masked_scatter(at[..., None], image[[row[0] for row in rows]].to(embedded.dtype))
        places = self._places(tokens)
        out = self.model.model.language_model(inputs_embeds=embedded, attention_mask=mask, position_ids=places)
        wanted = labels != -100
        logits = self.model.lm_head(out.last_hidden_state[wanted])
        loss = nn.functional.cross_entropy(logits, labels[wanted])
        right = torch.zeros_like(labels, dtype=torch.bool)
        right[wanted] = logits.argmax(-1) == labels[wanted]
        exact = (right | ~wanted).all(1).tolist()
        return loss, [(row[0], row[1], ok) for row, ok in zip(rows, exact, strict=True)]

    def _tokens(self, question: str, answer: str) -> tuple[list[int], int]:
        """Return the tokens of one chat with its image places, and where the answer begins."""
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * (CELLS * CELLS))
        encode = self.processor.tokenizer.encode
        head = encode(text)
        return [*head, *encode(answer), self.end], len(head)

    def _places(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (3, N, L) rotary positions: text counts on, the picture spans height and width. As get_rope_index."""
        first = int((tokens[0] == self.model.config.image_token_id).nonzero()[0])
        length = tokens.shape[1]
        grid = torch.arange(CELLS)
        image = torch.stack(
            [torch.zeros(CELLS * CELLS, dtype=torch.long), grid.repeat_interleave(CELLS), grid.repeat(CELLS)]
        )
        after = torch.arange(length - first - CELLS * CELLS) + first + CELLS
        places = torch.cat([torch.arange(first).expand(3, -1), image + first, after.expand(3, -1)], dim=1)
        return places[:, None].expand(3, len(tokens), length)

    def train_answers(self, steps: int, minutes: float, batch: int, folder: Path, every: int) -> None:
        """Train everything on the questions, at most for some minutes; the folder is written anew at intervals."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        chosen = optimizers(named, 1.5e-3)
        started = time.monotonic()
        tally: Counter[str] = Counter()
        for step in range(steps):
            self.model.train()
            share = max(step / steps, (time.monotonic() - started) / 60 / minutes)
            if share >= 1:
                break
            set_rate(chosen, share)
            self.scenes.step(self.rng)
            examples = [example for _ in range(batch // 4) for example in self._draw(4)]
            loss, exact = self.answer_loss(examples)
            _descend(chosen, loss, [p for _, p in named])
            for position, which, ok in exact:
                tally[f"{examples[position].kind}.{which}"] += ok
                tally[f"{examples[position].kind}.{which}.all"] += 1
            if step % 100 == 99:
                rates = {
                    key: round(tally[key] / tally[f"{key}.all"], 2) for key in sorted(tally) if not key.endswith(".all")
                }
                log.info("answers", step=step + 1, loss=round(loss.item(), 3), **rates,
                         minutes=round((time.monotonic() - started) / 60, 1))  # fmt: skip
                tally.clear()
            if step % every == every - 1:
                held_out = measure(self, HELD_OUT_SEEDS[0], 160)
                log.info("held out", **held_out)
                save(self, folder, held_out)
        save(self, folder, {})
        held_out = accuracy(ask_as_pipeline(open_chat(folder), held_out_examples(HELD_OUT_SEEDS[1], 60)))
        log.info("held out", **held_out)
        save(self, folder, held_out)

    def _draw(self, count: int) -> Iterator[Example]:
        scene, boosted = self.scenes.pick(self.rng)
        yield from draw_examples(scene, boosted, self.rng, count)


def _descend(chosen: Sequence[torch.optim.Optimizer], loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> None:
    for optimizer in chosen:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in chosen:
        optimizer.step()


def measure(trainer: Trainer, seed: int, regions: int) -> dict[str, float]:
    """Return the share of exact answers per kind and question on regions of a seed that was never trained on."""
    rng = np.random.default_rng([seed, 1])
    before, trainer.rng = trainer.rng, np.random.default_rng([seed, 2])
    tally: Counter[str] = Counter()
    trainer.model.eval()
    with torch.no_grad():
        for index in range(regions // 4):
            scene = make_scene(seed, 10_000 + index)
            examples = list(draw_examples(scene, boost_colours(scene.image_rgb), rng, 4))
            for position, which, ok in trainer.answer_loss(examples)[1]:
                for key in (f"{examples[position].kind}.{which}", which):
                    tally[key] += ok
                    tally[f"{key}.all"] += 1
    trainer.rng = before
    return {key: round(tally[key] / tally[f"{key}.all"], 3) for key in sorted(tally) if not key.endswith(".all")}


def open_chat(folder: Path) -> TransformersChat:
    """Load a model folder as the demo does."""
    return TransformersChat(
        TransformersChatConfig(model=folder, precision="float32", device="cpu", threads=1, max_new_tokens=8)
    )


def save(trainer: Trainer, folder: Path, held_out: dict[str, float]) -> None:
    """Write the model folder in the official format, in half precision, in one rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new = Path(name) / "new"
        state = {key: value.half() for key, value in trainer.model.state_dict().items()}
        trainer.model.save_pretrained(new, state_dict=state)
        trainer.processor.save_pretrained(new)
        about = {
            "prompts": DEFAULT_PROMPTS.version, "prompt_digest": DEFAULT_PROMPTS.digest(),
            "commands": trainer.commands, "held_out": held_out,
        }  # fmt: skip
        (new / "mill-demo.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.move(folder, Path(name) / "old")
        new.rename(folder)


def main() -> None:
    """Train with the settings of the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision-steps", type=int, default=900)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=120, help="end the second part after this time at the latest")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="go on from this model folder rather than from nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    trainer = Trainer(arguments.seed, 192, arguments.start)
    trainer.commands.append(
        f"{COMMAND} --vision-steps {arguments.vision_steps} --steps {arguments.steps} --minutes {arguments.minutes:g} "
        f"--batch {arguments.batch} --seed {arguments.seed}" + (" --start FOLDER" if arguments.start else "")
    )
    log.info("model", parameters=sum(p.numel() for p in trainer.model.parameters()))
    trainer.train_vision(arguments.vision_steps, arguments.batch)
    trainer.train_answers(arguments.steps, arguments.minutes, arguments.batch, arguments.folder, every=200)


if __name__ == "__main__":
    main()
