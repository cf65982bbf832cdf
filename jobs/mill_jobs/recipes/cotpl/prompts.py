"""The three questions of CoT-PL, in our own words, as versioned data.

A trained demo model knows this exact wording: change a word and the digest test names the retraining command.
Source: specs/cotpl.md 1.6 (the content of each question).
"""

import hashlib
import json
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mill_shared.errors import ConfigError

PRESENCE_ANSWERS = ("Yes", "No", "Unsure")
LAYER_ANSWERS = ("Foreground", "Background")


class Prompts(BaseModel):
    """One wording of the questions. The picture always comes before the text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: str = Field(min_length=1)
    """Name of the wording, stored with every record."""
    presence: str = Field(min_length=1)
    """Question 1. Allowed answers: Yes, No, Unsure."""
    name: str = Field(min_length=1)
    """Question 2. The answer is the object's name in one or two words."""
    name_again: str = Field(min_length=1)
    """Second wording of question 2, used once when the first answer is unusable."""
    layer: str
    """Question 3. Allowed answers: Foreground, Background. `{name}` becomes the answer to question 2."""

    @field_validator("layer")
    @classmethod
    def _names_the_object(cls, value: str) -> str:
        if "{name}" not in value:
            raise ValueError("question 3 must contain {name}, the place of the object's name")
        return value

    def digest(self) -> str:
        """SHA-256 over the texts, as hex."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML file with the fields of this class.

        Raises:
            ConfigError: the file cannot be read, or a field is missing, unknown or empty.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"prompts file {path}: {error}") from error


DEFAULT_PROMPTS = Prompts(
    version="labelmill-1",
    presence=(
        "Part of this picture is sharp and in colour; everything else is grey, blurred or black. "
        "Decide whether the sharp, coloured part shows at least one object that you can clearly see. "
        "Pay no attention to grey or blurred areas.\n"
        "A dog in sharp colour: Yes. Nothing but grey, blurred shapes: No. An object that is cut off or hard to make "
        "out: Unsure.\n"
        "Reply with a single word: Yes, No or Unsure."
    ),
    name=(
        "Part of this picture is sharp and in colour; everything else is grey, blurred or black. "
        "Name the object in the sharp, coloured part. Pay no attention to grey or blurred areas. "
        "Always give your best guess, in one or two words, and do not describe the scene.\n"
        "Someone rides a board with wheels, the board in colour: Skateboard. A striped animal stands in grass: Zebra. "
        "A bag in colour on a blurred street: Backpack.\n"
        "Reply with the name alone."
    ),
    name_again=(
        "Look only at the coloured part of this picture. What kind of thing is it? "
        "Reply with one common noun of one or two words and nothing else."
    ),
    layer=(
        "Part of this picture is sharp and in colour; everything else is grey, blurred or black. "
        "The sharp, coloured part was named: {name}. Decide whether it is foreground or background. "
        "Judge by what is in focus and by the role that such a thing usually plays. "
        "Foreground: people, animals, vehicles and other things of interest. "
        "Background: sky, grass, trees, mountains, flowers and the like.\n"
        "A dog before a blurred park: Foreground. Sky: Background. A tree behind a person: Background.\n"
        "Reply with a single word: Foreground or Background."
    ),
)
