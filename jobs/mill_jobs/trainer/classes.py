"""The class list of a final: the one artefact that weights, configs and embeddings are derived from."""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from mill_shared.coco import CocoBase, CocoCategory
from mill_shared.errors import ConfigError

BACKGROUND_WEIGHT = 0.7
"""Weight of the background in the classification loss. Source: specs/cotpl.md 5.1."""
PSEUDO_SUPERCATEGORY = "pseudo"
"""`supercategory` of a new category. Source: specs/cotpl.md 2.3."""

Origin = Literal["base", "novel", "extra"]


class ClassEntry(msgspec.Struct, frozen=True):
    """One class, in the trainer's order."""

    name: str
    category_id: int
    origin: Origin
    """`base`: its annotations come from the base file; `novel`: another one of the taxonomy; `extra`: brought by the
    labels."""
    weight: int
    """1 where the class is trained, else 0. Annotated classes always have 1."""
    boxes: int
    """Pseudo-labels written."""
    images: int
    """Images with such a pseudo-label."""


class ClassList(msgspec.Struct, frozen=True):
    """classes.json."""

    classes: tuple[ClassEntry, ...]
    """The taxonomy in its order, then the extra classes in the order of selection."""
    taxonomy: tuple[str, ...]
    base: tuple[str, ...]
    background_weight: float = BACKGROUND_WEIGHT

    @property
    def extras(self) -> tuple[ClassEntry, ...]:
        """The classes that the labels brought."""
        return tuple(entry for entry in self.classes if entry.origin == "extra")

    @property
    def new_categories(self) -> tuple[CocoCategory, ...]:
        """The categories that a COCO file needs beside those of the taxonomy."""
        return tuple(CocoCategory(entry.category_id, entry.name, PSEUDO_SUPERCATEGORY) for entry in self.extras)

    @property
    def class_weight(self) -> list[float]:
        """Weight of each class and, last, of the background. Source: specs/cotpl.md 5.1."""
        return [*(entry.weight for entry in self.classes), self.background_weight]

    def to_json(self) -> bytes:
        """Return the text of classes.json."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @classmethod
    def from_json(cls, data: bytes, name: str = "classes.json") -> "ClassList":
        """Read classes.json.

        Raises:
            ConfigError: it is not one.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{name}: not a class list: {error}") from error


class Weights(msgspec.Struct, frozen=True):
    """weights.json: what the trainer's config holds. Source: specs/cotpl.md 5.1."""

    num_pls: int
    """Number of extra classes."""
    num_classes: int
    class_weight: list[float]
    extra_classes: list[str]

    def to_json(self) -> bytes:
        """Return the text of weights.json."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)


def make_classes(
    base: CocoBase | None, selected: Sequence[str], written: Mapping[str, tuple[int, int]] | None = None
) -> ClassList:
    """Lay out the classes and their weights. Source: specs/cotpl.md 3, stage 6, and 8.6.

    Names of the taxonomy keep their category ids; the others get new ones behind the largest. A class has weight 1 if
    it is a base class or selected, else 0; without base classes every weight is 1.

    Args:
        base: the known classes.
        selected: names of the classes that the labels train, in class order.
        written: name -> (pseudo-labels, images with one).

    Raises:
        ConfigError: a name is selected twice.
    """
    twice = [name for name in dict.fromkeys(selected) if list(selected).count(name) > 1]
    if twice:
        raise ConfigError(f"classes: listed twice: {', '.join(twice)}")
    categories = () if base is None else base.categories
    base_names = () if base is None else base.base
    counts = written or {}
    last = max((category.id for category in categories), default=0)
    taxonomy = tuple(category.name for category in categories)
    entries = [
        ClassEntry(
            category.name,
            category.id,
            "base" if category.name in base_names else "novel",
            int(not base_names or category.name in base_names or category.name in selected),
            *counts.get(category.name, (0, 0)),
        )
        for category in categories
    ]
    extras = [name for name in selected if name not in taxonomy]
    entries += [
        ClassEntry(name, last + number, "extra", 1, *counts.get(name, (0, 0))) for number, name in enumerate(extras, 1)
    ]
    return ClassList(tuple(entries), taxonomy, base_names)


def make_weights(classes: ClassList) -> Weights:
    """Return what the trainer's config holds."""
    extras = [entry.name for entry in classes.extras]
    return Weights(len(extras), len(classes.classes), classes.class_weight, extras)


def printed_classes(names: Sequence[str]) -> str:
    """Return what the original's stage 3 prints. Source: specs/cotpl.md 2.2."""
    return f"{list(names)}\n"


def printed_weights(classes: ClassList) -> str:
    """Return what the original's stage 6 prints. Source: specs/cotpl.md 2.2."""
    extras = [entry.name for entry in classes.extras]
    weights = [entry.weight for entry in classes.classes if entry.origin != "extra"]
    return f"Extra COCO classes: {extras}\nClass weights: {weights}\n"
