"""Plans: ids, order, digests, adoption, refusal."""

import json

import msgspec
import pytest

from mill_shared.errors import AlreadyExists, ConfigError, CorruptError, PlanMismatch
from mill_shared.keys import RunKeys
from mill_shared.plan import (
    ImageRow,
    LabelPass,
    RunPlan,
    assign_ids,
    build_plan,
    compare_identity,
    list_coco_images,
    list_images,
    path_image_id,
    read_images,
    read_passes,
    read_plan,
    write_pass,
    write_plan,
)
from simulation import MemoryStore, image_store, make_plan


def plan_of(images: list[ImageRow], **changes: object) -> RunPlan:
    settings: dict[str, object] = {
        "run": None, "recipe": "cotpl", "identity": {"a": 1}, "content": {"weights": "x"}, "chunk_size": 2,
        "images": images,
    }  # fmt: skip
    return build_plan(**{**settings, **changes})  # type: ignore[arg-type]  # a table of keyword arguments


def test_numeric_names_are_their_own_ids() -> None:
    assert assign_ids(["000000000009.jpg", "sub/25.png"], "auto") == [9, 25]


def test_other_names_get_ids_that_new_images_never_shift() -> None:
    few, more = assign_ids(["b.jpg", "7.jpg"], "auto"), assign_ids(["a.jpg", "b.jpg", "7.jpg"], "auto")
    assert few == more[1:]
    assert few[0] == path_image_id("b.jpg") < 2**53


def test_two_images_with_one_id_are_an_error_that_names_both() -> None:
    with pytest.raises(
        ConfigError, match=r"images 0007\.jpg and 7\.png have one id, 7; rename one or set dataset\.ids"
    ):
        assign_ids(["0007.jpg", "7.png"], "auto")


def test_a_name_that_is_no_number_is_refused_where_numbers_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"image cat\.jpg: the file name is no number"):
        assign_ids(["1.jpg", "cat.jpg"], "stem")


def test_a_folder_is_listed_in_the_order_of_its_names() -> None:
    store = MemoryStore({"b.JPG": b"12", "a/z.jpeg": b"1", ".hidden.jpg": b"", "notes.txt": b"", "a.png": b""})
    found = list_images(store, {".jpg", ".jpeg", ".png"}, "auto")
    assert [(image.key, image.size_bytes) for image in found] == [("a.png", 0), ("a/z.jpeg", 1), ("b.JPG", 2)]


def test_a_folder_without_pictures_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"memory: no pictures there that end in \.jpg"):
        list_images(MemoryStore({"a.png": b""}), {".jpg"}, "auto")


def coco(*images: tuple[int, str]) -> bytes:
    return json.dumps(
        {"annotations": [{}], "images": [{"id": i, "file_name": n, "width": 1} for i, n in images]}
    ).encode()


def test_a_coco_file_gives_images_and_ids() -> None:
    store = MemoryStore({"b.jpg": b"xy", "extra.jpg": b""})
    found = list_coco_images(coco((5, "b.jpg"), (9, "a.jpg")), "train.json", store)
    assert found == [ImageRow(9, "a.jpg", 0, ""), ImageRow(5, "b.jpg", 2, "")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (coco((1, "a.jpg"), (1, "b.jpg")), r"train\.json: images a\.jpg and b\.jpg have one id, 1"),
        (coco((1, "a.jpg"), (2, "a.jpg")), r"train\.json: file a\.jpg is listed twice"),
        (coco(), r"train\.json: its list of images is empty"),
        (b"[]", r"train\.json: not a COCO file with images"),
        (coco((1, "z.jpg")), r"memory: none of the 1 images of train\.json is there, e\.g\. z\.jpg"),
    ],
)
def test_a_faulty_coco_file_is_an_error_that_says_why(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list_coco_images(data, "train.json", MemoryStore({"a.jpg": b"", "b.jpg": b""}))


def test_the_label_digest_covers_images_and_identity() -> None:
    images = [ImageRow(1, "a", 1, "e")]
    same = plan_of(images)
    assert same.label_digest == plan_of(images).label_digest
    assert same.run == f"cotpl-{same.label_digest[:8]}"
    others = [
        plan_of([ImageRow(1, "a", 2, "e")]),
        plan_of([ImageRow(1, "a", 1, "f")]),
        plan_of(images, identity={"a": 2}),
        plan_of(images, content={"weights": "y"}),
    ]
    assert len({plan.label_digest for plan in [same, *others]}) == 5


def test_a_plan_is_made_once_and_then_adopted() -> None:
    store = MemoryStore()
    first = plan_of([ImageRow(1, "a", 1, "")], run="r")
    assert write_plan(store, first, [ImageRow(1, "a", 1, "")]) == first
    later = [ImageRow(1, "a", 1, ""), ImageRow(2, "b", 1, "")]
    assert write_plan(store, plan_of(later, run="r"), later) == first, "the first plan wins"
    assert read_plan(store, "r") == first
    assert [image.key for _, image in read_images(store, first)] == ["a"]


def test_another_identity_is_refused_with_every_difference_named() -> None:
    plan = plan_of([ImageRow(1, "a", 1, "")], run="r", identity={"chunk": 32, "threshold": 0.8})
    compare_identity(plan, {"chunk": 32, "threshold": 0.8}, {"weights": "x"})
    with pytest.raises(
        PlanMismatch, match=r"threshold: 0\.8 in the plan, 0\.7 now; weights \(SHA-256\): 'x' in the plan"
    ):
        compare_identity(plan, {"chunk": 32, "threshold": 0.7}, {"weights": "y"})
    compare_identity(plan, {"chunk": 32, "threshold": 0.8}, None)


def test_a_run_that_was_never_planned_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"run r: no plan in memory; make one with `mill plan`"):
        read_plan(MemoryStore(), "r")


def test_a_damaged_plan_and_a_damaged_image_table_are_corrupt() -> None:
    store = MemoryStore()
    plan = make_plan(store, image_store(3))
    key = RunKeys("sim").images(plan.images_digest)
    store.objects[key] = store.objects[key][:50]
    with pytest.raises(CorruptError, match="image table is missing or damaged"):
        list(read_images(store, plan))
    store.objects[RunKeys("sim").plan] = b"{"
    with pytest.raises(CorruptError, match=r"plan\.json cannot be read"):
        read_plan(store, "sim")


def test_passes_are_read_in_order_and_made_once() -> None:
    store = MemoryStore()
    plan = make_plan(store, image_store(10))
    assert [p.index for p in read_passes(store, plan)] == [0]
    write_pass(store, plan, 1, [7, 3], ["missing"])
    with pytest.raises(AlreadyExists):
        write_pass(store, plan, 1, [7], [])
    passes = read_passes(store, plan)
    assert list(passes[1].rows) == [3, 7]
    assert passes[1].chunks == 1


def test_a_pass_of_another_plan_is_corrupt() -> None:
    store = MemoryStore()
    plan = make_plan(store, image_store(4))
    write_pass(store, msgspec.structs.replace(plan, label_digest="other"), 1, [0], [])
    with pytest.raises(CorruptError, match="belongs to another plan"):
        read_passes(store, plan)


def test_chunks_cut_the_rows_without_gap() -> None:
    label_pass = LabelPass(0, range(10), 4)
    assert [list(label_pass.chunk_rows(chunk)) for chunk in range(label_pass.chunks)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]
    ]  # fmt: skip
