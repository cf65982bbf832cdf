from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mill_jobs.recipes.cotpl.config import CotplFinalizeConfig
from mill_jobs.recipes.cotpl.names import COTPL_64, exclusions, normalise_names, singular
from mill_shared.presets import COCO_80

EXCLUDED = CotplFinalizeConfig().excluded


def exclusion(name: str, words: tuple[str, ...], by: Literal["word", "substring", "exact"]) -> str | None:
    return exclusions([name], words, by).get(name)


def meaning(label: str, known: tuple[str, ...] = COCO_80, **synonyms: str) -> str:
    return normalise_names([label], known, synonyms)[label]


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("dog.", "dog"), ("a dog", "dog"), ("Dogs", "dog"), ("The  Cell\tPhone!", "cell phone"), ("“fish”", "fish"),
        ("wine_glass", "wine glass"), ("wine glasses", "wine glass"), ("glasses", "glasses"), ("an", "an"),
        ("skis", "skis"), ("scissors", "scissors"), ("pairs of scissors", "pairs of scissors"), ("people", "person"),
        ("women", "woman"), ("fire hydrants", "fire hydrant"), ("knives", "knife"), ("benches", "bench"),
        ("buses", "bus"), ("bus", "bus"), ("donuts", "donut"), ("toothbrushes", "toothbrush"), ("sheep", "sheep"),
        ("mice", "mouse"), ("sandwiches", "sandwich"), ("teddy bears", "teddy bear"), ("", ""), (" . ", ""),
        ("ties", "tie"), ("couches", "couch"), ("vases", "vase"), ("horses", "horse"), ("oranges", "orange"),
    ],
)  # fmt: skip
def test_a_label_means_a_name(label: str, name: str) -> None:
    assert meaning(label) == name


@pytest.mark.parametrize(
    ("plural", "one"),
    [
        ("shoes", "shoe"), ("houses", "house"), ("tomatoes", "tomato"), ("boxes", "box"), ("berries", "berry"),
        ("cookies", "cookie"), ("glass", "glass"), ("gas", "gas"), ("cactus", "cactus"), ("tennis", "tennis"),
        ("cactuses", "cactus"), ("shelves", "shelf"), ("gloves", "glove"), ("sofas", "sofa"), ("pants", "pants"),
        ("lens", "lens"), ("lenses", "lens"), ("keys", "key"), ("dresses", "dress"), ("tvs", "tv"), ("yes", "yes"),
    ],
)  # fmt: skip
def test_plurals_become_singular_where_it_is_safe(plural: str, one: str) -> None:
    assert singular(plural) == one


@pytest.mark.parametrize("name", [*COCO_80, *COTPL_64])
def test_known_names_stay_and_their_plurals_find_them(name: str) -> None:
    known = (*COCO_80, *COTPL_64)
    assert meaning(name, known) == name
    assert meaning(f"{name}s", known) == name


@given(st.text(max_size=20))
def test_normalising_again_changes_nothing_that_is_known(label: str) -> None:
    name = meaning(label)
    assert meaning(name, (*COCO_80, name)) == name


def test_the_spelling_of_the_taxonomy_wins() -> None:
    assert meaning("wine glass", ("Wine_Glass",)) == "Wine_Glass"
    assert meaning("Wine Glasses.", ("Wine_Glass",)) == "Wine_Glass"


def test_synonyms_come_after_normalisation() -> None:
    assert meaning("Planes.", plane="airplane") == "airplane"
    assert meaning("a plane", Planes="the airplanes") == "airplane"
    assert meaning("mobile", mobile="smart phone") == "smart phone"


@pytest.mark.parametrize(
    "name",
    [
        "woman", "human", "mango", "german shepherd", "husky", "skyscraper", "street sign", "street light", "rocket",
        "eggplant", "cauliflower", "wooden spoon", "mountain bike",
    ],
)  # fmt: skip
def test_substrings_hit_as_in_the_original(name: str) -> None:
    """Source: specs/cotpl.md 8.5, keyword hits."""
    assert exclusion(name, EXCLUDED, "substring") is not None
    assert exclusion(name, EXCLUDED, "exact") is None
    assert (exclusion(name, EXCLUDED, "word") is not None) == (name == "mountain bike")


@pytest.mark.parametrize("name", ["men", "people", "lettuce", "banana bread", "salmon", "cars", "dog."])
def test_what_the_original_does_not_move(name: str) -> None:
    """Source: specs/cotpl.md 8.5, not moved."""
    assert exclusion(name, EXCLUDED, "substring") is None


def test_no_base_name_is_excluded_and_of_coco_only_the_potted_plant() -> None:
    """Source: specs/cotpl.md 4, excluded keywords."""
    assert [name for name in COCO_80 if exclusion(name, EXCLUDED, "substring")] == ["potted plant"]
    assert [name for name in COCO_80 if exclusion(name, EXCLUDED, "word")] == ["potted plant"]


def test_whole_words_are_found_anywhere_in_a_name() -> None:
    assert exclusion("old man", EXCLUDED, "word") == "man"
    assert exclusion("palm-tree", EXCLUDED, "word") == "tree"
    assert exclusion("baseball player", EXCLUDED, "word") == "baseball player"
    assert exclusion("baseball", EXCLUDED, "word") is None
    assert exclusion("leaf", ("leaves",), "word") == "leaves"


def test_the_shipped_list() -> None:
    """Source: specs/cotpl.md 4."""
    assert (len(COTPL_64), len(set(COTPL_64))) == (64, 64)
    assert len([name for name in COTPL_64 if name not in COCO_80]) == 44
