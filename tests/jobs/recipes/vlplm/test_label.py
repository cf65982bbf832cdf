"""Real pictures, a real proposal network and a real CLIP, tiny and random: from pixels to finals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mill_jobs.config import RunConfig, read_config
from mill_jobs.finalize import finalize_run
from mill_jobs.importing import import_labels
from mill_jobs.label import Shard
from mill_jobs.recipes.base import Sample
from mill_jobs.recipes.choose import build_labeller
from mill_jobs.recipes.vlplm.label import VlplmLabeller
from mill_jobs.run import label_shard, open_run
from mill_jobs.trainer.check import check_bundle
from mill_shared.errors import ConfigError
from mill_shared.pictures import decode_picture
from mill_shared.presets import OV_COCO_17
from mill_shared.records import ImageRecord
from runs import SAMPLE, final_files, mill
from tiny_clip import PROJECTED, save_clip
from tiny_rpn import save_proposals

PICTURES = ("000000000790.jpg", "000000159269.jpg", "000000196610.jpg")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_proposals(folder / "proposals.pth")
    save_clip(folder / "clip")
    return folder


@pytest.fixture(autouse=True)
def forget_determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def run_file(folder: Path, models: Path, *, label: dict[str, Any] | None = None, **recipe: Any) -> Path:
    """Write a run file for three photographs."""
    truth = json.loads((SAMPLE / "instances.json").read_text())
    truth["images"] = [image for image in truth["images"] if image["file_name"] in PICTURES]
    ids = {image["id"] for image in truth["images"]}
    truth["annotations"] = [item for item in truth["annotations"] if item["image_id"] in ids]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gt.json").write_text(json.dumps(truth))
    quick = {"device": "cpu", "threads": 1}
    tree = {
        "run": "scored",
        "store": str(folder / "store"),
        "dataset": {"images": str(SAMPLE / "images"), "coco": str(folder / "gt.json")},
        "sharding": {"chunk_size": 1},
        "recipe": {
            "name": "vlplm",
            "label": {
                "proposals": {
                    **quick, "checkpoint": str(models / "proposals.pth"), "short_side_px": 96, "long_side_px": 160,
                    "per_level": 100, "kept": 12, "passes": 2, "keep_before_refining": True,
                },
                "clip": {**quick, "model": str(models / "clip")},
                **(label or {}),
            },
            "finalize": {"threshold": 0.05},
            **recipe,
        },
        "finalize": {"base": str(folder / "gt.json"), "base_classes": "ov-coco-48"},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def records_of(path: Path, max_side: int = 1024) -> list[ImageRecord]:
    config = read_config(path)
    labeller = build_labeller(config)
    samples = []
    for row, name in enumerate(PICTURES):
        data = (SAMPLE / "images" / name).read_bytes()
        picture = decode_picture(data, max_side=max_side, max_pixels=10**8)
        samples.append(
            Sample(row, int(name[:12]), name, picture.image_rgb, picture.width, picture.height, picture.scale)
        )
    return [outcome.record for outcome in labeller.label(samples)]


def labelled(config: RunConfig, shards: int) -> RunConfig:
    for shard in reversed(range(shards)):
        label_shard(config, Shard(shard, shards))
    return config


def test_every_proposal_is_scored_with_its_evidence(tmp_path: Path, models: Path) -> None:
    for record in records_of(run_file(tmp_path, models)):
        assert record.status == "ok"
        assert len(record.regions) + len(record.dropped) == 12
        sure = [float(region.evidence["objectness"]) for region in record.regions]
        assert sure == sorted(sure, reverse=True)
        for region in record.regions:
            shares = region.evidence["probabilities"]
            assert len(shares) == 17
            assert sum(shares) == pytest.approx(1, abs=1e-4)
            assert region.score == max(shares)
            assert region.label == OV_COCO_17[int(np.argmax(shares))]
            x0, y0, x1, y1 = region.box_xyxy
            assert 0 <= x0 <= x1 - 5
            assert 0 <= y0 <= y1 - 5
            assert record.width is not None
            assert record.height is not None
            assert x1 <= record.width
            assert y1 <= record.height
            assert (region.evidence["distractor_mass"], region.evidence["feature"]) == (None, None)


def test_distractors_take_probability_and_are_never_a_label(tmp_path: Path, models: Path) -> None:
    plain = records_of(run_file(tmp_path, models))
    with_them = records_of(run_file(tmp_path, models, label={"distractors": ["person", "background"]}))
    for before, after in zip(plain, with_them, strict=True):
        for a, b in zip(before.regions, after.regions, strict=True):
            assert b.label == a.label
            shares, mass = np.array(b.evidence["probabilities"]), b.evidence["distractor_mass"]
            assert 0 < mass < 1
            assert shares.sum() + mass == pytest.approx(1, abs=1e-4)
            assert shares / (1 - mass) == pytest.approx(a.evidence["probabilities"], rel=1e-3, abs=1e-6)


def test_features_can_be_kept_to_score_other_names(tmp_path: Path, models: Path) -> None:
    path = run_file(tmp_path, models, label={"store_features": True})
    labeller = build_labeller(read_config(path))
    assert isinstance(labeller, VlplmLabeller)
    region = records_of(path)[0].regions[0]
    feature = np.frombuffer(region.evidence["feature"], "<f2").astype(np.float32)
    assert feature.shape == (PROJECTED,)
    logits = labeller._texts @ feature * 100
    again = np.exp(logits - logits.max())
    assert again / again.sum() == pytest.approx(region.evidence["probabilities"], abs=0.05)


def test_square_crops_change_what_clip_sees_and_nothing_else(tmp_path: Path, models: Path) -> None:
    plain = records_of(run_file(tmp_path, models))
    square = records_of(run_file(tmp_path, models, label={"square_crops": True}))
    pairs = [(a, b) for x, y in zip(plain, square, strict=True) for a, b in zip(x.regions, y.regions, strict=True)]
    assert all(a.box_xyxy == b.box_xyxy for a, b in pairs)
    assert any(a.score != b.score for a, b in pairs)


def test_short_sides_are_measured_in_the_original_picture(tmp_path: Path, models: Path) -> None:
    path = run_file(tmp_path, models, label={"min_side_px": 300})
    for record in records_of(path, max_side=128):
        assert record.width is not None
        scale = 128 / max(record.width, record.height or 0)
        for region in record.regions:
            x0, y0, x1, y1 = region.box_xyxy
            assert min(x1 - x0, y1 - y0) >= 300 * scale - 1e-6
        assert record.dropped


def test_finals_are_the_same_bytes_for_any_number_of_shards(tmp_path: Path, models: Path) -> None:
    finals = []
    for shards in (1, 3):
        config = labelled(read_config(run_file(tmp_path / str(shards), models)), shards)
        store, plan = open_run(config)
        finals.append(final_files(config, finalize_run(config, plan, store)))
    one, three = finals
    assert one == three
    summary = json.loads(one["summary.json"])
    assert summary["steps"][-1]["left"] > 0


def test_our_scores_finalize_in_the_originals_way_and_come_back(tmp_path: Path, models: Path) -> None:
    path = run_file(tmp_path, models, finalize={"threshold": 0.05, "score_files": True})
    config = labelled(read_config(path), 1)
    store, plan = open_run(config)
    final = tmp_path / "store" / "scored" / "final" / finalize_run(config, plan, store).digest
    assert check_bundle(final).faults == ()
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "CLIP_scores_2.json").write_bytes((final / "CLIP_scores_2.json").read_bytes())
    tree = yaml.safe_load(path.read_text())
    tree["run"] = "imported"
    del tree["recipe"]["label"]
    (tmp_path / "imported.yaml").write_text(yaml.safe_dump(tree))
    again = read_config(tmp_path / "imported.yaml")
    assert import_labels(again, tmp_path / "scores") == (3, 0)
    store, plan = open_run(again)
    second = tmp_path / "store" / "imported" / "final" / finalize_run(again, plan, store).digest
    for name in ("pseudo_labels.json", "CLIP_scores_2.json", "instances.json"):
        assert (second / name).read_bytes() == (final / name).read_bytes(), name


def test_the_commands_do_the_whole_run(tmp_path: Path, models: Path) -> None:
    path = run_file(tmp_path, models)
    ended = mill("local", path, "--workers", 1, "--truth", SAMPLE / "instances.json")
    assert ended.returncode == 0, ended.stderr
    other = mill("finalize", path, "--set", "recipe.finalize={profile: marvelovd, threshold: 0.07}")
    assert other.returncode == 0, other.stderr
    assert len(list((tmp_path / "store" / "scored" / "final").glob("*/manifest.json"))) == 2


def test_other_weights_are_another_run(tmp_path: Path, models: Path) -> None:
    path = run_file(tmp_path, models)
    before = read_config(path).recipe.content()
    save_proposals(tmp_path / "other.pth", seed=4)
    change = f"recipe.label.proposals.checkpoint={tmp_path / 'other.pth'}"
    after = read_config(path, (change,)).recipe.content()
    assert [name for name in before if before[name] != after[name]] == ["label.proposals.checkpoint"]
    assert read_config(path).identity() == read_config(path, (change,)).identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe.label.distractors=[dog]", r"recipe: .*label\.distractors: also among the targets: dog"),
        ("recipe.targets=[dog, dog]", r"recipe\.targets: .*listed twice: dog"),
        ("recipe.targets=[]", r"recipe\.targets: .*a list of class names"),
        ("recipe.finalize={profile: marvelovd, objectness_weight: 0.3}", r"has no effect with profile=marvelovd"),
        ("recipe.label.crop_scales=[]", r"recipe\.label\.crop_scales"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, models: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(run_file(tmp_path, models), (change,))
