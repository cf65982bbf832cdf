import json
from collections.abc import Sequence

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from mill_jobs.demo.scenes import HELD_OUT_SEEDS, TRAIN_SEED
from mill_jobs.demo.train_chat import COMMAND, FOLDER, Mark, ask_as_pipeline, held_out_examples, open_chat
from mill_jobs.recipes.cotpl.prompts import DEFAULT_PROMPTS

SEED = HELD_OUT_SEEDS[2]
"""Checkpoints were compared on the other held-out seeds, never on this one."""
SCENES = 9
"""61 regions. The figures below are the shipped model's own on them; after a retraining, put the new ones."""


@pytest.fixture(scope="module")
def marks() -> list[Mark]:
    assert SEED != TRAIN_SEED
    return ask_as_pipeline(open_chat(FOLDER), held_out_examples(SEED, SCENES))


def right(marks: Sequence[Mark], kinds: Sequence[str], question: str) -> float:
    """Return the share of right answers; a region to be refused is refused by No and by Unsure alike."""
    asked = [mark for mark in marks if mark.key in [f"{kind}.{question}" for kind in kinds]]
    refusals = ("No", "Unsure")
    good = [mark.said == mark.wanted or (mark.wanted in refusals and mark.said in refusals) for mark in asked]
    return sum(good) / len(good)


def test_the_model_was_trained_on_the_wording_that_is_sent() -> None:
    about = json.loads((FOLDER / "mill-demo.json").read_text(encoding="utf-8"))
    assert about["prompt_digest"] == DEFAULT_PROMPTS.digest(), (
        f"the demo's chat model knows other prompts than {DEFAULT_PROMPTS.version}; train it anew: {COMMAND}"
    )


def test_the_folder_is_small_and_loads_with_transformers_alone() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER, local_files_only=True)  # type: ignore[no-untyped-call]
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True)
    assert isinstance(processor, Qwen2VLProcessor)
    assert isinstance(model, Qwen2VLForConditionalGeneration)
    # A folder inside, such as a stray copy, would become part of the model's digest.
    assert all(path.is_file() and path.suffix != ".py" for path in FOLDER.iterdir())
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6_000_000


@pytest.mark.parametrize(
    ("kinds", "question", "measured"),
    [
        (("clean", "ragged"), "presence", 0.9444),
        (("clean", "ragged"), "name", 0.8333),
        (("clean", "ragged"), "name_again", 0.7778),
        (("band", "piece"), "presence", 1),
        (("band", "piece"), "name", 1),
        (("part", "union"), "presence", 0.6875),
        (("speck",), "presence", 1),
        (("clean", "ragged", "band", "piece"), "layer", 1),
        (("clean", "ragged", "band", "piece"), "layer_reference", 1),
    ],
)
def test_held_out_regions_are_answered_as_well_as_when_it_was_shipped(
    marks: list[Mark], kinds: tuple[str, ...], question: str, measured: float
) -> None:
    assert right(marks, kinds, question) >= measured - 0.03
