import msgspec
import pytest

from mill_jobs.recipes.cotpl.names import COTPL_64
from mill_jobs.trainer.classes import ClassList, make_classes, make_weights, printed_classes, printed_weights
from mill_shared.coco import CocoBase, CocoCategory, open_base
from mill_shared.errors import ConfigError

COCO_IDS = [
    *range(1, 12),
    *range(13, 26),
    27,
    28,
    *range(31, 45),
    *range(46, 66),
    67,
    70,
    *range(72, 83),
    *range(84, 91),
]
"""Source: specs/cotpl.md 4, category ids in brackets."""
BASE_ZEROS = [
    4, 5, 9, 10, 11, 12, 15, 16, 19, 20, 25, 27, 31, 32, 34, 35, 36, 38, 40, 41, 43, 52, 55, 57, 58, 60, 66, 67, 71, 76,
    77, 78,
]  # fmt: skip
"""Source: specs/cotpl.md 4, base weight vector."""
SEED_ZEROS = [12, 27, 31, 32, 34, 35, 52, 58, 60, 76, 77, 78]
"""Source: specs/cotpl.md 4, zeros left."""
SEED_EXTRAS = (
    "['fish', 'stick', 'box', 'lamp', 'house', 'pen', 'camera', 'desk', 'plate', 'table', 'door', 'gun', 'plane', "
    "'shoe', 'phone', 'light', 'cabinet', 'cloth', 'window', 'wall', 'bone', 'hand', 'sword', 'triangle', 'worm', "
    "'bridge', 'shirt', 'pillow', 'stone', 'square', 'fruit', 'computer', 'ship', 'snake', 'bread', 'tomato', 'arm', "
    "'basket', 'bathroom', 'bat', 'tennis player', 'leg', 'chicken', 'sign']"
)
"""Source: specs/cotpl.md 4: the 64-list without COCO's names, in its order."""


def coco() -> CocoBase:
    known = open_base(None, "coco-80", "ov-coco-48")
    assert known is not None
    categories = tuple(
        CocoCategory(id_, category.name) for id_, category in zip(COCO_IDS, known.categories, strict=True)
    )
    return CocoBase(categories, known.base)


def base_vector(*ones: int) -> list[int]:
    return [0 if index in BASE_ZEROS and index not in ones else 1 for index in range(80)]


def test_weights_of_three_names() -> None:
    """Source: specs/cotpl.md 8.6."""
    classes = make_classes(coco(), ("dog", "fish", "sign"))
    weights = make_weights(classes)
    assert weights.extra_classes == ["fish", "sign"]
    assert (weights.num_pls, weights.num_classes, len(weights.class_weight)) == (2, 82, 83)
    assert weights.class_weight[:80] == base_vector(16)
    assert sum(weights.class_weight[:80]) == 49
    assert weights.class_weight[80:] == [1, 1, 0.7]
    assert [(entry.category_id, entry.name) for entry in classes.extras] == [(91, "fish"), (92, "sign")]


def test_an_empty_list_gives_the_base_vector() -> None:
    """Source: specs/cotpl.md 8.6."""
    weights = make_weights(make_classes(coco(), ()))
    assert (weights.num_pls, weights.num_classes, len(weights.class_weight)) == (0, 80, 81)
    assert weights.class_weight == [*base_vector(), 0.7]
    assert weights.extra_classes == []


def test_the_shipped_list_prints_the_seeds_two_lines() -> None:
    """Source: specs/cotpl.md 4 and 8.5, stage 6."""
    expected = [0 if index in SEED_ZEROS else 1 for index in range(80)]
    assert sum(expected) == 68
    printed = printed_weights(make_classes(coco(), COTPL_64))
    assert printed == f"Extra COCO classes: {SEED_EXTRAS}\nClass weights: {expected}\n"


def test_the_seeds_list_with_pole_gives_45_extras_and_the_same_weights() -> None:
    """Source: specs/cotpl.md 8.6."""
    at = COTPL_64.index("cat")
    seed = make_classes(coco(), (*COTPL_64[:at], "pole", *COTPL_64[at:]))
    assert len(seed.extras) == 45
    assert len(seed.class_weight) == 126
    assert seed.class_weight[:80] == make_classes(coco(), COTPL_64).class_weight[:80]


def test_new_ids_follow_the_largest_in_class_order() -> None:
    """Source: specs/cotpl.md 8.5, stage 5."""
    extras = make_classes(coco(), COTPL_64).new_categories
    assert [category.id for category in extras] == list(range(91, 135))
    names = {category.id: category.name for category in extras}
    assert (names[91], names[92], names[93], names[133], names[134]) == ("fish", "stick", "box", "chicken", "sign")
    assert {category.supercategory for category in extras} == {"pseudo"}
    assert msgspec.json.encode(extras[0]) == b'{"id":91,"name":"fish","supercategory":"pseudo"}'


def test_names_are_printed_as_python_prints_them() -> None:
    """Source: specs/cotpl.md 2.2."""
    assert printed_classes(("dog", "farmer's hat")) == "['dog', \"farmer's hat\"]\n"
    assert printed_classes(()) == "[]\n"


def test_a_name_twice_is_refused() -> None:
    """Source: specs/cotpl.md 8.6."""
    with pytest.raises(ConfigError, match="listed twice: fish"):
        make_classes(coco(), ("fish", "dog", "fish"))


def test_without_a_base_ids_start_at_one_and_every_weight_is_one() -> None:
    classes = make_classes(None, ("fish", "dog"), {"fish": (5, 3)})
    assert [(entry.category_id, entry.name, entry.weight, entry.boxes) for entry in classes.classes] == [
        (1, "fish", 1, 5), (2, "dog", 1, 0),
    ]  # fmt: skip
    known = open_base(None, ("cat", "dog"), None)
    with_taxonomy = make_classes(known, ("fish", "dog"))
    assert [(entry.category_id, entry.name, entry.weight) for entry in with_taxonomy.classes] == [
        (1, "cat", 1), (2, "dog", 1), (3, "fish", 1),
    ]  # fmt: skip


def test_the_class_list_survives_its_file() -> None:
    classes = make_classes(coco(), ("dog", "fish"), {"fish": (7, 4)})
    assert ClassList.from_json(classes.to_json()) == classes
    with pytest.raises(ConfigError, match=r"classes\.json: not a class list"):
        ClassList.from_json(b"{}")
