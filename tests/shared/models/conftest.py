"""Tiny random chat models in the official Hugging Face format, one folder a family."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VL", 14, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        14,
        {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1],
            "window_size": 56,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        16,
        {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
    ),
}  # fmt: skip
"""model_type -> prefix of its classes, patch side in pixels, settings of its vision tower."""

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou answer.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a tiny model of a family; keyword arguments go into its generation config."""

    def make(family: str, **generation: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        _save_chat_model(family, folder, generation)
        return folder

    return make


@pytest.fixture(scope="session")
def chat_folders(make_chat_folder: Callable[..., Path]) -> dict[str, Path]:
    """Family -> folder of a tiny model."""
    return {family: make_chat_folder(family) for family in FAMILIES}


def _save_chat_model(family: str, folder: Path, generation: dict[str, Any]) -> None:
    import torch
    from tokenizers import ByteLevelBPETokenizer

    transformers: Any = importlib.import_module("transformers")  # partly untyped
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["Yes No Unsure Foreground Background. What is in the picture? Name the object."] * 4, vocab_size=300,
        min_frequency=1, show_progress=False,
    )  # fmt: skip
    state = json.loads(trained.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]], eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )  # fmt: skip
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    tokens = {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096, "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    prefix, patch_size, vision = FAMILIES[family]
    text |= {"head_dim": 16} if family == "qwen3_vl" else {}
    vision = {"depth": 2, "num_heads": 2, "patch_size": patch_size, "initializer_range": 0.3, **vision}
    token_pixels = (2 * patch_size) ** 2
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch_size, min_pixels=2 * token_pixels, max_pixels=16 * token_pixels
    )
    videos = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    processor = getattr(transformers, f"{prefix}Processor")(
        images, tokenizer, getattr(transformers, videos)(), chat_template=CHAT_TEMPLATE
    )
    config = getattr(transformers, f"{prefix}Config")(text_config=text, vision_config=vision, **tokens)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, bos_token_id=None, pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], **generation,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
