"""Texts that CLIP is asked about: the public ViLD prompts and the background groups. No torch.

The 63 templates come from the Apache-2.0 release of ViLD (google-research, ViLD_demo).
Source: specs/vlplm.md 1.2, which gives their order and check values.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

ENSEMBLE: Final = (
    "There is {article} {name} in the scene.",
    "There is the {name} in the scene.",
    "a photo of {article} {name} in the scene.",
    "a photo of the {name} in the scene.",
    "a photo of one {name} in the scene.",
    "itap of {article} {name}.",
    "itap of my {name}.",
    "itap of the {name}.",
    "a photo of {article} {name}.",
    "a photo of my {name}.",
    "a photo of the {name}.",
    "a photo of one {name}.",
    "a photo of many {name}.",
    "a good photo of {article} {name}.",
    "a good photo of the {name}.",
    "a bad photo of {article} {name}.",
    "a bad photo of the {name}.",
    "a photo of a nice {name}.",
    "a photo of the nice {name}.",
    "a photo of a cool {name}.",
    "a photo of the cool {name}.",
    "a photo of a weird {name}.",
    "a photo of the weird {name}.",
    "a photo of a small {name}.",
    "a photo of the small {name}.",
    "a photo of a large {name}.",
    "a photo of the large {name}.",
    "a photo of a clean {name}.",
    "a photo of the clean {name}.",
    "a photo of a dirty {name}.",
    "a photo of the dirty {name}.",
    "a bright photo of {article} {name}.",
    "a bright photo of the {name}.",
    "a dark photo of {article} {name}.",
    "a dark photo of the {name}.",
    "a photo of a hard to see {name}.",
    "a photo of the hard to see {name}.",
    "a low resolution photo of {article} {name}.",
    "a low resolution photo of the {name}.",
    "a cropped photo of {article} {name}.",
    "a cropped photo of the {name}.",
    "a close-up photo of {article} {name}.",
    "a close-up photo of the {name}.",
    "a jpeg corrupted photo of {article} {name}.",
    "a jpeg corrupted photo of the {name}.",
    "a blurry photo of {article} {name}.",
    "a blurry photo of the {name}.",
    "a pixelated photo of {article} {name}.",
    "a pixelated photo of the {name}.",
    "a black and white photo of the {name}.",
    "a black and white photo of {article} {name}.",
    "a plastic {name}.",
    "the plastic {name}.",
    "a toy {name}.",
    "the toy {name}.",
    "a plushie {name}.",
    "the plushie {name}.",
    "a cartoon {name}.",
    "the cartoon {name}.",
    "an embroidered {name}.",
    "the embroidered {name}.",
    "a painting of the {name}.",
    "a painting of a {name}.",
)

BACKGROUND: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "sky": (
            "the sky", "a clear blue sky", "a cloudy sky", "an overcast grey sky", "the sky at sunset",
            "the dark night sky",
        ),
        "water surface": (
            "a water surface", "calm water", "the surface of the sea", "waves on open water", "the water of a lake",
            "the water of a river",
        ),
        "vegetation": (
            "vegetation", "green grass", "a mown lawn", "dense leaves", "a forest in the distance", "bushes and shrubs",
        ),
        "paved ground": (
            "paved ground", "an asphalt road", "a concrete floor", "an empty street", "a sidewalk of stone",
            "the tiles of a floor",
        ),
        "plain wall": (
            "a plain wall", "a white wall", "a brick wall", "a concrete wall", "a painted wall", "an empty wall",
        ),
    }
)  # fmt: skip
"""Background group -> its prompts; the order is that of the rows. Source: specs/cotpl.md 5.2 names the groups and how
many prompts each has; the prompts are our own."""


def ensemble_prompts(name: str) -> tuple[str, ...]:
    """Return the 63 prompts of a name that is put in as it is, as VL-PLM asks. Source: specs/vlplm.md 1.2."""
    return _expand(name, name)


def class_prompts(name: str) -> tuple[str, ...]:
    """Return the 63 prompts of a class, as CoT-PL asks. Source: specs/cotpl.md 5.2.

    The name is cleaned, the article is that of the name as it came, and what begins with an "a" or with "the" becomes
    a sentence.
    """
    cleaned = name.replace("_", " ").replace("/", " or ").lower().rstrip(".")
    return tuple(
        f"This is {prompt}" if prompt.startswith(("a", "the")) else prompt for prompt in _expand(cleaned, name)
    )


def _expand(name: str, original: str) -> tuple[str, ...]:
    # Lower case alone, so that "Apple" gets an "a": the reference does so.
    article = "an" if original.startswith(("a", "e", "i", "o", "u")) else "a"
    return tuple(template.format(article=article, name=name) for template in ENSEMBLE)
