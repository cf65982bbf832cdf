import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mill_shared.coco import (
    ANNOTATIONS,
    CATEGORIES,
    IMAGES,
    TEXTS,
    CocoBase,
    CocoCategory,
    CocoCopy,
    Section,
    Slice,
    annotations_per_class,
    iterate_annotations,
    open_base,
    read_categories,
    read_images,
    read_sections,
    scan_coco,
    split_coco,
    xywh_to_xyxy,
    xyxy_to_xywh,
)
from mill_shared.errors import ConfigError
from mill_shared.presets import COCO_80, OV_COCO_48

NASTY = st.text(st.sampled_from('{}[],:" \\/aé漢\n\t\x7f'), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**12) | st.floats(allow_nan=False, allow_infinity=False) | NASTY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NASTY, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def coco_objects(draw: st.DrawFn) -> dict[str, Any]:
    """A COCO object with odd neighbours, in any order of keys."""

    def entries(required: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[list[dict[str, Any]]]:
        odd = st.dictionaries(NASTY, JSON, max_size=2)
        return st.lists(
            st.builds(lambda a, b, flip: {**b, **a} if flip else {**a, **b, **a}, required, odd, st.booleans()),
            max_size=5,
        )

    whole = st.integers(0, 2**40)
    number = st.integers(0, 999) | st.floats(0, 999).map(lambda value: round(value, 2))
    tree = {
        "images": draw(entries(st.fixed_dictionaries({"id": whole, "file_name": NASTY}))),
        "annotations": draw(
            entries(
                st.fixed_dictionaries(
                    {"id": whole, "image_id": whole, "category_id": whole, "bbox": st.tuples(*[number] * 4).map(list)}
                )
            )
        ),
        "categories": draw(entries(st.fixed_dictionaries({"id": whole, "name": NASTY}))),
        **{f"{name}!": value for name, value in draw(st.dictionaries(NASTY, JSON, max_size=2)).items()},
    }
    return {name: tree[name] for name in draw(st.permutations(list(tree)))}


def dumped(draw_indent: int | None, ascii_only: bool, tree: object) -> bytes:
    return json.dumps(tree, indent=draw_indent, ensure_ascii=ascii_only).encode()


ANY_FILE = {
    "tree": coco_objects(),
    "indent": st.sampled_from([None, 0, 1, 3]),
    "ascii_only": st.booleans(),
    "block_bytes": st.sampled_from([1, 2, 7, 64, 4096]),
}
FILES = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@FILES
@given(**ANY_FILE)
def test_slices_hold_what_json_load_finds(
    tmp_path: Path, tree: dict[str, Any], indent: int | None, ascii_only: bool, block_bytes: int
) -> None:
    data = dumped(indent, ascii_only, tree)
    path = tmp_path / "a.json"
    path.write_bytes(data)
    found: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    sections = []
    for piece in read_sections(path, dict.fromkeys(found, TEXTS), block_bytes=block_bytes):
        if isinstance(piece, Section):
            sections.append(piece.name)
            assert json.loads(data[piece.start : piece.end]) == tree[piece.name]
        else:
            assert data[piece.start :].startswith(piece.text)
            assert json.loads(b"[%b]" % piece.text) == [json.loads(bytes(item)) for item in piece.items]
            found[piece.section] += [json.loads(bytes(item)) for item in piece.items]
    assert found == {name: tree[name] for name in found}
    assert sections == list(tree)


@FILES
@given(**ANY_FILE)
def test_scan_counts_what_json_load_finds(
    tmp_path: Path, tree: dict[str, Any], indent: int | None, ascii_only: bool, block_bytes: int
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(dumped(indent, ascii_only, tree))
    found = scan_coco(path, block_bytes=block_bytes)
    annotations = tree["annotations"]
    assert found.image_ids.tolist() == [image["id"] for image in tree["images"]]
    assert [category.name for category in found.categories] == [category["name"] for category in tree["categories"]]
    assert found.ids.tolist() == [item["id"] for item in annotations]
    assert found.image_of.tolist() == [item["image_id"] for item in annotations]
    assert found.category_of.tolist() == [item["category_id"] for item in annotations]
    assert found.boxes_xyxy.tolist() == [list(xywh_to_xyxy(tuple(item["bbox"]))) for item in annotations]


@FILES
@given(**ANY_FILE, keep=st.lists(st.booleans(), min_size=5, max_size=5), added=st.integers(0, 2))
def test_a_copy_changes_nothing_but_what_was_asked(
    tmp_path: Path, tree: dict[str, Any], indent: int | None, ascii_only: bool, block_bytes: int, keep: list[bool],
    added: int,
) -> None:  # fmt: skip
    path = tmp_path / "a.json"
    path.write_bytes(dumped(indent, ascii_only, tree))
    scanned = scan_coco(path, block_bytes=block_bytes)
    chosen = np.array(keep[: len(tree["annotations"])], bool)
    out = io.BytesIO()
    copy = CocoCopy(scanned, out, chosen)
    copy.begin()
    copy.finish([b"", *[b',{"id": 1}'] * added], [CocoCategory(9, "new", "pseudo")] * added)
    expected = {
        **tree,
        "annotations": [item for item, kept in zip(tree["annotations"], chosen, strict=True) if kept]
        + [{"id": 1}] * added,
        "categories": tree["categories"] + [{"id": 9, "name": "new", "supercategory": "pseudo"}] * added,
    }
    assert json.loads(out.getvalue()) == expected
    assert list(json.loads(out.getvalue())) == list(tree)
    if added == 0 and chosen.all():
        assert out.getvalue() == path.read_bytes()


@FILES
@given(tree=coco_objects(), at=st.floats(0, 1, exclude_max=True), block_bytes=st.sampled_from([3, 4096]))
def test_a_cut_file_is_refused(tmp_path: Path, tree: dict[str, Any], at: float, block_bytes: int) -> None:
    data = json.dumps(tree).encode()
    path = tmp_path / "a.json"
    path.write_bytes(data[: int(at * len(data))])
    with pytest.raises(ConfigError, match=r"a\.json"):
        list(read_sections(path, {"annotations": ANNOTATIONS}, block_bytes=block_bytes))


def test_an_object_larger_than_a_block_and_boundaries_in_strings_and_lists(tmp_path: Path) -> None:
    entry = {"id": 1, "name": "a},{b", "parts": [{"id": 5}, {"id": 6}] * 50, "escaped": 'x\\"},{'}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"categories": [entry] * 40, "other": [1, [2, {"a": "]"}]]}))
    slices = [p for p in read_sections(path, {"categories": CATEGORIES}, block_bytes=256) if isinstance(p, Slice)]
    assert sum(len(piece.items) for piece in slices) == 40
    assert len(slices) > 20


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "ends in the middle"),
        ("[1]", "expected {"),
        ('{"annotations": 5}', "annotations is no list"),
        ('{"annotations": {}}', "annotations is no list"),
        ('{"images": []}', "no section annotations"),
        ('{"annotations": [], "annotations": []}', "two sections"),
        ('{"annotations": []} x', "something follows"),
        ('{"annotations": [1, 2]}', "Expected `object`"),
        ('{"annotations": ["a", "b"]}', "Expected `object`"),
        ('{"annotations": [{"id": 1, "image_id": 1, "category_id": 1},]}', "comma"),
        ('{"annotations": [{"id": 1, "image_id": 1, "category_id": 1} {"id": 2}]}', "malformed|expected"),
        (
            '{"annotations": [{"id": "x", "image_id": 1, "category_id": 1}]}',
            r"Expected `int`, got `str` - at `\$\[0\].id`",
        ),
        ('{"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2]}]}', "bbox"),
        ('{"annotations": [{"id": 1, "category_id": 1}]}', "image_id"),
        ('{"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "area": NaN}]}', "malformed"),
    ],
)
def test_what_is_no_coco_file_is_named(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why) as error:
        list(iterate_annotations(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.json: cannot be read: No such file"):
        read_images(tmp_path / "gone.json")


def test_boxes_go_there_and_back() -> None:
    assert xywh_to_xyxy((10, 20, 30, 40)) == (10, 20, 40, 60)
    assert xyxy_to_xywh((10, 20, 40, 60)) == (10, 20, 30, 40)


def annotation(id_: int, image_id: int, category_id: int, **more: object) -> dict[str, object]:
    return {"id": id_, "image_id": image_id, "category_id": category_id, "bbox": [1, 2, 3, 4], **more}


def write_coco(path: Path, **changes: object) -> Path:
    tree = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 64, "height": 48}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [annotation(1, 1, 1), annotation(2, 1, 3), annotation(3, 2, 1, iscrowd=1), annotation(4, 2, 7)],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}],
        **changes,
    }
    path.write_text(json.dumps(tree))
    return path


def test_images_and_categories_are_read(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json")
    assert [(image.id, image.width, image.height) for image in read_images(path)] == [(1, 64, 48), (2, None, None)]
    assert [(category.id, category.name) for category in read_categories(path)] == [
        (1, "person"),
        (3, "dog"),
        (7, "cat"),
    ]
    assert [item.iscrowd for batch in iterate_annotations(path) for item in batch] == [0, 0, 1, 0]


def test_faults_are_counted_and_left_alone(tmp_path: Path) -> None:
    path = write_coco(
        tmp_path / "a.json",
        annotations=[
            annotation(1, 1, 1), annotation(1, 99, 1), annotation(2, 1, 98), annotation(3, 1, 1, bbox=[1, 2, 0, 4]),
            {"id": 4, "image_id": 1, "category_id": 1},
        ],
    )  # fmt: skip
    assert scan_coco(path).faults == {
        "annotations without a bbox": 1,
        "annotations with a box of no width or height": 1,
        "annotations of images that it does not list": 1,
        "annotations of categories that it does not list": 1,
        "annotations with the id of another": 1,
    }


def test_the_digest_is_the_files_own(tmp_path: Path) -> None:
    import hashlib

    path = write_coco(tmp_path / "a.json")
    assert scan_coco(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_base_annotations_are_counted_per_class_and_image(tmp_path: Path) -> None:
    base = open_base(write_coco(tmp_path / "a.json"), None, ("person", "cat"))
    assert base is not None
    assert annotations_per_class(base, None) == {"person": 2, "cat": 1}
    assert annotations_per_class(base, {1}) == {"person": 1}
    assert (base.taxonomy, base.base) == (("person", "dog", "cat"), ("person", "cat"))


def test_without_a_file_known_classes_get_the_ids_from_one() -> None:
    base = open_base(None, "coco-80", "ov-coco-48")
    assert base is not None
    assert base.taxonomy == COCO_80
    assert base.base == OV_COCO_48
    assert [category.id for category in base.categories] == list(range(1, 81))
    assert annotations_per_class(base, None) == {}
    assert open_base(None, None, None) is None
    only_base = open_base(None, None, ("b", "a"))
    assert only_base is not None
    assert [(category.id, category.name) for category in only_base.categories] == [(1, "b"), (2, "a")]


@pytest.mark.parametrize(
    ("changes", "taxonomy", "base_classes", "why"),
    [
        ({}, None, None, "base classes are not set"),
        ({}, None, (), "base classes are not set"),
        ({}, None, ("person", "zebra", "yak"), "not in the categories of .*: zebra, yak"),
        ({}, None, ("person", "person"), "listed twice: person"),
        ({}, ("person", "dog", "dog"), ("person",), "listed twice: dog"),
        ({}, ("person", "dog", "cat", "cow"), ("person",), "it lacks cow"),
        ({}, ("person", "dog"), ("person",), "it also has cat"),
        ({}, ("dog", "person", "cat"), ("person",), "not in the order"),
        ({}, "coco-80", ("person",), "it lacks bicycle, car, motorcycle, airplane, bus and 72 more"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            None,
            ("a",),
            "two categories have one id: 1",
        ),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]},
            None,
            ("a",),
            "two categories have one name: a",
        ),
        ({"categories": [{"id": 2, "name": "a"}, {"id": 1, "name": "b"}]}, None, ("a",), "not in ascending order"),
    ],
)
def test_a_wrong_base_is_named(
    tmp_path: Path, changes: dict[str, object], taxonomy: Any, base_classes: Any, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        open_base(write_coco(tmp_path / "a.json", **changes), taxonomy, base_classes)


def test_base_classes_outside_a_taxonomy_are_named() -> None:
    with pytest.raises(ConfigError, match="not in the taxonomy: zebra"):
        open_base(None, ("dog",), ("zebra",))


def test_split_keeps_images_and_categories_in_both(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json")
    counts = split_coco(path, ("person",), tmp_path / "base.json", tmp_path / "novel.json")
    whole, base, novel = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "base", "novel"))
    assert (counts.base, counts.novel) == (2, 2)
    assert [item["id"] for item in base["annotations"]] == [1, 3]
    assert [item["id"] for item in novel["annotations"]] == [2, 4]
    for part in (base, novel):
        assert {**part, "annotations": None} == {**whole, "annotations": None}


def test_split_refuses_to_overwrite_its_input(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="is the file to be split"):
        split_coco(path, ("person",), path, tmp_path / "novel.json")
    with pytest.raises(ConfigError, match="for both files"):
        split_coco(path, ("person",), tmp_path / "b.json", tmp_path / "b.json")


def test_the_readers_know_their_types(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json", images=[{"id": 1, "width": "wide"}])
    with pytest.raises(ConfigError, match=r"images: Expected `int \| null`, got `str`"):
        list(read_sections(path, {"images": IMAGES}))


def test_a_base_may_be_read_in_another_process(tmp_path: Path) -> None:
    base = open_base(write_coco(tmp_path / "a.json"), None, ("person",))
    assert base is not None
    again: CocoBase = pickle.loads(pickle.dumps(base))
    assert annotations_per_class(again, None) == {"person": 2}
    assert str(pickle.loads(pickle.dumps(ConfigError("a.json: gone")))) == "a.json: gone"
