"""The transformers adapter against tiny models in the official format and against transformers' own plain path."""

import importlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mill_shared.errors import ConfigError, DeviceLostError, DeviceMemoryError
from mill_shared.models.chat import FAMILIES, TransformersChat
from mill_shared.models.config import Precision, TransformersChatConfig
from mill_shared.models.factory import build_chat_model
from mill_shared.models.protocols import Answer, Question

Picture = NDArray[np.uint8]
transformers: Any = importlib.import_module("transformers")  # partly untyped

CHOICES = (None, ("Yes", "No", "Unsure"), ("Fore", "Foreground", "Background"), ("object", "object in the picture"))
TEXTS = ("What is in the picture?", "Name the object in one word, please, and take your time.", "Is it?")


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


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, chat_folders: dict[str, Path]) -> Path:
    family: str = request.param
    return chat_folders[family]


def test_answers_equal_those_of_transformers_alone(folder: Path) -> None:
    questions = _questions()
    answers = _chat(folder, batch_size=5).ask(questions)
    assert [answer.error for answer in answers] == [None] * len(questions)
    assert [answer.text for answer in answers] == [_plain_answer(folder, question) for question in questions]


def test_padding_is_nothing_new_to_a_penalty_on_repetition(make_chat_folder: Callable[..., Path]) -> None:
    for family in FAMILIES:
        folder = make_chat_folder(family, repetition_penalty=9.0)
        questions = _questions()
        settings = json.loads((folder / "generation_config.json").read_text())
        settings["pad_token_id"] = _plain_tokens(folder, questions[0])[0]  # it would matter, were it in the prompt
        (folder / "generation_config.json").write_text(json.dumps(settings))
        chat = _chat(folder, batch_size=16)
        assert chat.ask(questions) == [chat.ask([question])[0] for question in questions]


def test_a_folder_as_the_authors_published_it_gives_the_same_answers(
    tmp_path: Path, chat_folders: dict[str, Path]
) -> None:
    folder = _copy(chat_folders["qwen2_vl"], tmp_path)
    _lay_out_as_published(folder)
    assert _chat(folder).ask(_questions()) == _chat(chat_folders["qwen2_vl"]).ask(_questions())


def test_order_of_the_questions_changes_no_answer(folder: Path) -> None:
    chat, questions = _chat(folder), _questions()
    assert chat.ask(questions[::-1]) == chat.ask(questions)[::-1]


def test_what_was_asked_before_changes_no_answer(folder: Path) -> None:
    questions = _questions()
    used = _chat(folder)
    used.ask([Question(_picture(33, 99, seed=5), "Another question?")] * 3)
    assert used.ask(questions) == _chat(folder).ask(questions)


def test_the_config_leads_to_this_adapter(chat_folders: dict[str, Path]) -> None:
    config = TransformersChatConfig(model=chat_folders["qwen2_vl"], device="cpu", precision="float32")
    assert isinstance(build_chat_model(config), TransformersChat)


def test_the_picture_is_seen(folder: Path) -> None:
    answers = _chat(folder).ask([Question(_picture(60, 80, seed=seed), TEXTS[0]) for seed in range(6)])
    assert len({answer.text for answer in answers}) > 1


def test_answers_are_allowed_ones_even_where_one_begins_another(folder: Path) -> None:
    questions = [
        Question(_picture(60, 80, seed=seed), TEXTS[0], choices)
        for seed in range(6)
        for choices in CHOICES
        if choices is not None
    ]
    for question, answer in zip(questions, _chat(folder).ask(questions), strict=True):
        assert question.choices is not None
        assert answer.text in question.choices


def test_an_allowed_answer_may_be_longer_than_free_text(folder: Path) -> None:
    picture = _picture(60, 80)
    chat = _chat(folder, max_new_tokens=1)
    constrained, free = chat.ask([Question(picture, "Is it?", ("object in the picture",)), Question(picture, "Is it?")])
    assert constrained.text == "object in the picture"
    assert free == chat.ask([Question(picture, "Is it?")])[0]


def test_each_distinct_picture_is_encoded_once(folder: Path) -> None:
    chat = _chat(folder, batch_size=4)
    pictures = [_picture(60, 80, seed=seed) for seed in range(3)]
    questions = [Question(picture, text) for text in TEXTS for picture in pictures]
    encoded: list[int] = []
    visual = chat._model.model.visual
    with visual.register_forward_pre_hook(
        lambda _module, _args, kwargs: encoded.append(len(kwargs["grid_thw"])), with_kwargs=True
    ):
        shared = chat.ask(questions)
    assert sum(encoded) == len(pictures)
    apart = [Question(question.picture_rgb.copy(), question.text) for question in questions]
    assert chat.ask(apart) == shared


def test_a_picture_or_text_that_the_model_refuses_costs_its_own_answer_alone(folder: Path) -> None:
    chat = _chat(folder)
    good = Question(_picture(60, 80), TEXTS[0])
    thin = Question(_picture(1, 1000), TEXTS[0])
    empty = Question(_picture(0, 7), TEXTS[0])
    forged = Question(good.picture_rgb, "What is <|image_pad|>?")
    forged_choice = Question(good.picture_rgb, "Which?", ("a", "<|im_end|>"))
    answers = chat.ask([thin, good, empty, forged, good, forged_choice])
    assert [answer.error is None for answer in answers] == [False, True, False, False, True, False]
    assert answers[1] == answers[4] == chat.ask([good])[0]
    assert "1000 x 1" in str(answers[0].error)
    assert "7 x 0" in str(answers[2].error)
    assert "<|image_pad|>" in str(answers[3].error)
    assert all(answer.text == "" for answer in answers if answer.error)


def test_layout_of_a_picture_is_never_guessed(folder: Path) -> None:
    low = _picture(3, 90)
    low.flags.writeable = False
    assert _chat(folder).ask([Question(low, TEXTS[0])]) == [Answer(_plain_answer(folder, Question(low, TEXTS[0])))]


def test_nothing_asked_nothing_answered(folder: Path) -> None:
    assert _chat(folder).ask([]) == []


def test_fewer_pixels_make_fewer_tokens(chat_folders: dict[str, Path]) -> None:
    chat = _chat(chat_folders["qwen2_vl"], max_image_pixels=28 * 28 * 5)
    lengths: list[int] = []
    with chat._model.model.visual.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(int(kwargs["grid_thw"].prod())), with_kwargs=True
    ):
        chat.ask([Question(_picture(300, 300), TEXTS[0])])
    assert lengths == [16]  # 2 x 2 tokens of 2 x 2 patches


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_every_precision_answers(folder: Path, precision: Precision) -> None:
    answers = _chat(folder, precision=precision).ask(_questions())
    assert all(answer.error is None for answer in answers)
    expected = {"tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    assert _chat(folder, precision=precision)._model.dtype == expected


def test_out_of_memory_halves_the_batch_until_nothing_is_left(chat_folders: dict[str, Path]) -> None:
    chat = _chat(chat_folders["qwen2_vl"], batch_size=4)
    batches: list[int] = []

    def too_large(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        batches.append(len(kwargs["input_ids"]))
        if batches[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    questions = _questions()
    expected = chat.ask(questions)
    with chat._model.register_forward_pre_hook(too_large, with_kwargs=True):
        for size in (4, 2):
            with pytest.raises(DeviceMemoryError, match=f"batch size {size}: .*2 GiB") as raised:
                chat.ask(questions)
            assert "\n" not in str(raised.value)
            assert raised.value.__context__ is None, "its frames would keep the batch in memory"
            assert chat.halve_batch()
        assert chat.ask(questions) == expected
    assert not chat.halve_batch()
    assert {4, 2, 1} == set(batches)


def test_a_broken_device_is_told_apart(chat_folders: dict[str, Path]) -> None:
    chat = _chat(chat_folders["qwen2_vl"])

    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with (
        chat._model.register_forward_pre_hook(broken),
        pytest.raises(DeviceLostError, match="illegal memory access"),
    ):
        chat.ask(_questions()[:1])


def test_decoding_is_greedy_though_the_folder_says_to_sample(folder: Path) -> None:
    assert json.loads((folder / "generation_config.json").read_text())["do_sample"] is True
    torch.manual_seed(0)
    first = _chat(folder).ask(_questions())
    torch.manual_seed(1)
    assert _chat(folder).ask(_questions()) == first


def test_loading_and_asking_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.enable_progress_bar()
    transformers.utils.logging.set_verbosity_info()
    _chat(folder).ask(_questions())
    assert capfd.readouterr() == ("", "")


def test_threads_and_determinism_are_set(chat_folders: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    try:
        _chat(chat_folders["qwen2_vl"], threads=3, deterministic=True)
        assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(before)


NEEDED = ["config.json", "tokenizer.json", "processor_config.json", "model.safetensors", "chat_template.jinja"]


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_a_config_error_that_names_the_folder(
    tmp_path: Path, chat_folders: dict[str, Path], name: str
) -> None:
    folder = _copy(chat_folders["qwen2_vl"], tmp_path)
    (folder / name).unlink()
    _refused(folder, str(folder))


@pytest.mark.parametrize("name", [*NEEDED, "tokenizer_config.json", "generation_config.json"])
def test_a_truncated_file_is_a_config_error_that_names_the_folder(
    tmp_path: Path, chat_folders: dict[str, Path], name: str
) -> None:
    folder = _copy(chat_folders["qwen2_vl"], tmp_path)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    _refused(folder, str(folder))


def test_no_folder_is_a_config_error(tmp_path: Path) -> None:
    _refused(tmp_path / "absent", "no such folder")


def test_another_family_is_a_config_error_that_names_what_is_supported(
    tmp_path: Path, chat_folders: dict[str, Path]
) -> None:
    folder = _copy(chat_folders["qwen2_vl"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    _refused(folder, "'llama' is not supported; it must hold a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")


def test_weights_that_do_not_fill_the_model_are_a_config_error(tmp_path: Path, chat_folders: dict[str, Path]) -> None:
    folder = _copy(chat_folders["qwen2_vl"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    _refused(folder, "weights are missing")


def test_weights_of_other_shapes_are_a_config_error(tmp_path: Path, chat_folders: dict[str, Path]) -> None:
    folder = _copy(chat_folders["qwen2_vl"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 80
    (folder / "config.json").write_text(json.dumps(config))
    _refused(folder, "cannot be loaded")


def test_pickled_weights_are_refused(tmp_path: Path, chat_folders: dict[str, Path]) -> None:
    folder = _copy(chat_folders["qwen2_vl"], tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    _refused(folder, "safetensors")


def test_a_template_without_a_picture_is_a_config_error(tmp_path: Path, chat_folders: dict[str, Path]) -> None:
    folder = _copy(chat_folders["qwen2_vl"], tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    _refused(folder, "chat template")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_a_config_error(chat_folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="no GPU is visible"):
        TransformersChat(TransformersChatConfig(model=chat_folders["qwen2_vl"], device="cuda"))


def _picture(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _questions() -> list[Question]:
    """Free and constrained questions about pictures of several sizes; some share a picture."""
    pictures = [_picture(60, 80), _picture(100, 40, seed=1), _picture(200, 210, seed=2), _picture(60, 80, seed=3)]
    return [
        Question(picture, TEXTS[number % len(TEXTS)], choices)
        for number, choices in enumerate(CHOICES)
        for picture in pictures
    ]


def _chat(folder: Path, *, batch_size: int = 8, max_new_tokens: int = 12, **settings: Any) -> TransformersChat:
    config: dict[str, Any] = {"precision": "float32", "device": "cpu", **settings}
    return TransformersChat(
        TransformersChatConfig(model=folder, batch_size=batch_size, max_new_tokens=max_new_tokens, **config)
    )


def _plain_answer(folder: Path, question: Question) -> str:
    processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    text: str = processor.decode(_plain_tokens(folder, question), skip_special_tokens=True)
    return text


def _plain_tokens(folder: Path, question: Question) -> list[int]:
    """Answer one question as transformers' documentation does it: no batch, no reuse, its own constraint."""
    processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = torch.from_numpy(question.picture_rgb.copy())
    inputs = processor(
        text=[prompt], images=[image], images_kwargs={"input_data_format": "channels_last"}, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    allowed = [[*processor.tokenizer(choice)["input_ids"], end] for choice in question.choices or ()]

    def following(_row: int, ids: torch.Tensor) -> list[int]:
        done = ids[length:].tolist()
        return [answer[len(done)] for answer in allowed if answer[: len(done)] == done]

    sequences = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=12,
        prefix_allowed_tokens_fn=following if question.choices else None,
    )
    tokens: list[int] = sequences[0, length:].tolist()
    return tokens


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def _lay_out_as_published(folder: Path) -> None:
    """Rewrite a saved Qwen2-VL as the model repositories of 2024 have it: a flat config, several files, two shards."""
    config = json.loads((folder / "config.json").read_text())
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope, dropped = text.pop("rope_parameters"), ("model_type", "layer_types")
    config |= {key: value for key, value in text.items() if key not in dropped}
    config |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": config.pop("dtype"),
        "vision_config": {
            **{key: vision[key] for key in ("depth", "embed_dim", "mlp_ratio", "num_heads", "hidden_size")},
            "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))

    saved = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    size = saved.pop("size")
    kept = {key: saved[key] for key in ("image_mean", "image_std", "merge_size", "patch_size", "temporal_patch_size")}
    pixels = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    classes = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**kept, **pixels, **classes}))
    (folder / "processor_config.json").unlink()

    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "chat_template.jinja").unlink()

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-{1 + number % 2:05}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    for shard in set(shards.values()):
        tensors = {name: weights[name] for name in weights if shards[name] == shard}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def _refused(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _chat(folder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
