"""The CLIP adapter against a tiny model in the official format, transformers' own path and OpenAI's transform."""

import importlib
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from mill_shared.errors import ConfigError, DeviceLostError, DeviceMemoryError
from mill_shared.models.clip import MEAN_RGB, STD_RGB, Clip, crop_geometry, prepare_crop
from mill_shared.models.config import ClipConfig, Precision
from tiny_clip import END, PROJECTED, SIDE_PX, START, WIDTH, save_clip

transformers: Any = importlib.import_module("transformers")  # partly untyped
transforms: Any = importlib.import_module("torchvision.transforms")  # untyped

TEXTS = ("a photo of the umbrella.", "This is a photo", "cow", "crème brûlée, 2 of 3")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model is loaded from its folder alone")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "clip"))


def _clip(folder: Path, *, batch_size: int = 64, precision: Precision = "float32") -> Clip:
    return Clip(ClipConfig(model=folder, device="cpu", batch_size=batch_size, precision=precision))


def _tokens(folder: Path, text: str) -> list[int]:
    """Byte-pair encoding as OpenAI's tokenizer does it, for words of letters and single other signs."""
    vocab: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ids = [vocab[START]]
    for word in text.lower().replace(".", " .").split():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for first, second in (merge.split() for merge in merges):
            place = 0
            while place < len(parts) - 1:
                if parts[place] == first and parts[place + 1] == second:
                    parts[place : place + 2] = [first + second]
                place += 1
        ids += [vocab[part] for part in parts]
    return [*ids, vocab[END]]


# Texts


def test_plain_features_are_those_of_the_whole_model_padded_to_77(folder: Path) -> None:
    model = transformers.CLIPModel.from_pretrained(folder)
    found = _clip(folder).encode_text(TEXTS[:3])
    rows = [_tokens(folder, text) for text in TEXTS[:3]]
    padded = torch.tensor([row + [0] * (77 - len(row)) for row in rows])
    with torch.inference_mode():
        expected = model.get_text_features(input_ids=padded).pooler_output.numpy()
    assert found.plain.shape == (3, PROJECTED)
    assert found.plain.dtype == np.float32
    np.testing.assert_allclose(found.plain, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_attn_is_the_end_of_text_behind_the_last_block_without_norm_and_projection(folder: Path) -> None:
    model = transformers.CLIPModel.from_pretrained(folder).text_model
    found = _clip(folder).encode_text(TEXTS[:3])
    assert found.attn.shape == (3, WIDTH)
    for text, attn in zip(TEXTS[:3], found.attn, strict=True):
        ids = torch.tensor([_tokens(folder, text)])
        causal = torch.full((1, 1, ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        with torch.inference_mode():
            hidden = model.embeddings(input_ids=ids)
            for layer in model.encoder.layers:
                hidden = layer(hidden, causal)
            normed = model.final_layer_norm(hidden[0, -1])
        np.testing.assert_allclose(attn, hidden[0, -1].numpy(), rtol=0, atol=2e-6 * hidden.abs().max().item())
        assert np.abs(attn - normed.numpy()).max() > 0.1  # so the norm does tell here


def test_a_text_has_one_feature_whatever_it_is_encoded_with(folder: Path) -> None:
    together = _clip(folder).encode_text(TEXTS)
    one_by_one = [_clip(folder, batch_size=1).encode_text([text]) for text in TEXTS]
    for index, alone in enumerate(one_by_one):
        np.testing.assert_allclose(together.plain[index], alone.plain[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(together.attn[index], alone.attn[0], rtol=0, atol=1e-4)
    assert len(np.unique(together.plain, axis=0)) == len(TEXTS)


def test_case_and_spaces_are_those_of_the_tokenizer(folder: Path) -> None:
    found = _clip(folder).encode_text(["A  Photo of\tTHE cow", "a photo of the cow"]).plain
    assert np.array_equal(found[0], found[1])


def test_the_same_call_gives_the_same_bytes(folder: Path) -> None:
    first, second = (_clip(folder, batch_size=3).encode_text(TEXTS) for _ in range(2))
    assert first.plain.tobytes() == second.plain.tobytes()
    assert first.attn.tobytes() == second.attn.tobytes()


@pytest.mark.parametrize(("precision", "share"), [("tf32", 1e-5), ("bfloat16", 0.1), ("float16", 0.02)])
def test_other_precisions_are_near_and_come_as_float32(folder: Path, precision: Precision, share: float) -> None:
    exact, found = _clip(folder).encode_text(TEXTS), _clip(folder, precision=precision).encode_text(TEXTS)
    assert found.plain.dtype == found.attn.dtype == np.float32
    np.testing.assert_allclose(found.plain, exact.plain, rtol=0, atol=share * np.abs(exact.plain).max())
    np.testing.assert_allclose(found.attn, exact.attn, rtol=0, atol=share * np.abs(exact.attn).max())


def test_seventy_seven_tokens_are_read_and_one_more_is_an_error(folder: Path) -> None:
    clip = _clip(folder)
    assert clip.encode_text(["x " * 75]).plain.shape == (1, PROJECTED)
    with pytest.raises(ConfigError, match=r"has 78 tokens, at most 77 are read; shorten the name"):
        clip.encode_text(["cow", "x " * 76])


def test_an_end_inside_a_text_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"reads as the end of the text"):
        _clip(folder).encode_text([f"a cow{END} in the scene"])


def test_nothing_in_gives_nothing_of_the_right_width(folder: Path) -> None:
    clip = _clip(folder)
    found = clip.encode_text([])
    assert (found.plain.shape, found.attn.shape) == ((0, PROJECTED), (0, WIDTH))
    assert clip.encode_images([]).shape == (0, PROJECTED)


def test_a_tokenizer_in_one_file_gives_the_same(folder: Path, copy: Path) -> None:
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(copy)
    for name in ("vocab.json", "merges.txt"):
        (copy / name).unlink(missing_ok=True)
    assert (copy / "tokenizer.json").is_file()
    assert np.array_equal(_clip(copy).encode_text(TEXTS).plain, _clip(folder).encode_text(TEXTS).plain)


# Crops


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 50), (448, 224, 112, 0)),
        ((50, 100), (224, 448, 0, 112)),
        ((97, 31), (700, 224, 238, 0)),
        ((33, 7), (1056, 224, 416, 0)),
        ((640, 427), (335, 224, 56, 0)),
        ((9, 9), (224, 224, 0, 0)),
    ],
)
def test_geometry_of_a_crop(size: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    """Source: specs/vlplm.md 8.3; the square is ours."""
    assert crop_geometry(*size, 224) == expected


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (97, 31), (33, 7), (640, 427), (5, 300), (224, 224), (1, 1)])
def test_a_crop_becomes_what_openai_makes_of_it(size: tuple[int, int]) -> None:
    crop = _crop(*size)
    transform = transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN_RGB.tolist(), STD_RGB.tolist()),
        ]
    )
    found = prepare_crop(crop, 224)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, transform(Image.fromarray(crop)).numpy(), rtol=0, atol=1e-6)


def test_image_features_are_those_of_the_whole_model(folder: Path) -> None:
    crops = [_crop(100, 50), _crop(31, 97), _crop(64, 64)]
    model = transformers.CLIPModel.from_pretrained(folder)
    pixels = torch.from_numpy(np.stack([prepare_crop(crop, SIDE_PX) for crop in crops]))
    with torch.inference_mode():
        expected = model.get_image_features(pixel_values=pixels).pooler_output.numpy()
    found = _clip(folder, batch_size=2).encode_images(crops)
    assert found.shape == (3, PROJECTED)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    half = _clip(folder, precision="float16").encode_images(crops)
    np.testing.assert_allclose(half, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_a_crop_without_pixels_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="a crop of 0 x 5 pixels"):
        _clip(folder).encode_images([np.zeros((5, 0, 3), np.uint8)])


# Folders and devices


@pytest.mark.parametrize(("kept", "lost"), [("text", "vision"), ("vision", "text")])
def test_each_tower_works_without_the_weights_of_the_other(folder: Path, copy: Path, kept: str, lost: str) -> None:
    state = load_file(copy / "model.safetensors")
    mine = {name: value for name, value in state.items() if not name.startswith((f"{lost}_", f"{lost[:6]}ual_"))}
    assert len(mine) < len(state)
    save_file(mine, copy / "model.safetensors", metadata={"format": "pt"})
    clip, whole = _clip(copy), _clip(folder)
    crops = [_crop(40, 30)]
    # Near, not equal: weights are read in place, and in another file they lie at other addresses.
    if kept == "text":
        np.testing.assert_allclose(clip.encode_text(TEXTS).plain, whole.encode_text(TEXTS).plain, rtol=0, atol=1e-5)
    else:
        np.testing.assert_allclose(clip.encode_images(crops), whole.encode_images(crops), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"weights are missing, e\.g\. .*; copy it again"):
        clip.encode_images(crops) if kept == "text" else clip.encode_text(TEXTS)


def test_a_folder_that_is_none_is_refused_before_any_weight_is_read(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: no such folder; it must hold a CLIP model"):
        _clip(tmp_path / "none")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"model_type": "siglip"}))
    with pytest.raises(ConfigError, match=r"model_type 'siglip' is not supported"):
        _clip(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not a model's config\.json"):
        _clip(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: No such file"):
        _clip(copy)


def test_damaged_weights_are_an_error(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"cannot be loaded"):
        _clip(copy).encode_text(TEXTS)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"cannot be loaded"):
        _clip(copy).encode_text(TEXTS)


def test_a_tokenizer_that_is_missing_damaged_or_too_large_is_an_error(copy: Path) -> None:
    vocab = json.loads((copy / "vocab.json").read_text(encoding="utf-8"))
    (copy / "vocab.json").write_text(json.dumps(vocab | {"umbrella</w>": len(vocab)}), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"its tokenizer has {len(vocab) + 1} tokens, its text tower {len(vocab)}"):
        _clip(copy).encode_text(TEXTS)
    (copy / "vocab.json").write_text("[", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"its tokenizer cannot be read"):
        _clip(copy).encode_text(TEXTS)
    (copy / "vocab.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json, and no vocab\.json with merges\.txt"):
        _clip(copy).encode_text(TEXTS)


def test_a_full_device_asks_for_smaller_batches_and_a_lost_one_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = _clip(folder, batch_size=4)
    expected = clip.encode_text(TEXTS).plain
    whole = transformers.CLIPTextModelWithProjection.from_pretrained(folder)
    real = type(whole.text_model).forward

    def on_a_small_device(self: Any, input_ids: torch.Tensor, **others: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("4 do not fit")
        return real(self, input_ids=input_ids, **others)

    monkeypatch.setattr(type(whole.text_model), "forward", on_a_small_device)
    with pytest.raises(DeviceMemoryError, match="4 do not fit"):
        clip.encode_text(TEXTS)
    assert clip.halve_batch()
    np.testing.assert_allclose(clip.encode_text(TEXTS).plain, expected, rtol=0, atol=1e-4)
    assert clip.halve_batch()
    assert not clip.halve_batch()

    def on_a_lost_device(*_: object, **__: object) -> Any:
        raise torch.AcceleratorError("unspecified launch failure")

    monkeypatch.setattr(type(whole.text_model), "forward", on_a_lost_device)
    with pytest.raises(DeviceLostError, match="unspecified launch failure"):
        clip.encode_text(TEXTS)


def _crop(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
