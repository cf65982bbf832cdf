"""Overlay and patched config as the real mmengine reads them, and what mmdetection's real CocoDataset then holds."""

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from mill_jobs.final import fetch_final
from mill_jobs.finalize import ScratchWriter, finalize_run
from mill_jobs.trainer.classes import ClassList, make_classes
from mill_jobs.trainer.config import (
    BARON_TARGETS,
    MMDET_TARGETS,
    BaronTrainer,
    EmbeddingsConfig,
    MmdetTrainer,
    NoTrainer,
    TargetTable,
    TrainerConfig,
)
from mill_jobs.trainer.overlay import make_overlay
from mill_jobs.trainer.patch import plan_patch, replace_file, write_trainer_files
from mill_jobs.trainer.resolved import agreement, load_resolved
from mill_shared.errors import ConfigError
from mmdet_stack import baron_files, build, coco_dataset, mmdet_file, read
from oracle_run import OracleRun, make_oracle_run

FILES = ("class_embeddings_attn12.npy", "background_embeddings_attn12.npy")
Json = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OracleRun:
    """Return a run whose final has COCO's 80 classes and two more, in the order that labels brought them."""
    made = make_oracle_run(tmp_path_factory.mktemp("run"))
    parts = made.config.recipe.finalize.model_copy(update={"synonyms": {"dog": "hound", "couch": "settee"}})
    recipe = made.config.recipe.model_copy(update={"finalize": parts})
    finalize = made.config.finalize.model_copy(update={"taxonomy": "coco-80"})
    config = made.config.model_copy(update={"recipe": recipe, "finalize": finalize})
    return replace(made, config=config, final=finalize_run(config, made.plan, made.store).digest)


@dataclass(frozen=True)
class Bundle:
    """A fetched final."""

    folder: Path
    classes: ClassList

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.classes.classes)

    def labels(self) -> list[tuple[int, str, tuple[float, ...]]]:
        """Return (image, class, box xyxy) of every annotation of instances.json."""
        instances = json.loads((self.folder / "instances.json").read_bytes())
        names = {category["id"]: category["name"] for category in instances["categories"]}
        found = []
        for item in instances["annotations"]:
            x, y, width, height = item["bbox"]
            box = (float(x), float(y), float(x + width), float(y + height))
            found.append((item["image_id"], names[item["category_id"]], box))
        return sorted(found)


@pytest.fixture
def bundle(run: OracleRun, tmp_path: Path) -> Bundle:
    folder = tmp_path / "anywhere" / "bundle"
    fetch_final(run.store, run.plan.run, run.final, folder)
    for name in FILES:
        (folder / name).touch()
    return Bundle(folder, ClassList.from_json((folder / "classes.json").read_bytes()))


def write_files(bundle: Bundle, settings: TrainerConfig, config: Path, metainfo: Path | None = None) -> list[str]:
    return write_trainer_files(
        settings, bundle.classes, config_path=config, metainfo_path=metainfo, out=ScratchWriter(bundle.folder),
        embeddings=FILES,
    )  # fmt: skip


def write_baron(folder: Path, *, parts: bool = False) -> Path:
    """Write a config in the manner of CoT-PL's; in two files where `parts`."""
    folder.mkdir(exist_ok=True)
    model, data = baron_files()
    (folder / "data.py").write_text(data)
    (folder / "main.py").write_text(f"_base_ = ['./data.py']\n{model}" if parts else model + data)
    return folder / "main.py"


def write_mmdet(folder: Path, model: str = "faster-rcnn_r50_fpn", data: str = "coco_detection") -> Path:
    """Write a config that inherits from mmdetection's own files, copied so that they may be patched."""
    folder.mkdir(exist_ok=True)
    configs = mmdet_file(".mim/configs/_base_")
    shutil.copy(configs / "models" / f"{model}.py", folder / "model.py")
    shutil.copy(configs / "datasets" / f"{data}.py", folder / "data.py")
    (folder / "main.py").write_text("_base_ = ['model.py', './data.py']\noptim_wrapper = dict(type='OptimWrapper')\n")
    return folder / "main.py"


def rounded(labels: list[tuple[int, str, tuple[float, ...]]]) -> list[tuple[int, str, tuple[float, ...]]]:
    return sorted((image, name, tuple(round(side, 2) for side in box)) for image, name, box in labels)


# What the trainer gets


@pytest.mark.parametrize("form", ["overlay.py", "trainer_config.py"])
def test_the_real_dataset_gets_every_label_under_its_own_name(bundle: Bundle, tmp_path: Path, form: str) -> None:
    config = write_baron(tmp_path / "configs")
    notes = write_files(bundle, BaronTrainer(kind="baron", config=str(config)), config)
    assert notes == []
    resolved = load_resolved(bundle.folder / form)
    dataset = build(resolved["train_dataloader"]["dataset"])
    assert tuple(dataset.metainfo["classes"]) == bundle.names
    assert len(bundle.classes.extras) >= 1
    assert len(dataset.datasets) == 2
    for member in dataset.datasets:
        loaded = read(member)
        assert loaded.classes == bundle.names
        assert rounded(list(loaded.labels)) == rounded(bundle.labels())
    head = resolved["model"]["roi_head"]["bbox_head"]
    assert head["num_classes"] == len(bundle.names)
    assert head["loss_cls"]["class_weight"] == bundle.classes.class_weight
    assert Path(head["cls_embeddings_path"]).samefile(bundle.folder / FILES[0])
    for place in (head, resolved["model"]["roi_head"]["ovd_cfg"]["kd"]):
        assert Path(place["bg_cls_embeddings_path"]).samefile(bundle.folder / FILES[1])
    cache = resolved["model"]["roi_head"]["ovd_cfg"]["kd"]["boxes_cache"]
    assert Path(cache["json_path"]).samefile(bundle.folder / "instances.json")
    assert cache["start_iter"] == 20000
    assert resolved["num_pls"] == len(bundle.classes.extras)


def test_validation_is_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    config = write_baron(tmp_path / "configs")
    write_files(bundle, BaronTrainer(kind="baron", config=str(config)), config)
    before = load_resolved(config)
    for name in ("overlay.py", "trainer_config.py"):
        after = load_resolved(bundle.folder / name)
        assert {key: after[key] for key in after if key.startswith("val_")} == {
            key: before[key] for key in before if key.startswith("val_")
        }
        assert set(after) == set(before), "no name of ours stays in the config"


def test_overlay_and_patched_config_agree_with_the_classes(bundle: Bundle, tmp_path: Path) -> None:
    config = write_baron(tmp_path / "configs")
    write_files(bundle, BaronTrainer(kind="baron", config=str(config)), config)
    overlay, patched = (load_resolved(bundle.folder / name) for name in ("overlay.py", "trainer_config.py"))
    assert agreement(overlay, patched, bundle.classes, BARON_TARGETS, files=FILES) == []
    assert agreement(load_resolved(config), None, bundle.classes, BARON_TARGETS, files=FILES) != []


def test_the_bundle_may_be_moved(bundle: Bundle, tmp_path: Path) -> None:
    config = write_baron(tmp_path / "configs", parts=True)
    write_files(bundle, BaronTrainer(kind="baron", config=str(config)), config)
    moved = bundle.folder.rename(tmp_path / "moved")
    assert agreement(load_resolved(moved / "overlay.py"), None, bundle.classes, BARON_TARGETS, files=FILES) == []
    assert len(build(load_resolved(moved / "overlay.py")["train_dataloader"]["dataset"])) > 0


def test_a_config_in_two_files_is_patched_in_place_and_agrees(bundle: Bundle, tmp_path: Path) -> None:
    config = write_baron(tmp_path / "configs", parts=True)
    notes = write_files(bundle, BaronTrainer(kind="baron", config=str(config)), config)
    assert [note[:22] for note in notes] == ["no trainer_config.py: "]
    assert "not set there: annotations (train_dataloader.**.ann_file)" in notes[0]
    overlay = load_resolved(bundle.folder / "overlay.py")
    for path, data in plan_patch(bundle.folder, [config, config.parent / "data.py"], BARON_TARGETS, None).items():
        replace_file(path, data)
    assert agreement(overlay, load_resolved(config), bundle.classes, BARON_TARGETS, files=FILES) == []


def test_class_names_may_come_from_a_patched_coco_py(bundle: Bundle, tmp_path: Path) -> None:
    config, coco = write_baron(tmp_path / "configs"), mmdet_file("datasets/coco.py")
    settings = BaronTrainer(kind="baron", config=str(config), metainfo_file=str(coco))
    assert write_files(bundle, settings, config, coco) == []
    patched = load_resolved(bundle.folder / "trainer_config.py")
    overlay = load_resolved(bundle.folder / "overlay.py")
    found = agreement(overlay, patched, bundle.classes, BARON_TARGETS, files=FILES, classes_in_code=True)
    assert found == []
    faults = agreement(overlay, patched, bundle.classes, BARON_TARGETS, files=FILES)
    assert any("has no metainfo, so it silently takes the classes of its own code" in fault for fault in faults)
    tree = ast.parse((bundle.folder / "coco_metainfo.py").read_bytes())
    [metainfo] = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and "METAINFO" in ast.dump(node)]
    as_patched = type("Patched", (coco_dataset(),), {"METAINFO": ast.literal_eval(metainfo.value)})
    arguments = {**patched["train_dataloader"]["dataset"]["datasets"][0], "pipeline": []}
    loaded = read(as_patched(**{key: value for key, value in arguments.items() if key != "type"}))
    assert loaded.classes == bundle.names
    assert rounded(list(loaded.labels)) == rounded(bundle.labels())


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("faster-rcnn_r50_fpn", "coco_detection"),
        ("cascade-mask-rcnn_r50_fpn", "coco_instance"),
        ("retinanet_r50_fpn", "coco_detection"),
    ],
)
def test_mmdetections_own_configs_take_both_forms(bundle: Bundle, tmp_path: Path, model: str, data: str) -> None:
    config = write_mmdet(tmp_path / "configs", model, data)
    before = load_resolved(config)
    notes = write_files(bundle, MmdetTrainer(kind="mmdet", config=str(config)), config)
    assert "main.py: not set there: num_classes (model.**.bbox_head.num_classes or" in notes[0]
    overlay = load_resolved(bundle.folder / "overlay.py")
    assert agreement(overlay, None, bundle.classes, MMDET_TARGETS) == []
    assert overlay["val_dataloader"] == before["val_dataloader"]
    loaded = read(build({**overlay["train_dataloader"]["dataset"], "filter_cfg": None}))
    assert rounded(list(loaded.labels)) == rounded(bundle.labels())
    inherited = [config.parent / "model.py", config.parent / "data.py"]
    for path, text in plan_patch(bundle.folder, inherited, MMDET_TARGETS, None).items():
        replace_file(path, text)
    assert agreement(overlay, load_resolved(config), bundle.classes, MMDET_TARGETS) == []


@pytest.mark.filterwarnings("ignore:pkg_resources is deprecated as an API:UserWarning")
@pytest.mark.filterwarnings("ignore:Deprecated call to `pkg_resources.declare_namespace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:pkg_resources is deprecated as an API:DeprecationWarning")
def test_the_overlay_inherits_from_a_packaged_config(bundle: Bundle, tmp_path: Path) -> None:
    coco_dataset()
    packaged = "mmdet::_base_/datasets/coco_detection.py"
    overlay = tmp_path / "overlay.py"
    targets = TargetTable(annotations=("train_dataloader.dataset.ann_file",))
    overlay.write_text(make_overlay(bundle.classes, targets, packaged))
    resolved = load_resolved(overlay)
    assert agreement(resolved, None, bundle.classes, targets) == []
    assert resolved["train_dataloader"]["dataset"]["ann_file"] == f"{tmp_path}/instances.json"


def test_names_that_mmengine_would_fill_in_stay_names(tmp_path: Path) -> None:
    names = ("{{ fileDirname }", "x {{ fileDirname }}", "{{$HOME:cat}}", "{{_base_.model}}", "it's {{{{", "\\{{")
    classes = make_classes(None, names)
    (tmp_path / "base.py").write_text(
        "model = dict(bbox_head=dict(num_classes=80))\ntrain_dataloader = dict(ann_file='a')"
    )
    (tmp_path / "overlay.py").write_text(make_overlay(classes, MMDET_TARGETS, str(tmp_path / "base.py")))
    assert agreement(load_resolved(tmp_path / "overlay.py"), None, classes, MMDET_TARGETS) == []
    (tmp_path / "classes.json").write_bytes(classes.to_json())
    for path, data in plan_patch(tmp_path, [tmp_path / "base.py"], MMDET_TARGETS, None).items():
        replace_file(path, data)
    assert agreement(None, load_resolved(tmp_path / "base.py"), classes, MMDET_TARGETS) == []


def test_a_repeated_dataset_is_reached(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(
        "model = dict(bbox_head=dict(num_classes=80))\n"
        "train_dataloader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(type='CocoDataset',"
        " ann_file='a.json', metainfo=dict(classes=('old',), palette=[(1, 2, 3)]), data_prefix=dict(img=''),"
        " pipeline=[])))\n"
    )
    overlay = bundle.folder / "overlay.py"
    overlay.write_text(make_overlay(bundle.classes, MMDET_TARGETS, str(tmp_path / "base.py")))
    resolved = load_resolved(overlay)
    assert agreement(resolved, None, bundle.classes, MMDET_TARGETS) == []
    assert tuple(build(resolved["train_dataloader"]["dataset"]).metainfo["classes"]) == bundle.names


# Planted faults. Source: trainer-check: swapped metainfo, a name missing in mid-list, a top-level-only override, ...


def swap_metainfo(config: Json) -> None:
    for dataset in config["train_dataloader"]["dataset"]["datasets"]:
        first, second, *rest = dataset["metainfo"]["classes"]
        dataset["metainfo"]["classes"] = (second, first, *rest)


def lose_a_name(config: Json) -> None:
    for dataset in config["train_dataloader"]["dataset"]["datasets"]:
        names = dataset["metainfo"]["classes"]
        dataset["metainfo"] = {"classes": names[:40] + names[41:], "palette": dataset["metainfo"]["palette"][1:]}


def override_the_top_level_only(config: Json) -> None:
    config["model"]["roi_head"]["bbox_head"]["num_classes"] = 80 + 44


def keep_metainfo_on_one_member(config: Json) -> None:
    del config["train_dataloader"]["dataset"]["datasets"][1]["metainfo"]


def differ_in_one_member(config: Json) -> None:
    metainfo = config["train_dataloader"]["dataset"]["datasets"][1]["metainfo"]
    config["train_dataloader"]["dataset"]["datasets"][1]["metainfo"] = {
        **metainfo,
        "palette": metainfo["palette"][::-1],
    }


def list_the_names(config: Json) -> None:
    metainfo = config["train_dataloader"]["dataset"]["datasets"][0]["metainfo"]
    metainfo["classes"] = list(metainfo["classes"])


def lack_a_colour(config: Json) -> None:
    for dataset in config["train_dataloader"]["dataset"]["datasets"]:
        dataset["metainfo"]["palette"] = dataset["metainfo"]["palette"][:80]


def weigh_a_used_class_zero(config: Json) -> None:
    config["model"]["roi_head"]["bbox_head"]["loss_cls"]["class_weight"][81] = 0


def forget_the_background(config: Json) -> None:
    config["model"]["roi_head"]["bbox_head"]["loss_cls"]["class_weight"].pop()


def keep_the_old_annotations(config: Json) -> None:
    config["train_dataloader"]["dataset"]["datasets"][1]["ann_file"] = "hchoi/old.json"


def keep_the_old_embeddings(config: Json) -> None:
    config["model"]["roi_head"]["bbox_head"]["cls_embeddings_path"] = "data/classes.npy"


def keep_one_old_background(config: Json) -> None:
    config["model"]["roi_head"]["ovd_cfg"]["kd"]["bg_cls_embeddings_path"] = "data/background.npy"


def lose_the_cache(config: Json) -> None:
    del config["model"]["roi_head"]["ovd_cfg"]["kd"]["boxes_cache"]


def lose_the_datasets(config: Json) -> None:
    config["train_dataloader"] = {"dataset": {"type": "ConcatDataset", "datasets": []}}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (swap_metainfo, "differs from number 0 on ('bicycle' for 'person')"),
        (lose_a_name, "names for {count} classes and differs from number 40 on ('cup' for 'wine glass')"),
        (override_the_top_level_only, "overlay: model.roi_head.bbox_head.num_classes is 124, not {count}"),
        (keep_metainfo_on_one_member, "overlay: training dataset 1 of 2: has no metainfo"),
        (differ_in_one_member, "overlay: the training datasets have different metainfo"),
        (list_the_names, "training dataset 0 of 2: metainfo.classes is no tuple, but list"),
        (lack_a_colour, "metainfo.palette has 80 colours for {count} classes"),
        (weigh_a_used_class_zero, "{extra} has {boxes} boxes, but weight 0: its loss becomes NaN"),
        (forget_the_background, "{count} weights for {count} classes and the background"),
        (
            keep_the_old_annotations,
            "training dataset 1 of 2: ann_file is 'hchoi/old.json', not the bundle's instances.json",
        ),
        (
            keep_the_old_embeddings,
            "cls_embeddings_path is 'data/classes.npy', not the bundle's class_embeddings_attn12.npy",
        ),
        (keep_one_old_background, "bg_cls_embeddings_path is 'data/background.npy'"),
        (lose_the_cache, "overlay: none of model.**.boxes_cache.json_path is there"),
        (lose_the_datasets, "overlay: no training dataset with an ann_file"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_planted_faults_are_found(bundle: Bundle, tmp_path: Path, harm: Callable[[Json], None], message: str) -> None:
    config = write_baron(tmp_path / "configs")
    write_files(bundle, BaronTrainer(kind="baron", config=str(config)), config)
    overlay, patched = (dict(load_resolved(bundle.folder / name)) for name in ("overlay.py", "trainer_config.py"))
    harm(overlay)
    faults = agreement(overlay, patched, bundle.classes, BARON_TARGETS, files=FILES)
    extra = bundle.classes.classes[81]
    wanted = message.format(count=len(bundle.names), extra=extra.name, boxes=extra.boxes)
    assert any(wanted in fault for fault in faults), faults
    assert any(fault.startswith("overlay and patched config differ in ") for fault in faults)
    assert not any(fault.startswith("patched config:") for fault in faults)


def test_an_overlay_of_top_level_variables_alone_is_found(bundle: Bundle, tmp_path: Path) -> None:
    config = write_baron(tmp_path / "configs")
    naive = tmp_path / "naive.py"
    naive.write_text(
        f"_base_ = [{str(config)!r}]\nnum_pls = {len(bundle.classes.extras)}\n"
        f"class_weight = {bundle.classes.class_weight}\nmetainfo = dict(classes={bundle.names})\n"
    )
    faults = agreement(load_resolved(naive), None, bundle.classes, BARON_TARGETS, files=FILES)
    for part in ("num_classes is 124", "loss_cls.class_weight: 125 weights", "has no metainfo", "ann_file is 'hchoi/"):
        assert any(part in fault for fault in faults)


# What cannot be done is said


def test_an_overlay_on_a_config_without_the_places_stops_the_trainer(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text("train_dataloader = dict(dataset=dict(ann_file='a'))\n")
    overlay = tmp_path / "overlay.py"
    overlay.write_text(make_overlay(bundle.classes, MMDET_TARGETS, str(tmp_path / "base.py")))
    with pytest.raises(ConfigError, match=r"the base config has none of model.\*\*.bbox_head.num_classes"):
        load_resolved(overlay)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_base_ = ['./nowhere.py']", r"mmengine cannot read it: .*nowhere.py"),
        ("x = (", r"mmengine cannot read it"),
        ("x = y", r"mmengine cannot read it: name 'y' is not defined"),
    ],
)
def test_a_config_that_mmengine_cannot_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"config.py: {message}"):
        load_resolved(path)


def test_a_config_that_inherits_by_import_is_left_to_the_patch(bundle: Bundle, tmp_path: Path) -> None:
    config = tmp_path / "lazy.py"
    config.write_text("from mmengine.config import read_base\nwith read_base():\n    from .data import *\n")
    notes = write_files(bundle, MmdetTrainer(kind="mmdet", config=str(config)), config)
    assert len(notes) == 1
    assert "inherits with read_base()" in notes[0]
    assert not (bundle.folder / "overlay.py").exists()


def test_places_of_files_that_the_bundle_lacks_keep_their_value(bundle: Bundle, tmp_path: Path) -> None:
    config = write_baron(tmp_path / "configs")
    settings = BaronTrainer(kind="baron", config=str(config))
    notes = write_trainer_files(
        settings, bundle.classes, config_path=config, metainfo_path=None, out=ScratchWriter(bundle.folder)
    )
    assert notes == [
        "places of class_embeddings_attn12.npy, background_embeddings_attn12.npy keep their value in the trainer's "
        "config: the bundle has no such file"
    ]
    head = load_resolved(bundle.folder / "overlay.py")["model"]["roi_head"]["bbox_head"]
    assert head["cls_embeddings_path"] == "data/metadata/classes_attn12.npy"


def test_the_patched_copy_still_finds_its_relative_bases(bundle: Bundle, tmp_path: Path) -> None:
    config = write_baron(tmp_path / "configs")
    (tmp_path / "runtime.py").write_text("log_level = 'INFO'\n")
    config.write_text(f"_base_ = '../runtime.py'  # schedule\n{config.read_text()}")
    settings = BaronTrainer(kind="baron", config=str(config))
    assert write_files(bundle, settings, config) == []
    assert load_resolved(bundle.folder / "trainer_config.py")["log_level"] == "INFO"
    text = (bundle.folder / "trainer_config.py").read_text()
    assert text.startswith(f"_base_ = '{tmp_path}/runtime.py'  # schedule\n")


@pytest.mark.parametrize(
    ("base", "place", "message"),
    [
        ("[here + 'x.py']", None, "_base_ is no list of names"),
        ("['../x.py']", "mmdet::x/y.py", "its _base_ is relative to a package"),
    ],
)
def test_a_patched_copy_that_would_lose_its_bases_is_not_written(
    bundle: Bundle, tmp_path: Path, base: str, place: str | None, message: str
) -> None:
    config = write_baron(tmp_path / "configs")
    config.write_text(f"_base_ = {base}\n{config.read_text()}")
    settings = BaronTrainer(kind="baron", config=str(config), config_at=place)
    [note] = write_files(bundle, settings, config)
    assert note.startswith("no trainer_config.py: ")
    assert message in note


def test_no_trainer_and_no_config_write_nothing(bundle: Bundle) -> None:
    before = sorted(bundle.folder.iterdir())
    for settings, notes in ((NoTrainer(), 0), (MmdetTrainer(kind="mmdet"), 1)):
        found = write_trainer_files(
            settings, bundle.classes, config_path=None, metainfo_path=None, out=ScratchWriter(bundle.folder)
        )
        assert len(found) == notes
    assert sorted(bundle.folder.iterdir()) == before


# Settings


def test_settings_are_chosen_by_kind() -> None:
    adapter = TypeAdapter[TrainerConfig](TrainerConfig)
    assert adapter.validate_python({"kind": "none"}) == NoTrainer()
    baron = adapter.validate_python({"kind": "baron"})
    assert isinstance(baron, BaronTrainer)
    assert (baron.embeddings, baron.targets) == (EmbeddingsConfig(), BARON_TARGETS)
    mmdet = adapter.validate_python({"kind": "mmdet", "targets": {"num_classes": ["model.bbox_head.num_classes"]}})
    assert isinstance(mmdet, MmdetTrainer)
    assert (mmdet.embeddings, mmdet.targets.annotations) == (None, ())


@pytest.mark.parametrize(
    "path", ["", "model.", ".model", "**.x", "model.**", "model.0", "a b", "model.*.x", "a[0]", "a\n"]
)
def test_a_path_in_another_notation_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        TargetTable(num_classes=(path,))


def test_a_config_in_a_bucket_needs_its_place_on_the_trainers_machine() -> None:
    with pytest.raises(ValidationError, match="config_at must say where it lies on the trainer's machine"):
        MmdetTrainer(kind="mmdet", config="s3://bucket/config.py")
    settings = MmdetTrainer(kind="mmdet", config="s3://bucket/config.py", config_at="mmdet::a/b.py")
    assert settings.base == "mmdet::a/b.py"
