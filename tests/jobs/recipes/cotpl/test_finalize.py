"""The fixed profile, and what holds in both. The original's files are in test_legacy.py."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mill_jobs.recipes.settled as settled_module
from labelled import COCO_CATEGORIES, finalize_records
from mill_jobs.recipes.base import Summary
from mill_jobs.recipes.cotpl.config import CotplFinalizeConfig
from mill_jobs.recipes.cotpl.finalize import scale_mask
from mill_jobs.trainer.classes import ClassList
from mill_shared.coco import CocoBase, open_base
from mill_shared.errors import ConfigError, InvariantError
from mill_shared.geometry import Rle, box_iou, decode_mask, encode_masks, mask_areas
from mill_shared.records import Box, Dropped, ImageRecord, Region, RegionMask, Status

SIZE = (640, 480)
ALL = {"selection": {"by": "count", "count": 1}}


def region(label: str | None, box: Box = (10, 10, 210, 110), fate: str = "foreground", **more: Any) -> Region:
    return Region(box, fate, label=label, score=0.5, **more)


def record(image_id: int, *regions: Region, dropped: tuple[Dropped, ...] = ()) -> ImageRecord:
    return ImageRecord(
        row=image_id - 1, image_id=image_id, key=f"{image_id}.jpg", status="ok" if regions else "empty",
        width=SIZE[0], height=SIZE[1], regions=regions, dropped=dropped,
    )  # fmt: skip


def write_base(path: Path, images: int = 5, annotations: list[dict[str, Any]] | None = None) -> CocoBase:
    tree = {
        "images": [
            {"id": id_, "file_name": f"{id_}.jpg", "width": SIZE[0], "height": SIZE[1]} for id_ in range(1, images + 1)
        ],
        "annotations": annotations or [],
        "categories": COCO_CATEGORIES,
    }
    path.write_text(json.dumps(tree))
    base = open_base(path, None, "ov-coco-48")
    assert base is not None
    return base


def person(id_: int, image_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"id": id_, "image_id": image_id, "category_id": 1, "bbox": bbox, "iscrowd": 0, **more}


@pytest.fixture
def final(tmp_path: Path) -> Callable[..., Any]:
    """Finalize records; returns (summary, instances, regions as dicts, class list)."""

    def run(
        records: list[ImageRecord], base: CocoBase | None = None, *, images: int | None = None, **config: Any
    ) -> tuple[Summary, dict[str, Any], list[dict[str, Any]], ClassList]:
        folder = tmp_path / "final"
        summary = finalize_records(records, CotplFinalizeConfig.model_validate(config), base, folder, images=images)
        check(summary)
        return (
            summary,
            json.loads((folder / "instances.json").read_bytes()),
            pq.read_table(folder / "regions.parquet").to_pylist(),
            ClassList.from_json((folder / "classes.json").read_bytes()),
        )

    return run


def check(summary: Summary) -> None:
    """Source: the contract of `Step`; candidates begin a second chain."""
    for step in summary.steps:
        assert step.entered == sum(step.lost.values()) + step.left, step
        assert all(count > 0 for count in step.lost.values())
    for before, after in zip(summary.steps[1:], summary.steps[2:], strict=False):
        assert after.entered == before.left


def test_names_become_classes_and_boxes_annotations(final: Callable[..., Any]) -> None:
    records = [record(1, region("Dogs."), region("a fish", (0, 0, 100.126, 120))), record(2, region("the dog"))]
    summary, instances, regions, classes = final(records, **ALL)
    assert [(entry.name, entry.category_id, entry.weight, entry.boxes, entry.images) for entry in classes.classes] == [
        ("dog", 1, 1, 2, 2), ("fish", 2, 1, 1, 1),
    ]  # fmt: skip
    assert instances["categories"] == [
        {"id": 1, "name": "dog", "supercategory": "pseudo"}, {"id": 2, "name": "fish", "supercategory": "pseudo"},
    ]  # fmt: skip
    assert instances["images"] == [
        {"id": id_, "file_name": f"{id_}.jpg", "width": 640, "height": 480} for id_ in (1, 2)
    ]
    dog, fish = [10, 10, 200, 100], [0, 0, 100.13, 120]
    assert instances["annotations"] == [
        {"id": id_, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": 0, "score": 0.5}
        for id_, image, category, bbox, area in [(1, 1, 1, dog, 20000), (2, 1, 2, fish, 12015.6), (3, 2, 1, dog, 20000)]
    ]
    columns = ("row", "region", "label", "name", "fate", "annotation_id")
    assert [tuple(row[name] for name in columns) for row in regions] == [
        (0, 0, "Dogs.", "dog", "kept", 1), (0, 1, "a fish", "fish", "kept", 2), (1, 0, "the dog", "dog", "kept", 3),
    ]  # fmt: skip
    assert [row.name for row in summary.classes] == ["dog", "fish"]


def test_every_fate_has_its_reason(final: Callable[..., Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.json", annotations=[person(5, 1, [300, 300, 100, 100])])
    records = [
        record(
            1,
            region("people"), region("old man"), region(" . "), region("fish"), region("unicorn"),
            region("dog", (305, 300, 400, 400)), region("dog", (640, 0, 700, 100)), region("dog"),
            region("sky", fate="background"), region(None, fate="absent", reason="no"),
            region(None, fate="undecided", reason="parse_name"),
            dropped=(Dropped((0, 0, 1, 1), 0.9, "small"), Dropped((0, 0, 1, 1), 0.1, "low_score")),
        ),
        record(2, region("fish"), region("dog")),
        record(3),
        ImageRecord(row=3, image_id=4, key="4.jpg", status="failed", reason="decode"),
    ]  # fmt: skip
    summary, _, regions, _ = final(records, base, images=5, selection={"by": "count", "count": 2})
    assert [(row["label"], row["fate"], row["reason"]) for row in regions if row["row"] == 0] == [
        ("people", "base_class", None), ("old man", "excluded", "man"), (" . ", "excluded", "no name"),
        ("fish", "kept", None), ("unicorn", "not_selected", None), ("dog", "base_duplicate", None),
        ("dog", "degenerate", None), ("dog", "kept", None), ("sky", "background", None), (None, "absent", "no"),
        (None, "undecided", "parse_name"),
    ]  # fmt: skip
    steps = {step.name: step for step in summary.steps}
    assert steps["images with regions"].lost == {"missing": 1, "empty": 1, "failed (decode)": 1}
    assert steps["asked"].lost == {"small": 1, "low_score": 1}
    assert steps["foreground"].lost == {"background": 1, "absent (no)": 1, "undecided (parse_name)": 1}
    assert steps["not a base class"].lost == {"base_class": 1, "excluded": 2}
    assert steps["of a class"].lost == {"not_selected": 1}
    assert steps["written"].lost == {"base_duplicate": 1, "degenerate": 1}
    assert steps["written"].left == 4
    assert {row.name: (row.kept, row.why) for row in summary.classes} == {
        "dog": (True, "2 written"),
        "fish": (True, "2 written"),
        "person": (False, "base class"),
        "": (False, "excluded: no name"),
        "old man": (False, "excluded: man"),
        "unicorn": (False, "under 2 boxes"),
    }


def test_ids_continue_behind_the_base_file(final: Callable[..., Any], tmp_path: Path) -> None:
    """Source: specs/cotpl.md 2.3 and 3, stage 5."""
    records = [record(1, region("fish"), region("cat"))]
    _, instances, _, classes = final(records, write_base(tmp_path / "base.json"), **ALL)
    assert [item["id"] for item in instances["annotations"]] == [909000554146, 909000554147]
    assert {item["category_id"] for item in instances["annotations"]} == {91, 17}
    assert [category["id"] for category in instances["categories"]] == [*(c["id"] for c in COCO_CATEGORIES), 91]
    assert len(classes.classes) == 81


def test_a_larger_annotation_id_in_the_base_file_moves_the_start(final: Callable[..., Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.json", annotations=[person(909000554200, 1, [0, 0, 9, 9])])
    _, instances, _, _ = final([record(1, region("fish"))], base, **ALL)
    assert [item["id"] for item in instances["annotations"]] == [909000554200, 909000554201]


def test_only_base_annotations_stay_and_the_others_are_counted(final: Callable[..., Any], tmp_path: Path) -> None:
    annotations = [
        person(1, 1, [0, 0, 9, 9]), person(2, 1, [0, 0, 0, 9]), person(3, 1, [0, 0, 9, 9], category_id=18),
        person(4, 2, [0, 0, 9, 9], category_id=17), person(5, 2, [0, 0, 9, 9], category_id=18),
        person(6, 2, [0, 0, 9, 9], category_id=555),
    ]  # fmt: skip
    summary, instances, _, _ = final(
        [record(1, region("fish"))], write_base(tmp_path / "b.json", annotations=annotations)
    )
    assert [item["id"] for item in instances["annotations"]] == [1, 2]
    notes = "\n".join(summary.notes)
    assert "2 annotations of 48 base classes kept" in notes
    assert "4 annotations of other classes left out: dog 2, cat 1, category 555 1" in notes
    assert "1 annotations with a box of no width or height; left as they are" in notes
    assert "1 annotations of categories that it does not list" in notes


def test_crowds_count_by_the_covered_share(final: Callable[..., Any], tmp_path: Path) -> None:
    annotations = [person(1, 1, [0, 0, 600, 400], iscrowd=1), person(2, 2, [0, 0, 600, 400])]
    records = [record(1, region("dog")), record(2, region("dog"))]
    _, _, regions, _ = final(records, write_base(tmp_path / "base.json", annotations=annotations), **ALL)
    assert [row["fate"] for row in regions] == ["base_duplicate", "kept"]


def test_the_duplicate_test_can_be_switched_off(final: Callable[..., Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.json", annotations=[person(1, 1, [10, 10, 200, 100])])
    _, _, regions, _ = final([record(1, region("dog"))], base, base_duplicate_iou=1, **ALL)
    assert [row["fate"] for row in regions] == ["kept"]


def test_labels_on_images_that_the_base_file_lacks_are_refused(final: Callable[..., Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.json", images=1)
    records = [record(1, region("dog")), record(2, region("dog")), record(3, region(None, fate="absent"))]
    with pytest.raises(InvariantError, match=r"does not list 1 images that have pseudo-labels, e\.g\. 2"):
        final(records, base, **ALL)


def test_the_reference_accepts_unknown_images(final: Callable[..., Any], tmp_path: Path) -> None:
    """Source: specs/cotpl.md 3, stage 5 (e)."""
    base = write_base(tmp_path / "base.json", images=1)
    summary, instances, _, _ = final([record(7, region("dog"))], base, images=7, profile="reference", **ALL)
    assert instances["annotations"][0]["image_id"] == 7
    assert "1 labelled images are not in the base file" in "\n".join(summary.notes)


def test_another_size_in_the_base_file_is_told(final: Callable[..., Any], tmp_path: Path) -> None:
    turned = ImageRecord(row=0, image_id=1, key="1.jpg", status="ok", width=480, height=640, regions=(region("dog"),))
    summary, _, _, _ = final([turned], write_base(tmp_path / "base.json"), **ALL)
    assert any(note.startswith("1 images have another size than the base file says") for note in summary.notes)


def test_without_a_size_the_base_files_size_bounds_the_box(final: Callable[..., Any], tmp_path: Path) -> None:
    unsized = ImageRecord(row=0, image_id=1, key="1.jpg", status="ok", regions=(region("dog", (-5, 400, 700, 500)),))
    _, instances, _, _ = final([unsized], write_base(tmp_path / "base.json"), **ALL)
    assert instances["annotations"][0]["bbox"] == [0, 400, 640, 80]


def test_images_of_unknown_size_are_told_where_there_is_no_base_file(final: Callable[..., Any]) -> None:
    failed = ImageRecord(row=1, image_id=2, key="2.jpg", status="failed", reason="decode")
    imported = ImageRecord(row=2, image_id=3, key="3.jpg", status="ok", regions=(region("dog"),))
    summary, instances, _, _ = final([record(1, region("dog")), failed, imported], **ALL)
    assert instances["images"] == [
        {"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}, {"id": 3, "file_name": "3.jpg"},
    ]  # fmt: skip
    assert "1 images that could not be read are not in the list of images" in summary.notes
    assert any(note.startswith("1 images are listed without width and height") for note in summary.notes)


# Selection


def many(**boxes: int) -> list[ImageRecord]:
    return [record(1, *(region(name) for name, count in boxes.items() for _ in range(count)))]


@pytest.mark.parametrize(
    ("selection", "images", "expected"),
    [
        ({}, 118_287, []),
        ({"image_share": 0.02}, 100, ["c", "a", "b"]),
        ({"image_share": 0.021}, 100, ["c"]),
        ({"image_share": 0.0001}, 1, ["c", "a", "b"]),
        ({"image_share": 0.0001, "at_least": 1}, 1, ["c", "a", "b", "d"]),
        ({"by": "count", "count": 3}, 1, ["c"]),
        ({"by": "top_k", "k": 2}, 1, ["c", "a"]),
        ({"by": "list", "names": ["d", "zebra crossing", "a"]}, 1, ["d", "zebra crossing", "a"]),
    ],
)
def test_classes_are_selected(
    final: Callable[..., Any], selection: dict[str, Any], images: int, expected: list[str]
) -> None:
    summary, _, _, classes = final(many(b=2, a=2, c=3, d=1), images=images, selection=selection)
    assert [entry.name for entry in classes.classes] == expected
    assert summary.notes[0].startswith("classes: ")


def test_the_default_share_is_1294_boxes_of_coco(final: Callable[..., Any]) -> None:
    """Source: specs/cotpl.md 3, stage 3."""
    for boxes, expected in ((1293, 0), (1294, 1)):
        from mill_jobs.recipes.cotpl.config import SelectionConfig
        from mill_jobs.recipes.cotpl.finalize import NameCount, select_classes

        count = [NameCount("fish", boxes, 1, 0)]
        found = select_classes(SelectionConfig(), count, None, images=118_287, by_appearance=False)
        assert len(found.names) == expected


def test_the_rarest_base_class_sets_the_threshold(final: Callable[..., Any], tmp_path: Path) -> None:
    annotations = [person(id_, 1, [500, 400, 9, 9], category_id=1 if id_ < 4 else 2) for id_ in range(1, 6)]
    base = write_base(tmp_path / "base.json", annotations=annotations)
    summary, _, _, classes = final(many(fish=2, box=1), base, selection={"by": "base_minimum"})
    assert [entry.name for entry in classes.extras] == ["fish"]
    assert "2 boxes or more (annotations of bicycle, the rarest base class)" in summary.notes[0]


def test_the_rarest_base_class_needs_a_base_file(final: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"base_minimum needs finalize\.base"):
        final(many(fish=2), selection={"by": "base_minimum"})


def test_a_taxonomy_name_needs_no_base_file(final: Callable[..., Any]) -> None:
    known = open_base(None, ("Cat", "Cell_Phone"), None)
    _, instances, _, classes = final([record(1, region("cell phones"), region("fish"))], known, **ALL)
    assert [(c["id"], c["name"]) for c in instances["categories"]] == [(1, "Cat"), (2, "Cell_Phone"), (3, "fish")]
    assert [item["category_id"] for item in instances["annotations"]] == [2, 3]
    assert [entry.weight for entry in classes.classes] == [1, 1, 1]


def test_nothing_selected_is_a_valid_final(final: Callable[..., Any], tmp_path: Path) -> None:
    _, instances, regions, classes = final([record(1)], write_base(tmp_path / "base.json"))
    assert (instances["annotations"], regions, classes.extras) == ([], [], ())


def test_a_setting_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="k has no effect with by=count"):
        CotplFinalizeConfig.model_validate({"selection": {"by": "count", "k": 3}})
    with pytest.raises(ValueError, match="listed twice: a"):
        CotplFinalizeConfig.model_validate({"selection": {"by": "list", "names": ["a", "a"]}})
    config = CotplFinalizeConfig()
    assert CotplFinalizeConfig.model_validate(config.model_dump()) == config


# Masks


def test_masks_are_written_in_the_size_of_the_image(final: Callable[..., Any]) -> None:
    whole, half = np.zeros((480, 640), bool), np.zeros((240, 320), bool)
    whole[10:110, 10:210] = True
    half[5:55, 5:105] = True
    masks = [RegionMask(*rle.size, rle.counts) for rle in (*encode_masks(whole[None]), *encode_masks(half[None]))]
    records = [record(1, region("dog", mask=masks[0]), region("dog", mask=masks[1]), region("dog"))]
    _, instances, _, _ = final(records, masks=True, **ALL)
    first, second, bare = instances["annotations"]
    for item in (first, second):
        assert item["segmentation"]["size"] == [480, 640]
        decoded = decode_mask(Rle((480, 640), item["segmentation"]["counts"].encode()))
        assert np.array_equal(decoded, whole)
        assert item["area"] == whole.sum()
    assert "segmentation" not in bare


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_a_scaled_mask_keeps_its_share(height: int, width: int, times: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    (rle,) = encode_masks(mask[None])
    scaled = decode_mask(scale_mask(rle, width * times, height * times))
    assert scaled.shape == (height * times, width * times)
    if times % 2:
        assert np.array_equal(scaled[times // 2 :: times, times // 2 :: times], mask)


def test_areas_of_many_masks() -> None:
    """Of 256 and more at once pycocotools makes an overflow."""
    masks = np.zeros((300, 4, 5), bool)
    for index, mask in enumerate(masks):
        mask.flat[: index % 21] = True
    assert mask_areas(encode_masks(masks)).tolist() == [index % 21 for index in range(300)]
    assert mask_areas([]).tolist() == []


# The promises

NAMES = (
    "person",
    "people",
    "a dog",
    "Dogs",
    "cat",
    "fish",
    "fishes",
    "woman",
    "tree",
    "potted plant",
    "",
    "ünïcorn",
    "'s",
)


@st.composite
def labelled_images(draw: st.DrawFn) -> list[ImageRecord]:
    def box() -> Box:
        x, y = draw(st.floats(-20, 650)), draw(st.floats(-20, 500))
        return (x, y, x + draw(st.floats(0, 700)), y + draw(st.floats(0, 500)))

    def asked() -> Region:
        fate = draw(st.sampled_from(["foreground", "foreground", "foreground", "background", "absent", "undecided"]))
        named = fate in ("foreground", "background")
        reason = {"absent": st.sampled_from(["no", "unsure"]), "undecided": st.just("error")}.get(fate, st.none())
        return Region(
            box(), fate, label=draw(st.sampled_from(NAMES)) if named else None, score=draw(st.none() | st.floats(0, 1)),
            reason=draw(reason), evidence={"float_box": draw(st.booleans()), "answers": []},
        )  # fmt: skip

    records = []
    for row in range(draw(st.integers(0, 7))):
        status: Status = draw(st.sampled_from(["ok", "ok", "ok", "empty", "failed"]))
        regions = tuple(asked() for _ in range(draw(st.integers(1, 5)))) if status == "ok" else ()
        reasons = draw(st.lists(st.sampled_from(["small", "inner"]), max_size=3))
        records.append(
            ImageRecord(
                row=row, image_id=row + 1, key=f"{row + 1}.jpg", status=status, width=SIZE[0], height=SIZE[1],
                reason="decode" if status == "failed" else None, regions=regions,
                dropped=tuple(Dropped(box(), 0.5, reason) for reason in reasons),
            )
        )  # fmt: skip
    return records


base_boxes = st.lists(
    st.tuples(st.integers(1, 7), st.sampled_from([1, 2, 18]), st.integers(0, 600), st.integers(0, 400),
              st.integers(0, 300), st.integers(0, 300), st.integers(0, 1)), max_size=8
)  # fmt: skip


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    records=labelled_images(), boxes=base_boxes, profile=st.sampled_from(["fixed", "reference"]),
    with_base=st.booleans(), count=st.integers(1, 3), missing=st.integers(0, 3),
)  # fmt: skip
def test_every_region_ends_with_one_fate_and_all_numbers_add_up(
    tmp_path_factory: pytest.TempPathFactory, records: list[ImageRecord], boxes: list[tuple[int, ...]], profile: str,
    with_base: bool, count: int, missing: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("promise")
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": [x, y, w, h], "iscrowd": crowd}
        for number, (image, category, x, y, w, h, crowd) in enumerate(boxes, 1)
    ]
    base = write_base(folder / "base.json", images=7, annotations=annotations) if with_base else None
    config = CotplFinalizeConfig.model_validate(
        {"profile": profile, "selection": {"by": "count", "count": count}, "legacy_files": True}
    )
    summary = finalize_records(records, config, base, folder / "a", images=len(records) + missing)
    check(summary)
    regions = pq.read_table(folder / "a" / "regions.parquet").to_pylist()
    assert [(row["row"], row["region"]) for row in regions] == [
        (record.row, place) for record in records for place in range(len(record.regions))
    ]
    assert summary.steps[0].entered == len(records) + missing
    assert summary.steps[1].entered == sum(len(record.regions) + len(record.dropped) for record in records)
    fates = Counter(row["fate"] for row in regions)
    assert summary.steps[1].left == len(regions)
    assert summary.steps[-1].left == fates["kept"]
    instances = json.loads((folder / "a" / "instances.json").read_bytes())
    pseudo = [item for item in instances["annotations"] if "score" in item or item not in annotations]
    assert [item["id"] for item in pseudo] == [row["annotation_id"] for row in regions if row["fate"] == "kept"]
    assert len({item["id"] for item in instances["annotations"]}) == len(instances["annotations"])
    classes = ClassList.from_json((folder / "a" / "classes.json").read_bytes())
    weights = {entry.category_id: entry.weight for entry in classes.classes}
    assert all(weights[item["category_id"]] == 1 for item in instances["annotations"])
    assert sum(entry.boxes for entry in classes.classes) == fates["kept"]
    assert [category["name"] for category in instances["categories"]] == [entry.name for entry in classes.classes]
    if profile == "fixed":
        for item in pseudo:
            x, y, w, h = item["bbox"]
            assert w >= 1
            assert h >= 1
            assert 0 <= x <= x + w <= SIZE[0] + 1e-9
            assert 0 <= y <= y + h <= SIZE[1] + 1e-9
        check_duplicates(regions, base)
    images = len(records) + missing
    for name, chunk_size, threads, backwards in (("b", 1, 1, False), ("c", 2, 2, True)):
        again = finalize_records(
            records, config, base, folder / name, images=images, chunk_size=chunk_size, threads=threads,
            backwards=backwards,
        )  # fmt: skip
        assert again == summary
        for path in sorted((folder / "a").iterdir()):
            assert path.read_bytes() == (folder / name / path.name).read_bytes(), path.name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settled_module, "BATCH_ROWS", 2)
        assert finalize_records(records, config, base, folder / "d", images=images) == summary
    for path in sorted((folder / "a").iterdir()):
        if path.suffix != ".parquet":
            assert path.read_bytes() == (folder / "d" / path.name).read_bytes(), path.name
    assert pq.read_table(folder / "d" / "regions.parquet").to_pylist() == regions


def check_duplicates(regions: list[dict[str, Any]], base: CocoBase | None) -> None:
    """Against all pairs, one by one."""
    for row in regions:
        overlaps = np.zeros(0)
        if base is not None and base.file is not None:
            here = base.kept() & (base.file.image_of == row["image_id"])
            box = np.array([[row[side] for side in ("x0", "y0", "x1", "y1")]])
            overlaps = box_iou(box, base.file.boxes_xyxy[here], base.file.crowd[here])[0]
        if row["fate"] == "base_duplicate":
            assert overlaps.max() > 0.5
        elif row["fate"] in ("kept", "degenerate"):
            assert not (overlaps > 0.5).any()
