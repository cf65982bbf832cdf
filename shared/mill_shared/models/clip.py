"""CLIP through transformers, in this process: texts and crops to features.

Importing this file imports torch. Each tower is loaded when it is first used, so texts cost no image weights.
Features depend on the texts or crops of a call and the batch size, not on what was encoded before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from mill_shared.errors import ConfigError, DeviceLostError, DeviceMemoryError
from mill_shared.models.config import ClipConfig
from mill_shared.models.device import one_line, prepare_torch, use_tf32

T = TypeVar("T")

MEAN_RGB: Final = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD_RGB: Final = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
"""Of pixels in [0, 1]. Source: specs/vlplm.md 1.1, step H."""

_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_HINT = "it must hold a CLIP model in the Hugging Face format, e.g. clip-vit-base-patch16 with model.safetensors"


@dataclass(frozen=True)
class TextFeatures:
    """Two features of each text, neither normalised."""

    plain: NDArray[np.float32]
    """(N, D), what is compared with image features: behind final layer norm and projection."""
    attn: NDArray[np.float32]
    """(N, W), the end-of-text token behind the last block, before final layer norm and projection."""


class _Tower(msgspec.Struct):
    """What is read of one tower's configuration before transformers does."""

    image_size: int = 224
    max_position_embeddings: int = 77
    vocab_size: int = 49408


class _ModelFile(msgspec.Struct):
    """What is read of a model folder's config.json before transformers does."""

    model_type: str
    text_config: _Tower = msgspec.field(default_factory=_Tower)
    vision_config: _Tower = msgspec.field(default_factory=_Tower)


class Clip:
    """Encodes texts and crops in batches."""

    def __init__(self, config: ClipConfig) -> None:
        """Look at the folder; weights are read on first use, and nothing is fetched.

        Raises:
            ConfigError: the folder or the device is missing or of the wrong kind. Damaged or missing weights of a
                tower say so when it is first used.
        """
        self._config = config
        self._batch_size = config.batch_size
        self._file = _read_model_file(config.model)
        self._device = prepare_torch(config)

    def halve_batch(self) -> bool:
        """Use half of the device memory from now on; False where nothing is left to halve."""
        if self._batch_size == 1:
            return False
        self._batch_size //= 2
        return True

    def encode_text(self, texts: Sequence[str]) -> TextFeatures:
        """Return the features of each text.

        Texts are padded to the longest of the call only: attention is causal, so what follows the end of a text says
        nothing, and short prompts cost a fifth of 77 tokens. Source: specs/vlplm.md 4.3 (padding makes no difference).

        Raises:
            ConfigError: a text is longer than the model reads (77 tokens with both ends), or cannot be written in its
                vocabulary; or the text tower cannot be loaded.
            DeviceMemoryError: the device is out of memory; `halve_batch` may help.
            DeviceLostError: the device is unusable until the process ends.
        """
        rows = [self._token_ids(text) for text in texts]
        longest = max(map(len, rows), default=0)
        ends = torch.tensor([len(row) - 1 for row in rows])
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
        plain, attn = list[NDArray[np.float32]](), list[NDArray[np.float32]]()
        for start in range(0, len(rows), self._batch_size):
            some = slice(start, start + self._batch_size)
            features = self._run(partial(self._text_features, ids[some], ends[some]))
            plain.append(features.plain)
            attn.append(features.attn)
        if not rows:
            config = self._text_tower.config
            return TextFeatures(
                np.zeros((0, config.projection_dim), np.float32), np.zeros((0, config.hidden_size), np.float32)
            )
        return TextFeatures(np.concatenate(plain), np.concatenate(attn))

    def encode_images(self, crops_rgb: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return the (N, D) projected features, not normalised, of (H, W, 3) crops of any sizes.

        Raises:
            ValueError: a crop has no pixels.
            ConfigError: the image tower cannot be loaded.
            DeviceMemoryError: the device is out of memory; `halve_batch` may help.
            DeviceLostError: the device is unusable until the process ends.
        """
        found = [np.zeros((0, self._image_tower.config.projection_dim), np.float32)]
        for start in range(0, len(crops_rgb), self._batch_size):
            batch = [prepare_crop(crop, self._image_side_px) for crop in crops_rgb[start : start + self._batch_size]]
            found.append(self._run(partial(self._image_features, np.stack(batch))))
        return np.concatenate(found)

    def _text_features(self, ids: torch.Tensor, ends: torch.Tensor) -> TextFeatures:
        model = self._text_tower
        output = model.text_model(input_ids=ids.to(self._device), output_hidden_states=True)
        # By our own count: the folder's eos_token_id may be wrong, and transformers then goes by the highest id.
        attn = output.hidden_states[-1][torch.arange(len(ids)), ends]
        plain = model.text_projection(model.text_model.final_layer_norm(attn))
        return TextFeatures(plain.float().cpu().numpy(), attn.float().cpu().numpy())

    def _image_features(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        model = self._image_tower
        on_device = torch.from_numpy(pixels).to(self._device, model.dtype)
        found: NDArray[np.float32] = model(pixel_values=on_device).image_embeds.float().cpu().numpy()
        return found

    def _run(self, forward: Callable[[], T]) -> T:
        # Other models of this process have flags of their own, hence here and not once.
        use_tf32(self._config.precision == "tf32")
        try:
            with torch.inference_mode():
                return forward()
        except torch.OutOfMemoryError as error:
            full = one_line(error)
        except torch.AcceleratorError as error:
            raise DeviceLostError(f"the device failed while CLIP encoded: {one_line(error)}") from error
        # Raised out here, since the frames of the cause would keep the batch in memory.
        torch.cuda.empty_cache()
        raise DeviceMemoryError(full)

    @property
    def _image_side_px(self) -> int:
        return self._file.vision_config.image_size

    @cached_property
    def _text_tower(self) -> Any:
        return self._load(CLIPTextModelWithProjection)

    @cached_property
    def _image_tower(self) -> Any:
        return self._load(CLIPVisionModelWithProjection)

    def _load(self, tower: Any) -> Any:
        """Return one tower; the weights of the other one stay on disk."""
        folder = self._config.model
        _silence_transformers()
        try:
            model, loading = tower.from_pretrained(
                folder, dtype=_DTYPES[self._config.precision], local_files_only=True, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
            model = model.to(self._device).eval()
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"CLIP model {folder}: does not fit into free GPU memory: {one_line(error)}") from error
        except torch.AcceleratorError as error:
            raise DeviceLostError(
                f"CLIP model {folder}: the device failed, end this process: {one_line(error)}"
            ) from error
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"CLIP model {folder}: cannot be loaded, {_HINT}: {one_line(error)}") from error
        if missing := sorted(loading["missing_keys"]):
            raise ConfigError(
                f"CLIP model {folder}: {len(missing)} weights are missing, e.g. {missing[0]}; copy it again"
            )
        return model

    @cached_property
    def _tokenizer(self) -> Any:
        folder = self._config.model
        names = ("vocab.json", "merges.txt")
        # Without these files transformers makes a tokenizer that knows no word, and says nothing.
        if not (folder / "tokenizer.json").is_file() and not all((folder / name).is_file() for name in names):
            raise ConfigError(f"CLIP model {folder}: no tokenizer.json, and no vocab.json with merges.txt; {_HINT}")
        _silence_transformers()
        tokenizers: Any = CLIPTokenizer  # partly untyped
        try:
            tokenizer = tokenizers.from_pretrained(folder, local_files_only=True)
        # tokenizers, in Rust, raises nothing narrower for a damaged file.
        except Exception as error:
            raise ConfigError(f"CLIP model {folder}: its tokenizer cannot be read: {one_line(error)}") from error
        if len(tokenizer) > self._file.text_config.vocab_size:
            raise ConfigError(
                f"CLIP model {folder}: its tokenizer has {len(tokenizer)} tokens, its text tower "
                f"{self._file.text_config.vocab_size}; copy the model's folder as a whole"
            )
        return tokenizer

    def _token_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        most = self._file.text_config.max_position_embeddings
        if len(ids) > most:
            raise ConfigError(f"CLIP: {text!r} has {len(ids)} tokens, at most {most} are read; shorten the name")
        if ids.index(self._tokenizer.eos_token_id) != len(ids) - 1:
            raise ConfigError(
                f"CLIP: {text!r} holds something that {self._config.model} reads as the end of the text; "
                "correct the name, or copy the model's tokenizer again"
            )
        return ids


def prepare_crop(crop_rgb: NDArray[np.uint8], side_px: int) -> NDArray[np.float32]:
    """Return the model's input of a crop: the central square, resized and normalised as OpenAI's transform does.

    The shorter side becomes `side_px` by Pillow's bicubic filter with antialiasing, the longer one in proportion,
    rounded down; the crop's offset is rounded half to even, where transformers rounds down and would be a pixel off.
    Source: specs/vlplm.md 1.1 step H, 4.3 and 8.3.

    Args:
        crop_rgb: (H, W, 3), at least one pixel.
        side_px: side of the model's input.

    Returns:
        (3, side_px, side_px) float32.

    Raises:
        ValueError: the crop has no pixels.
    """
    height, width = crop_rgb.shape[:2]
    if not height or not width:
        raise ValueError(f"a crop of {width} x {height} pixels cannot be encoded")
    width, height, left, top = crop_geometry(width, height, side_px)
    resized = Image.fromarray(crop_rgb).resize((width, height), Image.Resampling.BICUBIC)
    square = np.asarray(resized.crop((left, top, left + side_px, top + side_px)), np.float32)
    return np.ascontiguousarray(((square / np.float32(255) - MEAN_RGB) / STD_RGB).transpose(2, 0, 1))


def crop_geometry(width_px: int, height_px: int, side_px: int) -> tuple[int, int, int, int]:
    """Return width and height of a resized crop, then left and top of its central square.

    Source: specs/vlplm.md 8.3.
    """
    short, long = sorted((width_px, height_px))
    longer = int(side_px * long / short)
    width, height = (side_px, longer) if width_px <= height_px else (longer, side_px)
    return width, height, round((width - side_px) / 2), round((height - side_px) / 2)


def _read_model_file(folder: Path) -> _ModelFile:
    if not folder.is_dir():
        raise ConfigError(f"CLIP model {folder}: no such folder; {_HINT}")
    path = folder / "config.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_ModelFile)
    except OSError as error:
        raise ConfigError(f"CLIP model {path}: {error.strerror}; copy the model's folder as a whole") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"CLIP model {path}: not a model's config.json: {error}") from error
    if found.model_type != "clip":
        raise ConfigError(f"CLIP model {folder}: model_type {found.model_type!r} is not supported; {_HINT}")
    return found


def _silence_transformers() -> None:
    console: Any = transformers_logging
    console.set_verbosity_error()
    console.disable_progress_bar()
