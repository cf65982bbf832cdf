"""Every corruption of a bundle that a trainer would not notice. Source: specs/cotpl.md 5.3 and 8.7."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mill_jobs.final import fetch_final
from mill_jobs.finalize import finalize_run
from mill_jobs.trainer.check import check_bundle
from mill_shared.errors import ConfigError
from oracle_run import OracleRun, make_oracle_run

Json = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OracleRun:
    made = make_oracle_run(tmp_path_factory.mktemp("run"))
    settings = made.config.recipe.finalize.model_copy(update={"synonyms": {"dog": "hound", "couch": "settee"}})
    recipe = made.config.recipe.model_copy(update={"finalize": settings})
    config = made.config.model_copy(update={"recipe": recipe})
    return replace(made, config=config, final=finalize_run(config, made.plan, made.store).digest)


@pytest.fixture
def bundle(run: OracleRun, tmp_path: Path) -> Path:
    fetch_final(run.store, run.plan.run, run.final, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_as_it_was_made_is_whole(bundle: Path) -> None:
    checked = check_bundle(bundle)
    assert checked.faults == ()
    instances = json.loads((bundle / "instances.json").read_bytes())
    assert checked.annotations == len(instances["annotations"])
    assert checked.classes == len(instances["categories"])


@pytest.mark.parametrize("name", ["instances.json", "classes.json", "weights.json", "regions.parquet", "summary.json"])
def test_a_changed_byte_is_found_by_the_manifest(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data + b" " if name.endswith("json") else data)
    if name == "regions.parquet":
        (bundle / name).unlink()
        shutil.copy(bundle / "instances.json", bundle / name)
        with pytest.raises(Exception, match=r"(?i)parquet"):
            check_bundle(bundle)
        return
    assert any(name in fault and "SHA-256" in fault for fault in check_bundle(bundle).faults)


def test_a_missing_file_is_found_by_the_manifest(bundle: Path) -> None:
    (bundle / "summary.json").unlink()
    assert any("summary.json: missing" in fault for fault in check_bundle(bundle).faults)


def pseudo(instances: Json) -> list[Json]:
    return [item for item in instances["annotations"] if "score" in item]


def swap(items: list[Any], a: int, b: int) -> None:
    items[a], items[b] = items[b], items[a]


def change(item: Json, **values: object) -> None:
    item.update(values)


def swap_names(a: Json, b: Json) -> None:
    a["name"], b["name"] = b["name"], a["name"]


def drop_weight(classes: Json) -> None:
    change(next(entry for entry in classes["classes"] if entry["boxes"]), weight=0)


def idle_base(classes: Json) -> None:
    change(
        next(entry for entry in classes["classes"] if entry["origin"] == "base" and entry["name"] == "person"), weight=0
    )


INSTANCES: dict[str, tuple[Callable[[Json], object], str]] = {
    "categories in another order": (lambda j: swap(j["categories"], 3, 7), "not in the order of their ids"),
    "names of two categories swapped": (
        lambda j: swap_names(j["categories"][3], j["categories"][5]), "another order",
    ),
    "a category lacks": (lambda j: j["categories"].pop(4), "lacks the categories"),
    "a foreign category": (lambda j: j["categories"].append({"id": 999, "name": "otter"}), "does not know: otter"),
    "a name twice": (lambda j: change(j["categories"][4], name="person"), "two categories have one name: person"),
    "a trailing blank": (lambda j: change(j["categories"][0], name="person "), "lacks the categories person"),
    "an id twice": (
        lambda j: j["annotations"].append(dict(pseudo(j)[0])), "1 ids belong to several annotations",
    ),
    "a base id twice": (lambda j: j["annotations"].append(dict(j["annotations"][0])), "several annotations"),
    "an image id twice": (lambda j: j["images"].append(dict(j["images"][0])), "several images"),
    "an image that is not listed": (lambda j: change(pseudo(j)[0], image_id=7), "not listed"),
    "another image": (lambda j: change(pseudo(j)[0], image_id=j["images"][-1]["id"]), "another image_id"),
    "another category": (lambda j: change(pseudo(j)[0], category_id=1), "another category_id"),
    "an unknown category": (lambda j: change(pseudo(j)[0], category_id=999), "does not know: 999"),
    "a box outside": (lambda j: change(pseudo(j)[0], bbox=[-5, 0, 20, 20], area=400), "reach out of their image"),
    "a flat box": (lambda j: change(pseudo(j)[0], bbox=[1, 1, 0.5, 20], area=10), "less than a pixel"),
    "no box": (lambda j: pseudo(j)[0].pop("bbox"), "no box"),
    "no area": (lambda j: pseudo(j)[0].pop("area"), "no area"),
    "a wrong area": (lambda j: change(pseudo(j)[0], area=1.0), "another area"),
    "a lost label": (lambda j: j["annotations"].remove(pseudo(j)[0]), "lacks 1 pseudo-labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", INSTANCES)
def test_each_corruption_of_the_annotations_is_found(bundle: Path, name: str) -> None:
    corrupt, expected = INSTANCES[name]
    instances = json.loads((bundle / "instances.json").read_bytes())
    corrupt(instances)
    (bundle / "instances.json").write_text(json.dumps(instances))
    (bundle / "manifest.json").unlink()
    faults = check_bundle(bundle).faults
    assert any(expected in fault for fault in faults), faults


CLASSES: dict[str, tuple[Callable[[Json], object], str]] = {
    "reordered": (lambda c: swap(c["classes"], 80, 81), "do not ascend"),
    "weight 0 on a pseudo-labelled class": (drop_weight, "weight 0 on classes with pseudo-labels"),
    "weight 0 on an annotated base class": (idle_base, "annotations of classes with weight 0"),
    "a name twice": (lambda c: change(c["classes"][5], name="person"), "two classes have one name: person"),
    "an id twice": (lambda c: change(c["classes"][5], category_id=1), "two classes have one category id: 1"),
    "a blank": (lambda c: change(c["classes"][0], name="person "), "another name than the one without blanks"),
    "not the taxonomy": (lambda c: c["taxonomy"].pop(0), "do not begin with the taxonomy"),
    "a weight of 2": (lambda c: change(c["classes"][0], weight=2), "weights are 0 or 1, not so person"),
    "another count": (lambda c: change(c["classes"][80], boxes=10_000), "counts other pseudo-labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_each_corruption_of_the_class_list_is_found(bundle: Path, name: str) -> None:
    corrupt, expected = CLASSES[name]
    classes = json.loads((bundle / "classes.json").read_bytes())
    corrupt(classes)
    (bundle / "classes.json").write_text(json.dumps(classes))
    (bundle / "manifest.json").unlink()
    faults = check_bundle(bundle).faults
    assert any(expected in fault for fault in faults), faults


WEIGHTS: dict[str, tuple[Callable[[Json], object], str]] = {
    "one too few": (lambda w: w["class_weight"].pop(), "class weights for"),
    "background first": (lambda w: w["class_weight"].insert(0, w["class_weight"].pop()), "not the weights of"),
    "an extra less": (lambda w: change(w, num_pls=w["num_pls"] - 1), "num_pls"),
    "another count": (lambda w: change(w, num_classes=80), "num_classes 80"),
    "extras reordered": (lambda w: w["extra_classes"].reverse(), "extra_classes are not those"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_corruption_of_the_weights_is_found(bundle: Path, name: str) -> None:
    corrupt, expected = WEIGHTS[name]
    weights = json.loads((bundle / "weights.json").read_bytes())
    corrupt(weights)
    (bundle / "weights.json").write_text(json.dumps(weights))
    (bundle / "manifest.json").unlink()
    faults = check_bundle(bundle).faults
    assert any(expected in fault for fault in faults), faults


def test_faults_of_the_base_file_are_warnings(bundle: Path) -> None:
    instances = json.loads((bundle / "instances.json").read_bytes())
    base = next(item for item in instances["annotations"] if "score" not in item)
    base.update(bbox=[10.0, 10.0, 5.0, 0.0], area=0.0)
    (bundle / "instances.json").write_text(json.dumps(instances))
    (bundle / "manifest.json").unlink()
    checked = check_bundle(bundle)
    assert checked.faults == ()
    assert any("less than a pixel" in line and str(base["id"]) in line for line in checked.warnings)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"classes\.json: cannot be read"):
        check_bundle(tmp_path)


def test_annotations_may_come_before_the_images(bundle: Path) -> None:
    instances = json.loads((bundle / "instances.json").read_bytes())
    ordered = {name: instances[name] for name in ("annotations", "categories", "images")}
    (bundle / "instances.json").write_text(json.dumps(ordered))
    (bundle / "manifest.json").unlink()
    assert check_bundle(bundle).faults == ()
