"""Exports, read by readers that are not ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from supervision import DetectionDataset

from mill_jobs.export import export_coco, export_yolo
from mill_jobs.final import fetch_final
from mill_shared.errors import ConfigError
from oracle_run import SAMPLE, OracleRun, make_oracle_run
from runs import mill

IMAGES = SAMPLE / "images"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OracleRun:
    return make_oracle_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def bundle(run: OracleRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    fetch_final(run.store, run.plan.run, run.final, folder)
    return folder


def boxes_of(annotations: list[dict[str, Any]]) -> dict[int, list[tuple[float, ...]]]:
    found: dict[int, list[tuple[float, ...]]] = {}
    for item in annotations:
        x, y, w, h = item["bbox"]
        found.setdefault(item["image_id"], []).append((x, y, x + w, y + h))
    return {image_id: sorted(boxes) for image_id, boxes in found.items()}


def test_yolo_is_read_with_the_same_boxes_and_names(bundle: Path, tmp_path: Path) -> None:
    exported = export_yolo(bundle, tmp_path / "yolo", str(IMAGES))
    instances = json.loads((bundle / "instances.json").read_bytes())
    # The reader wants a folder whose images all have labels; the export's `images` links to all pictures.
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for image in instances["images"]:
        (pictures / image["file_name"]).symlink_to(tmp_path / "yolo" / "images" / image["file_name"])
    dataset = DetectionDataset.from_yolo(
        images_directory_path=str(pictures),
        annotations_directory_path=str(tmp_path / "yolo" / "labels"),
        data_yaml_path=str(tmp_path / "yolo" / "data.yaml"),
    )
    assert dataset.classes == [category["name"] for category in instances["categories"]]
    expected = boxes_of([item for item in instances["annotations"] if not item["iscrowd"]])
    id_of = {str(pictures / image["file_name"]): image["id"] for image in instances["images"]}
    count = 0
    for path, _, detections in dataset:
        found = np.array(sorted(map(tuple, detections.xyxy.tolist())))
        np.testing.assert_allclose(found, np.array(expected[id_of[path]]), atol=0.01)
        count += len(found)
    assert count == exported.labels
    assert exported.labels + exported.left_out == len(instances["annotations"])


def test_yolo_can_hold_the_pseudo_labels_alone(bundle: Path, tmp_path: Path) -> None:
    exported = export_yolo(bundle, tmp_path / "yolo", str(IMAGES), pseudo_only=True)
    instances = json.loads((bundle / "instances.json").read_bytes())
    assert exported.labels == sum("score" in item for item in instances["annotations"]) > 0
    assert len(list((tmp_path / "yolo" / "labels").iterdir())) == len(instances["images"])


def test_yolo_never_mixes_with_older_labels(bundle: Path, tmp_path: Path) -> None:
    export_yolo(bundle, tmp_path, str(IMAGES))
    with pytest.raises(ConfigError, match="exists already"):
        export_yolo(bundle, tmp_path, str(IMAGES))


def test_two_images_of_one_stem_are_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for name in ("classes.json", "regions.parquet", "instances.json"):
        (copy / name).write_bytes((bundle / name).read_bytes())
    instances = json.loads((copy / "instances.json").read_bytes())
    instances["images"][0]["file_name"], instances["images"][1]["file_name"] = "a.jpg", "a.png"
    (copy / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(ConfigError, match=r"a\.jpg and a\.png"):
        export_yolo(copy, tmp_path / "yolo", str(IMAGES))


def test_coco_holds_the_pseudo_labels_alone(bundle: Path, tmp_path: Path) -> None:
    exported = export_coco(bundle, tmp_path / "pseudo.json")
    instances = json.loads((bundle / "instances.json").read_bytes())
    read = COCO(str(tmp_path / "pseudo.json"))
    wanted = [item for item in instances["annotations"] if "score" in item]
    assert read.dataset["annotations"] == wanted
    assert read.dataset["categories"] == instances["categories"]
    assert exported.labels == len(wanted) > 0


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bundle"):
        export_coco(tmp_path, tmp_path / "x.json")
    with pytest.raises(ConfigError, match="bundle"):
        export_yolo(tmp_path, tmp_path / "x", "images")


def test_the_command_exports_a_fetched_bundle(bundle: Path, tmp_path: Path) -> None:
    ended = mill("export", "yolo", bundle, "--images", IMAGES, "--to", tmp_path / "yolo")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "yolo" / "data.yaml").exists()
    again = mill("export", "yolo", bundle, "--images", IMAGES, "--to", tmp_path / "yolo")
    assert again.returncode == 78
    assert "exists already" in again.stderr
