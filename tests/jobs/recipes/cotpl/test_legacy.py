"""The original's files in and out. Expected values: specs/cotpl.md 8.5."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labelled import COCO_CATEGORIES, finalize_records
from mill_jobs.recipes.cotpl.config import CotplFinalizeConfig
from mill_jobs.recipes.cotpl.evidence import EVIDENCE
from mill_jobs.recipes.cotpl.legacy import LegacyImage, open_shards, read_shards, shard_files
from mill_shared.coco import open_base
from mill_shared.errors import ConfigError
from mill_shared.records import ChunkMeta, ImageRecord, decode_chunk, encode_chunk


def layer(*named: tuple[list[float], str]) -> dict[str, Any]:
    return {"bbox": [box for box, _ in named], "category": [name for _, name in named]}


def entry(foreground: dict[str, Any] | None = None, background: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"foreground": foreground or layer(), "background": background or layer()}


SHARDS = {
    "10000.json": {
        "9": entry(
            layer(([10, 20, 120, 100], "dog"), ([0.0, 0.0, 200.0, 150.0], "woman"), ([30, 30, 100, 100], "person")),
            layer(([5, 5, 300, 90], "sky")),
        ),
        "25": entry(layer(([3, 4, 110, 120], "husky"), ([7, 7, 130, 140], "fish"))),
    },
    "20000.json": {
        "30": entry(),
        "34": entry(
            layer(
                ([8, 8, 150, 150], "fish"), ([9, 9, 160, 100], "street sign"), ([11, 12, 100, 130], "dog."),
                ([1, 1, 100, 101], "pole"), ([2, 2, 100, 100], "sign"),
            ),
            layer(([0, 0, 640, 200], "grass")),
        ),
    },
}  # fmt: skip
MERGED = SHARDS["10000.json"] | SHARDS["20000.json"]
UNSEEN = {
    "9": entry(
        layer(([10, 20, 120, 100], "dog")),
        {"bbox": [[5, 5, 300, 90], [0.0, 0.0, 200.0, 150.0], [30, 30, 100, 100]], "category": ["sky"]},
    ),
    "25": entry(layer(([7, 7, 130, 140], "fish")), {"bbox": [[3, 4, 110, 120]], "category": []}),
    "30": entry(),
    "34": entry(
        layer(
            ([8, 8, 150, 150], "fish"), ([11, 12, 100, 130], "dog."), ([1, 1, 100, 101], "pole"),
            ([2, 2, 100, 100], "sign"),
        ),
        {"bbox": [[0, 0, 640, 200], [9, 9, 160, 100]], "category": ["grass"]},
    ),
}  # fmt: skip
TOPK = {
    **UNSEEN,
    "34": {**UNSEEN["34"], "foreground": layer(([8, 8, 150, 150], "fish"), ([2, 2, 100, 100], "sign"))},
}
BASE: dict[str, Any] = {
    "info": {"description": "café"},
    "licenses": [],
    "images": [{"id": id_, "file_name": f"{id_:012d}.jpg", "width": 640, "height": 480} for id_ in (9, 25, 30, 34)],
    "annotations": [
        {"id": 7, "image_id": 9, "category_id": 1, "bbox": [1.10, 2.0, 30, 40], "area": 1.2e3, "iscrowd": 0,
         "segmentation": [[1, 2.50, 3, 4]]}
    ],
    "categories": COCO_CATEGORIES,
}  # fmt: skip


def write_shards(folder: Path, shards: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in shards.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def to_records(images: list[LegacyImage]) -> list[ImageRecord]:
    return [
        ImageRecord(
            row=row, image_id=image.image_id, key=f"{image.image_id:012d}.jpg",
            status="ok" if image.regions else "empty", regions=image.regions,
        )
        for row, image in enumerate(images)
    ]  # fmt: skip


@pytest.fixture
def replay(tmp_path: Path) -> Callable[..., Path]:
    """Import the shards, finalize them with the reference profile, return the folder of the final."""

    def run(**selection: object) -> Path:
        folder = write_shards(tmp_path / "pseudo_v0", SHARDS)
        (folder / "notes.txt").write_text("ignored")
        (tmp_path / "base.json").write_text(json.dumps(BASE))
        records = to_records(list(read_shards(open_shards(shard_files(folder)))))
        config = CotplFinalizeConfig.model_validate(
            {"profile": "reference", "legacy_files": True, "selection": selection or {"by": "list"}}
        )
        base = open_base(tmp_path / "base.json", "coco-80", "ov-coco-48")
        finalize_records(records, config, base, tmp_path / "final")
        return tmp_path / "final"

    return run


def as_written(tree: object) -> bytes:
    return json.dumps(tree, indent=2, ensure_ascii=False).encode()


def test_stages_1_2_and_4_byte_for_byte(replay: Callable[..., Path]) -> None:
    final = replay()
    assert (final / "raw_psuedo_labels.json").read_bytes() == as_written(MERGED)
    assert (final / "unseen_psuedo_labels.json").read_bytes() == as_written(UNSEEN)
    assert (final / "topk_unseen_psuedo_labels.json").read_bytes() == as_written(TOPK)


@pytest.mark.parametrize(
    ("count", "printed"),
    [(1, "['fish', 'dog', 'dog.', 'pole', 'sign']\n"), (2, "['fish']\n"), (1294, "[]\n")],
)
def test_stage_3_prints_the_names_by_frequency_and_first_appearance(
    replay: Callable[..., Path], count: int, printed: str
) -> None:
    assert (replay(by="list", count=count) / "stage3.txt").read_text() == printed


def test_stage_3_is_the_class_list_where_it_decides(replay: Callable[..., Path]) -> None:
    final = replay(by="count", count=2)
    assert (final / "stage3.txt").read_text() == "['fish']\n"
    topk = json.loads((final / "topk_unseen_psuedo_labels.json").read_bytes())
    assert {key: value["foreground"]["category"] for key, value in topk.items()} == {
        "9": [], "25": ["fish"], "30": [], "34": ["fish"],
    }  # fmt: skip


def test_stage_5_byte_for_byte(replay: Callable[..., Path]) -> None:
    final = replay()
    written = (final / "instances_train2017_pseudo.json").read_bytes()
    found = json.loads(written)
    first = 909000554146
    new = [
        {"id": first + number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
        for number, (image, category, box, area) in enumerate(
            [
                (9, 18, [10, 20, 120, 100], 12000), (25, 91, [7, 7, 130, 140], 18200),
                (34, 91, [8, 8, 150, 150], 22500), (34, 134, [2, 2, 100, 100], 10000),
            ]
        )
    ]  # fmt: skip
    assert found["annotations"] == BASE["annotations"] + new
    assert len(found["categories"]) == 124
    named = {category["id"]: category["name"] for category in found["categories"]}
    assert [named[id_] for id_ in (91, 92, 93, 133, 134)] == ["fish", "stick", "box", "chicken", "sign"]
    extras = [{"id": id_, "name": named[id_], "supercategory": "pseudo"} for id_ in range(91, 135)]
    expected = {**BASE, "annotations": [*BASE["annotations"], *new], "categories": [*COCO_CATEGORIES, *extras]}
    assert written == json.dumps(expected, indent=2).encode()


def test_stage_6_prints_the_seeds_two_lines(replay: Callable[..., Path]) -> None:
    from mill_jobs.recipes.cotpl.names import COTPL_64
    from mill_jobs.trainer.classes import make_classes, printed_weights

    categories = replay() / "stage6.txt"
    base = open_base(None, "coco-80", "ov-coco-48")
    assert categories.read_text() == printed_weights(make_classes(base, COTPL_64))


def test_boxes_of_floats_stay_floats_in_the_coco_file(tmp_path: Path) -> None:
    shards = {"1.json": {"9": entry(layer(([0.0, 0.0, 200.0, 150.0], "fish"), ([1, 2, 3, 4], "fish")))}}
    records = to_records(list(read_shards(open_shards(shard_files(write_shards(tmp_path / "shards", shards))))))
    config = CotplFinalizeConfig.model_validate({"profile": "reference", "selection": {"by": "count", "count": 1}})
    finalize_records(records, config, None, tmp_path / "final")
    text = (tmp_path / "final" / "instances.json").read_text()
    assert '"bbox":[0.0,0.0,200.0,150.0],"area":30000.0,"iscrowd":0}' in text
    assert '"bbox":[1,2,3,4],"area":12,"iscrowd":0}' in text


def test_labels_survive_a_chunk(tmp_path: Path) -> None:
    records = to_records(list(read_shards(open_shards(shard_files(write_shards(tmp_path / "shards", SHARDS))))))
    data = encode_chunk(records, ChunkMeta(label_digest="0" * 64, pass_index=0, chunk=0), EVIDENCE)
    region = decode_chunk(data)[0].regions[1]
    assert (region.box_xyxy, region.label, region.fate) == ((0, 0, 200, 150), "woman", "foreground")
    assert region.evidence["float_box"] is True


# Merging


def test_shards_merge_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", {"118287.json": {"3": entry()}, "20000.json": {"2": entry()}, "x.json": {},
                                           "9000.json": {"1": entry()}})  # fmt: skip
    files = shard_files(folder)
    assert [path.name for path in files] == ["9000.json", "20000.json", "118287.json", "x.json"]
    assert open_shards(files).image_ids == (1, 2, 3)
    assert open_shards(files[::-1]).image_ids == (3, 2, 1)


def test_of_an_image_in_two_shards_the_later_labels_count_in_the_earlier_place(tmp_path: Path) -> None:
    later = {"40": entry(), "25": entry(layer(([1, 1, 2, 2], "new"))), "50": entry()}
    folder = write_shards(tmp_path / "s", {**SHARDS, "30000.json": later})
    shards = open_shards(shard_files(folder))
    assert shards.image_ids == (9, 25, 30, 34, 40, 50)
    assert shards.replaced == ((25, folder / "10000.json", folder / "30000.json"),)
    images = list(read_shards(shards))
    assert tuple(image.image_id for image in images) == shards.image_ids
    assert [region.label for region in images[1].regions] == ["new"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"9": {"foreground"', "not a shard"),
        ('{"9": {"background": {"bbox": [], "category": []}}}', "foreground"),
        ('{"9": {"foreground": {"bbox": [[1, 2, 3]], "category": ["a"]}}}', "length 4|bbox"),
        ('{"9": {"foreground": {"bbox": [[1, 2, 3, 4]], "category": []}}}', "image 9: .*differ in length"),
        ('{"nine": {"foreground": {"bbox": [], "category": []}}}', "'nine' is no number"),
    ],
)
def test_a_broken_shard_is_named_or_left_out(tmp_path: Path, content: str, why: str) -> None:
    folder = write_shards(tmp_path / "s", SHARDS)
    (folder / "15000.json").write_text(content)
    with pytest.raises(ConfigError, match=why) as error:
        open_shards(shard_files(folder))
    assert "15000.json" in str(error.value)
    shards = open_shards(shard_files(folder), skip_broken=True)
    assert [path.name for path, _ in shards.broken] == ["15000.json"]
    assert shards.image_ids == (9, 25, 30, 34)


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no shard files"):
        shard_files(tmp_path)


def test_backgrounds_without_names_stay_without(tmp_path: Path) -> None:
    entry_ = {"foreground": layer(), "background": {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": ["sky"]}}
    folder = write_shards(tmp_path / "s", {"1.json": {"9": entry_}})
    (image,) = read_shards(open_shards(shard_files(folder)))
    assert [region.label for region in image.regions] == ["sky", None]
    config = CotplFinalizeConfig(profile="reference", legacy_files=True)
    finalize_records(to_records([image]), config, None, tmp_path / "final")
    assert json.loads((tmp_path / "final" / "raw_psuedo_labels.json").read_bytes()) == {"9": entry_}
