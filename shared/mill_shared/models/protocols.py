"""What a recipe may ask of a model. Adapters translate a device's out-of-memory into `DeviceMemoryError`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Masks:
    """Candidate masks of one picture, in the generator's order."""

    masks: NDArray[np.bool_]
    """(N, H, W), image frame."""
    predicted_ious: NDArray[np.float32]
    """(N,), in [0, 1] up to the model's error."""
    stabilities: NDArray[np.float32]
    """(N,), in [0, 1]."""


@dataclass(frozen=True)
class Question:
    """One single-turn question about one picture."""

    picture_rgb: NDArray[np.uint8]
    """(H, W, 3). Questions about one picture share the array, so that it is encoded once."""
    text: str
    choices: tuple[str, ...] | None = None
    """The answer is constrained to these; default: free text."""
    asks: str = ""
    """What the recipe wants to know (e.g. `presence`), for oracles, which cannot read."""
    image_id: int = 0
    """The image that the picture was made from."""
    box_xyxy: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """The region that is asked about: pixels, half-open, labelled frame."""


@dataclass(frozen=True)
class Answer:
    """The raw answer, or why there is none."""

    text: str
    error: str | None = None


class MaskGenerator(Protocol):
    """Makes class-agnostic masks of a whole picture."""

    def generate(self, image_rgb: NDArray[np.uint8], image_id: int) -> Masks:
        """Return the masks of a (H, W, 3) picture; an empty result is no error."""
        ...

    def halve_batch(self) -> bool:
        """Use half of the device memory from now on; False where nothing is left to halve."""
        ...


class ChatModel(Protocol):
    """Answers questions about pictures."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return one answer a question, in order. A fault of one question never costs the others theirs."""
        ...

    def halve_batch(self) -> bool:
        """Use half of the device memory from now on; False where nothing is left to halve."""
        ...
