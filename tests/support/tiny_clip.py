"""A tiny random CLIP model in the official Hugging Face format."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ("p h", "ph o", "pho t", "phot o</w>", "t h", "th e</w>", "o f</w>", "i s</w>")
WIDTH, PROJECTED, SIDE_PX = 32, 24, 64


def save_clip(folder: Path, *, seed: int = 1, projected: int = PROJECTED) -> Path:
    """Write the model and its tokenizer, laid out as OpenAI's: bytes, bytes that end a word, merges, both ends.

    As in the official folders the configuration names the wrong end-of-text id (2).
    """
    symbols = _byte_symbols()
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *merged, START, END]
    transformers: Any = importlib.import_module("transformers")  # partly untyped
    tower = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2, "projection_dim": projected}
    config = transformers.CLIPConfig(
        text_config={
            **tower, "num_hidden_layers": 3, "vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 2,
            "pad_token_id": 1, "initializer_factor": 5.0,
        },
        vision_config={
            **tower, "num_hidden_layers": 2, "image_size": SIDE_PX, "patch_size": 16, "initializer_factor": 5.0,
        },
        projection_dim=projected,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: id_ for id_, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *MERGES, "")), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END,
                "pad_token": END, "model_max_length": 77,
            }
        )
    )  # fmt: skip
    return folder


def _byte_symbols() -> list[str]:
    """Return the printable stand-in of each byte, in the order of OpenAI's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
