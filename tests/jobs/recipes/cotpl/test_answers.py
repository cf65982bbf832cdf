"""Parity with the original's parsing of answers, and what the strict reading makes of the same answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mill_jobs.recipes.cotpl.answers import (
    MAX_NAME_CHARS,
    MAX_NAME_WORDS,
    reference_layer,
    reference_name,
    reference_presence,
    strict_choice,
    strict_name,
)
from mill_jobs.recipes.cotpl.prompts import LAYER_ANSWERS, PRESENCE_ANSWERS

DROPPED = "dropped"

# Source: specs/cotpl.md 8.4: Q1, Q2, Q3, the original's result, the strict result. The strict results of the last
# eight rows are the sentence below the table; those of the first six are the original's, the name as a plain name.
ROWS = [
    ("Yes", "Zebra", "Foreground", ("foreground", "zebra"), ("foreground", "zebra")),
    ("Yes.", "A Dog.", "foreground", ("foreground", "a dog."), ("foreground", "dog")),
    ("Answer: Yes", "Wine glass", "FOREGROUND", ("foreground", "wine glass"), ("foreground", "wine glass")),
    ("No", "-", "-", DROPPED, DROPPED),
    ("Unsure", "-", "-", DROPPED, DROPPED),
    ("", "-", "-", DROPPED, DROPPED),
    ("No, eyes closed", "Cat", "Foreground", ("foreground", "cat"), "retry Q1"),
    ("YES it is", "Traffic Light\n", "Foreground.", ("background", "traffic light"), ("foreground", "traffic light")),
    ("Yes", "Sky", "Background", ("background", "sky"), ("background", "sky")),
    ("Yes", "Sky", "", ("foreground", "sky"), "retry Q3"),
    ("Yes", "Cup", "ground", ("foreground", "cup"), "retry Q3"),
    ("Yes", "Cup", "The object is in the foreground", ("background", "cup"), ("foreground", "cup")),
    ("Yes", "", "Foreground", ("foreground", ""), "retry Q2"),
    ("Yes", "  Cell  Phone ", "o", ("foreground", "cell  phone"), "retry Q3"),
]


@pytest.mark.parametrize(("presence", "name", "layer", "expected"), [(*row[:3], row[3]) for row in ROWS])
def test_reference_reads_as_the_original(presence: str, name: str, layer: str, expected: object) -> None:
    read = (reference_layer(layer), reference_name(name)) if reference_presence(presence) else DROPPED
    assert read == expected


@pytest.mark.parametrize(("presence", "name", "layer", "expected"), [(*row[:3], row[4]) for row in ROWS])
def test_strict_asks_again_where_the_original_guesses(presence: str, name: str, layer: str, expected: object) -> None:
    assert _strict(presence, name, layer) == expected


def test_strict_keeps_the_name_while_question_3_is_asked_again() -> None:
    assert _strict("Yes", "  Cell  Phone ", "o") == "retry Q3"
    assert _strict("Yes", "  Cell  Phone ", "Foreground") == ("foreground", "cell phone")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("yes", "Yes"),
        ('"Yes"', "Yes"),
        ("**Unsure**", "Unsure"),
        ("No.\n", "No"),
        ("no object", "No"),
        ("Yes and no", None),
        ("Yes/No", None),
        ("unknown", None),
        ("I cannot tell", None),
        ("Not sure", None),
        ("Yes, but not in colour", None),
        ("yesterday", None),
        ("Yes, I know it", None),
        (" ", "Unsure"),
    ],
)
def test_choice_needs_one_allowed_word_and_no_denial(raw: str, expected: str | None) -> None:
    assert strict_choice(raw, PRESENCE_ANSWERS) == expected


@pytest.mark.parametrize("raw", ["It is not in the foreground", "foreground or background", "It isn't background"])
def test_layer_is_asked_again_when_denied_or_undecided(raw: str) -> None:
    assert strict_choice(raw, LAYER_ANSWERS) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("The Fire Hydrant!", "fire hydrant"),
        ("“skateboard”", "skateboard"),
        ("`T-Shirt`", "t-shirt"),
        ("an  apple .", "apple"),
        ("traveler's bag", "traveler's bag"),
        ("Salt & Pepper", "salt & pepper"),
        ("Trash can", "trash can"),
        ("Straßenbahn", "straßenbahn"),
        ("the", None),
        ("?", None),
        ("-", None),
        ("It is zebra", None),
        ("This is a dog", None),
        ("A man riding a horse", None),
        ("Dog, cat", None),
        ("dog/cat", None),
        ("Mouse (computer)", None),
        ("Dog. Cat.", None),
        ("name: dog", None),
        ("dog\nIt runs", None),
        ("<|im_end|>", None),
        ("x" * 41, None),
    ],
)
def test_name_is_plain_or_asked_again(raw: str, expected: str | None) -> None:
    assert strict_name(raw) == expected


@given(st.text(max_size=60))
def test_any_answer_gives_a_usable_name_or_none(raw: str) -> None:
    name = strict_name(raw)
    if name is not None:
        assert 0 < len(name) <= MAX_NAME_CHARS
        assert len(name.split(" ")) <= MAX_NAME_WORDS
        assert name == " ".join(name.split())


@given(st.text(max_size=30), st.sampled_from([PRESENCE_ANSWERS, LAYER_ANSWERS]))
def test_an_exact_choice_survives_any_case_and_padding(space: str, choices: tuple[str, ...]) -> None:
    around = "".join(char for char in space if not char.isalnum() and char != "_")
    for choice in choices:
        assert strict_choice(f"{around}{choice.upper()}{around}", choices) == choice


def _strict(presence: str, name: str, layer: str) -> object:
    seen = strict_choice(presence, PRESENCE_ANSWERS)
    if seen is None:
        return "retry Q1"
    if seen != "Yes":
        return DROPPED
    plain = strict_name(name)
    if plain is None:
        return "retry Q2"
    where = strict_choice(layer, LAYER_ANSWERS)
    return "retry Q3" if where is None else (where.lower(), plain)
