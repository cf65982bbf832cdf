"""From raw names to class names: normalisation, synonyms, exclusion. English, as the prompts are."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

COTPL_64 = (
    "dog", "knife", "fish", "stick", "cup", "elephant", "box", "cat", "lamp", "airplane", "house", "umbrella", "pen",
    "camera", "desk", "plate", "table", "door", "gun", "cell phone", "cow", "cake", "plane", "shoe", "skateboard",
    "phone", "bus", "light", "wine glass", "cabinet", "traffic light", "cloth", "keyboard", "window", "wall", "bone",
    "hand", "sword", "triangle", "worm", "bridge", "shirt", "pillow", "stone", "square", "fruit", "tennis racket",
    "computer", "ship", "snake", "fire hydrant", "sink", "bread", "stop sign", "tomato", "couch", "arm", "basket",
    "bathroom", "bat", "tennis player", "leg", "chicken", "sign",
)  # fmt: skip
"""The classes that the authors shipped, in their order. Source: specs/cotpl.md 4."""

_ARTICLES = ("a", "an", "the")
_AROUND = re.compile(r"^[\s\"'`*\u2018\u2019\u201c\u201d]+|[\s\"'`*\u2018\u2019\u201c\u201d.,;:!?\u2026]+$")

_IRREGULAR = {
    "axes": "axe", "brownies": "brownie", "buses": "bus", "calves": "calf", "cds": "cd", "children": "child",
    "cookies": "cookie", "dice": "die", "elves": "elf", "feet": "foot", "fishermen": "fisherman", "geese": "goose",
    "halves": "half", "hooves": "hoof", "knives": "knife", "leaves": "leaf", "loaves": "loaf", "men": "man",
    "mice": "mouse", "movies": "movie", "neckties": "necktie", "oxen": "ox", "people": "person", "persons": "person",
    "pies": "pie", "policemen": "policeman", "quizzes": "quiz", "scarves": "scarf", "shelves": "shelf",
    "smoothies": "smoothie", "snowmen": "snowman", "teeth": "tooth", "thieves": "thief", "ties": "tie", "tvs": "tv",
    "veggies": "veggie", "wives": "wife", "wolves": "wolf", "women": "woman", "zombies": "zombie",
}  # fmt: skip
_SAME = frozenset(
    (
        "armed", "asbestos", "atlas", "barracks", "biceps", "binoculars", "bleachers", "blinds", "canvas", "ceramics",
        "chaos", "chess", "christmas", "clothes", "comics", "cosmos", "crossroads", "drapes", "electronics", "fries",
        "gas", "glasses", "goggles", "graphics", "gps", "greens", "gymnastics", "headphones", "headquarters", "jeans",
        "leggings", "lens", "news", "overalls", "pajamas", "pants", "pliers", "pyjamas", "rhinoceros", "scissors",
        "series", "shorts", "species", "stairs", "sunglasses", "eyeglasses", "tongs", "trousers", "tweezers", "yes",
    )
)  # fmt: skip
"""Words in s that are one thing, or whose singular is another thing."""
_DROP_ES = frozenset(
    (
        "atlases", "buffaloes", "canvases", "dominoes", "gases", "heroes", "irises", "lenses", "mangoes", "mosquitoes",
        "potatoes", "rhinoceroses", "tomatoes", "trellises", "volcanoes",
    )
)  # fmt: skip
_KEEP_E = re.compile(
    r"(house|blouse|cause|clause|excuse|fuse|pause|spouse|mouse|ache|cache|avalanche|moustache|quiche)s$"
)


def singular(word: str) -> str:
    """Return the singular of a lower-case word where it is safe to tell, else the word."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")) or word in _SAME:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y" if len(word) > 4 else word[:-1]
    if not _KEEP_E.search(word) and (word in _DROP_ES or word.endswith(("ches", "shes", "sses", "xes", "uses"))):
        return word[:-2]
    return word[:-1]


def _plain(label: str) -> str:
    """Lower case, one space between words, without what surrounds a name: quotes, final punctuation, an article."""
    text = unicodedata.normalize("NFKC", label).lower().replace("_", " ")
    words = _AROUND.sub("", text).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in _ARTICLES else words)


def _single(name: str, known: Mapping[str, str]) -> str:
    """Singular of the last word, unless the name is known as it is or its plain stem is (`wine glasses`)."""
    if not name or name in known:
        return name
    head, space, last = name.rpartition(" ")
    for ending in ("es", "s"):
        stem = head + space + last.removesuffix(ending)
        if last.endswith(ending) and stem in known:
            return stem
    return head + space + singular(last)


def normalise_names(labels: Iterable[str], known: Sequence[str], synonyms: Mapping[str, str]) -> dict[str, str]:
    """Say what class name each label means.

    Args:
        labels: raw answers.
        known: names that are kept in their own spelling, plurals too (`skis`): the taxonomy, a list of classes.
        synonyms: name -> name that it counts as; both sides may be in any form.

    Returns:
        Label -> name; empty where nothing is left of the label.
    """
    spelling = {_plain(name): name for name in reversed(known)}
    targets = {_single(_plain(name), spelling): _single(_plain(target), spelling) for name, target in synonyms.items()}
    found = {}
    for label in labels:
        name = _single(_plain(label), spelling)
        name = targets.get(name, name)
        found[label] = spelling.get(name, name)
    return found


def exclusions(names: Iterable[str], words: Sequence[str], by: Literal["word", "substring", "exact"]) -> dict[str, str]:
    """Return the names that are left out, each with the first of the words for which it is.

    Args:
        names: class names; for `word` in normal form.
        words: what to look for, may be several words each.
        by: `word`: its words occur in the name one after another (`man` in `old man`, not in `human`); `substring`: it
            occurs anywhere (the original's rule); `exact`: it is the name. Source: specs/cotpl.md 3, stage 2.
    """
    spaced = [(word, f" {_single(_plain(word), {})} ") for word in words]
    found = {}
    for name in names:
        match by:
            case "substring":
                hit = next((word for word in words if word in name), None)
            case "exact":
                hit = name if name in words else None
            case "word":
                text = f" {_plain(name).replace('-', ' ')} "
                hit = next((word for word, inside in spaced if inside in text), None)
        if hit is not None:
            found[name] = hit
    return found
