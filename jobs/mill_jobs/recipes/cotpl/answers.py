"""What raw answers mean, in two readings.

`reference_*` reads as the original does, quirks included. `strict_*` returns None where the answer cannot be relied
on, so that the caller asks again. Source: specs/cotpl.md 1.6 and 8.4.
"""

import re
from collections.abc import Sequence
from typing import Literal

Layer = Literal["foreground", "background"]

MAX_NAME_WORDS = 3
"""Longest name in words. Question 2 asks for one or two."""
MAX_NAME_CHARS = 40
"""Longest name in characters."""

_NEGATION = re.compile(r"\b(?:not|never|neither|nor)\b|n['\u2019]t\b|\bcannot\b", re.IGNORECASE)
_AROUND_NAME = re.compile(r"^[\s\"'`*\u2018\u2019\u201c\u201d]+|[\s\"'`*\u2018\u2019\u201c\u201d.,;:!?\u2026]+$")
_NO_NAME = re.compile(r"[.,;:!?/\\|()\[\]{}<>=*#\"`_\u2026\u201c\u201d]")
_ARTICLES = ("a", "an", "the")
_SENTENCE_WORDS = frozenset(
    ("is", "are", "was", "were", "it", "it's", "its", "this", "that", "that's", "these", "those", "there", "i", "i'm")
)


def reference_presence(raw: str) -> bool:
    """Return whether `yes` occurs anywhere, as in `No, eyes closed`. Source: specs/cotpl.md 1.6."""
    return "yes" in raw.strip().lower()


def reference_name(raw: str) -> str:
    """Return the answer in lower case, stripped and otherwise as it came. Source: specs/cotpl.md 1.6."""
    return raw.strip().lower()


def reference_layer(raw: str) -> Layer:
    """Return foreground for any substring of that word, the empty one too. Source: specs/cotpl.md 1.6."""
    return "foreground" if raw.strip().lower() in "foreground" else "background"


def strict_choice(raw: str, choices: Sequence[str]) -> str | None:
    """Return the choice that the answer names, or None where it names none, several, or denies one.

    Letter case never matters. A choice is named when it stands in the answer as a word of its own (`Yes.`,
    `Answer: Yes`, `The object is in the foreground`). The answer is refused if another choice occurs in it too, even
    within a word (`No, eyes closed` holds `yes`), or if it holds a negation (`not in the foreground`). An empty answer
    means Unsure where that is a choice. Source: specs/cotpl.md 8.4.
    """
    if not raw.strip() and "Unsure" in choices:
        return "Unsure"
    text = raw.casefold()
    occurring = [choice for choice in choices if choice.casefold() in text]
    if len(occurring) != 1 or _NEGATION.search(raw):
        return None
    word = rf"(?<!\w){re.escape(occurring[0].casefold())}(?!\w)"
    return occurring[0] if re.search(word, text) else None


def strict_name(raw: str) -> str | None:
    """Return the answer as a plain name, or None where question 2 is to be asked again.

    Lower case, inner spaces collapsed; surrounding quotes, final punctuation and a leading article are left out. It
    must then be at most 3 words and 40 characters, without the punctuation of lists and clauses, and no sentence.
    Source: specs/cotpl.md 8.4.
    """
    words = _AROUND_NAME.sub("", raw).lower().split()
    if words and words[0] in _ARTICLES:
        words = words[1:]
    name = " ".join(words)
    if not words or len(words) > MAX_NAME_WORDS or len(name) > MAX_NAME_CHARS:
        return None
    if _NO_NAME.search(name) or not any(map(str.isalnum, name)) or not _SENTENCE_WORDS.isdisjoint(words):
        return None
    return name
