"""Vision-language models of the Qwen-VL families through transformers, in this process.

Importing this file imports torch. Decoding is greedy; what else the model's own generation config says, e.g. of
repetition, applies. Answers depend on the questions of a call and the batch size, not on what was asked before.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from mill_shared.errors import ConfigError, DeviceLostError, DeviceMemoryError
from mill_shared.models.config import TransformersChatConfig
from mill_shared.models.device import one_line, prepare_torch, use_tf32
from mill_shared.models.protocols import Answer, Question

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Values of `model_type` that are tested."""

_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class _Prompt:
    """A question that can be asked."""

    index: int
    """Place of the question in the call."""
    picture: int
    """Number of its picture among the distinct ones of the call."""
    picture_tokens: int
    ids: TokenIds
    """Chat template around one placeholder a picture token, then the text."""
    answers: Mapping[TokenIds, str] | None
    """The allowed answers by their tokens, end of turn included; None for free text."""


@dataclass(frozen=True)
class _Encoded:
    """A picture after the vision tower."""

    grid_thw: torch.Tensor
    """(3,) int64: patches in time, height, width."""
    features: list[torch.Tensor]
    """(tokens, width) each: the text model's input, then what Qwen3-VL adds to layers."""
    output: type[Any]
    """What the family's vision tower returns, and its text model takes."""


class _ModelFile(msgspec.Struct):
    """What is read of a model folder's config.json before transformers does."""

    model_type: str


class TransformersChat:
    """Answers questions in batches; each distinct picture of a call is encoded once."""

    def __init__(self, config: TransformersChatConfig) -> None:
        """Load processor and weights from the folder; nothing is fetched.

        Raises:
            ConfigError: the folder, a file or the device is missing, damaged, of the wrong kind or too small.
            DeviceLostError: the device is unusable until the process ends.
        """
        self._config = config
        self._batch_size = config.batch_size
        self._device = prepare_torch(config)
        self._processor, self._model = _load(config, self._device)
        self._tokenizer = self._processor.tokenizer
        self._control_tokens = [str(t) for t in self._tokenizer.added_tokens_decoder.values() if t.special]
        self._image_token: int = self._model.config.image_token_id
        settings = self._model.generation_config
        end_of_turn = self._tokenizer.eos_token_id if settings.eos_token_id is None else settings.eos_token_id
        if end_of_turn is None:
            raise ConfigError(f"chat model {config.model}: names no eos_token_id; copy the model's folder as a whole")
        self._end_of_turn: int = end_of_turn[0] if isinstance(end_of_turn, list) else end_of_turn
        settings.update(
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, eos_token_id=end_of_turn,
            pad_token_id=self._end_of_turn if settings.pad_token_id is None else settings.pad_token_id,
        )  # fmt: skip
        try:
            places = self._text_ids("?").count(self._image_token)
        except (ValueError, TemplateError) as error:
            raise ConfigError(f"chat model {config.model}: its chat template fails: {one_line(error)}") from error
        if places != 1:
            raise ConfigError(
                f"chat model {config.model}: its tokenizer and chat template leave no place for a picture"
            )

    def halve_batch(self) -> bool:
        """Use half of the device memory from now on; False where nothing is left to halve."""
        if self._batch_size == 1:
            return False
        self._batch_size //= 2
        return True

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return one answer a question, in order. A picture or text that the model refuses costs its own answer alone.

        Raises:
            DeviceMemoryError: the device is out of memory; `halve_batch` may help.
            DeviceLostError: the device is unusable until the process ends.
        """
        # Other models of this process have flags of their own, hence here and not once.
        use_tf32(self._config.precision == "tf32")
        pictures = {id(question.picture_rgb): question.picture_rgb for question in questions}
        numbers = {key: number for number, key in enumerate(pictures)}
        text_ids = {text: self._text_ids(text) for text in dict.fromkeys(question.text for question in questions)}
        answers: dict[int, Answer] = {}
        prompts: list[_Prompt] = []
        for index, question in enumerate(questions):
            prompt = self._prompt(index, question, numbers[id(question.picture_rgb)], text_ids[question.text])
            if isinstance(prompt, Answer):
                answers[index] = prompt
            else:
                prompts.append(prompt)
        try:
            answers |= self._answer(prompts, list(pictures.values()))
        except torch.OutOfMemoryError as error:
            reason = one_line(error)
        except torch.AcceleratorError as error:
            raise DeviceLostError(f"chat model: the device failed, end the process: {one_line(error)}") from error
        else:
            return [answers[index] for index in range(len(questions))]
        # Raised out here without its cause, whose frames would keep the batch in memory while half of it is tried.
        torch.cuda.empty_cache()
        raise DeviceMemoryError(f"chat model at batch size {self._batch_size}: {reason}")

    def _answer(self, prompts: Sequence[_Prompt], pictures: Sequence[NDArray[np.uint8]]) -> dict[int, Answer]:
        """Return the answers by the question's index, worked off in batches."""
        # Equal lengths come together, for little padding; so do the questions about one picture.
        ordered = sorted(prompts, key=lambda prompt: (prompt.picture_tokens, prompt.picture, len(prompt.ids)))
        answers: dict[int, Answer] = {}
        encoded: dict[int, _Encoded] = {}
        with torch.inference_mode():
            for start in range(0, len(ordered), self._batch_size):
                batch = ordered[start : start + self._batch_size]
                needed = dict.fromkeys(prompt.picture for prompt in batch)
                encoded = {number: encoded[number] for number in needed if number in encoded}
                encoded |= self._encode({number: pictures[number] for number in needed if number not in encoded})
                texts = self._generate(batch, [encoded[prompt.picture] for prompt in batch])
                answers |= {prompt.index: Answer(text) for prompt, text in zip(batch, texts, strict=True)}
        return answers

    def _text_ids(self, text: str) -> TokenIds:
        """Return a single-turn prompt with one placeholder for the picture, which comes before the text."""
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        prompt = self._processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        return tuple(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def _prompt(self, index: int, question: Question, picture: int, text_ids: TokenIds) -> _Prompt | Answer:
        """Return the question as tokens, or an answer that says what is wrong with it."""
        for text in (question.text, *(question.choices or ())):
            for token in self._control_tokens:
                if token in text:
                    return Answer("", error=f"the question holds the model's control token {token}")
        height, width, channels = question.picture_rgb.shape
        assert channels == 3, "pictures are (H, W, 3)"
        assert question.choices is None or question.choices, "there is something to choose from"
        if height == 0 or width == 0:
            return Answer("", error=f"picture of {width} x {height} pixels: nothing to see")
        image_processor = self._processor.image_processor
        try:
            patches = image_processor.get_number_of_image_patches(height, width)
        except ValueError as error:
            return Answer("", error=f"picture of {width} x {height} pixels: {one_line(error)}")
        tokens = patches // image_processor.merge_size**2
        at = text_ids.index(self._image_token)
        ids = text_ids[:at] + (self._image_token,) * tokens + text_ids[at + 1 :]
        return _Prompt(index, picture, tokens, ids, self._answers(question.choices))

    def _answers(self, choices: tuple[str, ...] | None) -> Mapping[TokenIds, str] | None:
        if choices is None:
            return None
        tokens = [self._tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
        return {(*ids, self._end_of_turn): choice for ids, choice in zip(tokens, choices, strict=True)}

    def _encode(self, pictures: Mapping[int, NDArray[np.uint8]]) -> dict[int, _Encoded]:
        """Run the vision tower over distinct pictures."""
        if not pictures:
            return {}
        # Channels first and said so: of a picture 3 pixels high the layout cannot be guessed. The copy is writable.
        channels_first = [torch.from_numpy(np.array(p.transpose(2, 0, 1), order="C")) for p in pictures.values()]
        inputs = self._processor.image_processor(
            images=channels_first, input_data_format="channels_first", return_tensors="pt"
        )
        grids = inputs["image_grid_thw"].to(self._device)
        vision = self._model.get_image_features(inputs["pixel_values"].to(self._device), grids, return_dict=True)
        layers = [vision.pooler_output, *(getattr(vision, "deepstack_features", None) or ())]
        features = zip(*layers, strict=True)
        return {
            number: _Encoded(grid, list(tensors), type(vision))
            for number, grid, tensors in zip(pictures, grids, features, strict=True)
        }

    def _generate(self, batch: Sequence[_Prompt], encoded: Sequence[_Encoded]) -> list[str]:
        """Answer one batch, padded on the left."""
        width = max(len(prompt.ids) for prompt in batch)
        padding = (self._model.generation_config.pad_token_id,)
        padded = [padding * (width - len(prompt.ids)) + prompt.ids for prompt in batch]
        mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch]
        input_ids = torch.tensor(padded, device=self._device)
        allowed = [prompt.answers for prompt in batch]
        longest = max((len(ids) for answers in allowed if answers is not None for ids in answers), default=0)
        sequences = self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.tensor(mask, device=self._device),
            mm_token_type_ids=(input_ids == self._image_token).int(),
            image_grid_thw=torch.stack([picture.grid_thw for picture in encoded]),
            mm_encoder_outputs={"image": _join(encoded)},
            max_new_tokens=max(self._config.max_new_tokens, longest),
            logits_processor=LogitsProcessorList([_AllowedAnswers(allowed, width)] if longest else []),
            stopping_criteria=StoppingCriteriaList([_Decided(allowed, width)] if longest else []),
        )
        texts = []
        for answers, row in zip(allowed, sequences[:, width:].tolist(), strict=True):
            if answers is None:
                ids = row[: self._config.max_new_tokens]
                texts.append(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            else:
                texts.append(answers[_reachable(answers, row)[0]])
        return texts


class _AllowedAnswers(LogitsProcessor):
    """Leaves a row with allowed answers no token but those that lead to one of them."""

    def __init__(self, allowed: Sequence[Mapping[TokenIds, str] | None], prompt_width: int) -> None:
        self._allowed, self._prompt_width = allowed, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the (rows, vocabulary) scores, -inf for what is not allowed."""
        depth = input_ids.shape[1] - self._prompt_width
        masked = scores.clone()
        for row, answers in enumerate(self._allowed):
            if answers is not None:
                left = _reachable(answers, input_ids[row, self._prompt_width :].tolist())
                following = sorted({ids[depth] for ids in left if len(ids) > depth})
                if following:
                    masked[row] = -torch.inf
                    masked[row, following] = scores[row, following]
        return masked


class _Decided(StoppingCriteria):
    """Ends a row as soon as one allowed answer is left: the rest of its tokens would be forced."""

    def __init__(self, allowed: Sequence[Mapping[TokenIds, str] | None], prompt_width: int) -> None:
        self._allowed, self._prompt_width = allowed, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Return (rows,) bool."""
        rows = input_ids[:, self._prompt_width :].tolist()
        decided = [
            answers is not None and len(_reachable(answers, row)) == 1
            for answers, row in zip(self._allowed, rows, strict=True)
        ]
        return torch.tensor(decided, device=input_ids.device)


def _reachable(answers: Iterable[TokenIds], tokens: Sequence[int]) -> list[TokenIds]:
    """Return the answers that begin with the tokens; once one is left, what follows is padding and ignored.

    No answer begins another, since all end with the end of turn.
    """
    left = list(answers)
    for depth, token in enumerate(tokens):
        if len(left) == 1:
            break
        left = [ids for ids in left if ids[depth] == token]
    return left


def _join(encoded: Sequence[_Encoded]) -> Any:
    """Return what the text model takes for the pictures of a batch, in order."""
    pooled, *deeper = zip(*(picture.features for picture in encoded), strict=True)
    more = {"deepstack_features": deeper} if deeper else {}
    return encoded[0].output(pooler_output=pooled, **more)


def _load(config: TransformersChatConfig, device: torch.device) -> tuple[Any, Any]:
    """Return processor and model."""
    folder = config.model
    hint = "it must hold a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model in the Hugging Face format"
    if not folder.is_dir():
        raise ConfigError(f"chat model {folder}: no such folder; {hint}")
    family = _family(folder)
    if family not in FAMILIES:
        raise ConfigError(f"chat model {folder}: model_type {family!r} is not supported; {hint}")
    # Any, since these are partly untyped.
    processors: Any = AutoProcessor
    models: Any = AutoModelForImageTextToText
    settings: Any = GenerationConfig
    console: Any = transformers_logging
    console.set_verbosity_error()
    console.disable_progress_bar()
    try:
        processor = processors.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, loading = models.from_pretrained(
            folder, dtype=_DTYPES[config.precision], local_files_only=True, trust_remote_code=False,
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
        if (folder / "generation_config.json").is_file():  # read again, since a damaged one is passed over in silence
            model.generation_config = settings.from_pretrained(folder, local_files_only=True)
        model = model.to(device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"chat model {folder}: does not fit into free GPU memory: {one_line(error)}") from error
    except torch.AcceleratorError as error:
        raise DeviceLostError(f"chat model {folder}: the device failed, end this process: {one_line(error)}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"chat model {folder}: cannot be loaded, {hint}: {one_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ConfigError(f"chat model {folder}: {len(missing)} weights are missing, e.g. {missing[0]}; copy it again")
    if config.max_image_pixels is not None:
        size = processor.image_processor.size
        longest = min(config.max_image_pixels, size["longest_edge"])
        processor.image_processor.size = type(size)(
            shortest_edge=min(size["shortest_edge"], longest), longest_edge=longest
        )
    return processor, model


def _family(folder: Path) -> str:
    path = folder / "config.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=_ModelFile).model_type
    except OSError as error:
        raise ConfigError(f"chat model {path}: {error.strerror}; copy the model's folder as a whole") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"chat model {path}: not a model's config.json: {error}") from error
