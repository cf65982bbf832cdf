"""A final made for a trainer: complete, checked, and every planted fault of its own files is caught."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mill_jobs.config import RunConfig
from mill_jobs.final import Manifest, fetch_final
from mill_jobs.finalize import finalize_run
from mill_jobs.trainer.check import check_bundle
from mill_shared.errors import ConfigError
from mmdet_stack import baron_files
from oracle_run import OracleRun, make_oracle_run
from runs import mill
from tiny_clip import save_clip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OracleRun:
    made = make_oracle_run(tmp_path_factory.mktemp("run"))
    tree = made.config.model_dump(mode="json")
    tree["recipe"]["finalize"]["synonyms"] = {"couch": "settee", "keyboard": "clavier"}
    return replace(made, config=RunConfig.model_validate(tree))


def with_trainer(run: OracleRun, **trainer: object) -> RunConfig:
    tree = run.config.model_dump(mode="json")
    tree["finalize"]["trainer"] = trainer
    return RunConfig.model_validate(tree)


def publish(run: OracleRun, config: RunConfig, folder: Path) -> tuple[Path, Manifest]:
    final = finalize_run(config, run.plan, run.store)
    fetch_final(run.store, run.plan.run, final.digest, folder)
    return folder, final.manifest


def write_config(folder: Path) -> Path:
    """Write a config in the manner of CoT-PL's over BARON."""
    folder.mkdir()
    (folder / "main.py").write_text("".join(baron_files()))
    return folder / "main.py"


@pytest.fixture(scope="module")
def baron(run: OracleRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("baron")
    trainer = {
        "kind": "baron", "config": str(write_config(folder / "configs")),
        "embeddings": {"clip": str(save_clip(folder / "clip"))},
    }  # fmt: skip
    return publish(run, with_trainer(run, **trainer), folder / "bundle")


@pytest.fixture
def bundle(baron: tuple[Path, Manifest], tmp_path: Path) -> Path:
    """A copy to be broken; without the manifest, whose digests would see any change."""
    shutil.copytree(baron[0], tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_for_baron_is_complete_and_whole(baron: tuple[Path, Manifest]) -> None:
    folder, manifest = baron
    assert manifest.missing == []
    assert {path.name for path in folder.iterdir()} >= {
        "overlay.py", "trainer_config.py", "class_embeddings.npy", "class_embeddings_attn12.npy",
        "background_embeddings.npy", "background_embeddings_attn12.npy", "embeddings.json",
    }  # fmt: skip
    checked = check_bundle(folder)
    assert checked.faults == ()
    assert checked.warnings == ()
    assert len(np.load(folder / "class_embeddings_attn12.npy")) == checked.classes == 82


def test_without_clip_the_bundle_says_that_it_is_incomplete(run: OracleRun, tmp_path: Path) -> None:
    config = with_trainer(run, kind="baron", config=str(write_config(tmp_path / "configs")))
    folder, manifest = publish(run, config, tmp_path / "bundle")
    assert any("class_embeddings.npy is missing" in line for line in manifest.missing)
    summary = json.loads((folder / "summary.json").read_bytes())
    assert any(note.startswith("incomplete: ") and "embeddings.clip" in note for note in summary["notes"])
    assert not list(folder.glob("*.npy"))


def test_the_same_clip_elsewhere_gives_the_same_final(run: OracleRun, tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        clip = save_clip(tmp_path / name)
        config = with_trainer(run, kind="baron", embeddings={"clip": str(clip)})
        digests.add(finalize_run(config, run.plan, run.store).digest)
    assert len(digests) == 1
    other = with_trainer(run, kind="baron", embeddings={"clip": str(save_clip(tmp_path / "c", seed=2))})
    assert finalize_run(other, run.plan, run.store).digest not in digests


def test_a_trainer_file_that_is_missing_is_named(run: OracleRun, tmp_path: Path) -> None:
    config = with_trainer(run, kind="mmdet", config=str(tmp_path / "nowhere.py"))
    with pytest.raises(ConfigError, match=r"finalize\.trainer\.config: no such file: .*nowhere\.py"):
        finalize_run(config, run.plan, run.store)


def edit_array(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        np.save(folder / name, change(np.load(folder / name)))

    return edit


def edit_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return edit


def swap_rows(rows: Any) -> Any:
    rows[[3, 4]] = rows[[4, 3]]
    return rows


def poison(rows: Any) -> Any:
    rows[0, 0] = np.nan
    return rows


ROWS = "class_embeddings_attn12.npy"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an embedding row short": (edit_array(ROWS, lambda rows: rows[:-1]), "81 rows for 82 classes"),
    "a row too many": (edit_array(ROWS, lambda rows: np.concatenate([rows, rows[:1]])), "83 rows for 82"),
    "two rows swapped": (edit_array(ROWS, swap_rows), "rows of motorcycle, airplane are not those"),
    "float32": (edit_array(ROWS, lambda rows: rows.astype(np.float32)), "float32 of shape"),
    "not finite": (edit_array(ROWS, poison), "not finite"),
    "a background of another width": (
        edit_array("background_embeddings_attn12.npy", lambda rows: rows[:, :-1]), "columns",
    ),
    "no background row": (edit_array("background_embeddings.npy", lambda rows: rows[:0]), "expected float16"),
    "a lost embedding file": (lambda folder: (folder / ROWS).unlink(), f"{ROWS}: missing"),
    "names in the overlay swapped": (
        edit_text("overlay.py", "'bicycle', 'car'", "'car', 'bicycle'"), "overlay: training dataset",
    ),
    "a class less in the patched config": (
        edit_text("trainer_config.py", "num_pls = 2", "num_pls = 1"), "patched config",
    ),
    "another annotation file in the overlay": (
        edit_text("overlay.py", "instances.json", "instances_v0.json"), "not the bundle's instances.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_of_the_trainers_files_is_found(bundle: Path, name: str) -> None:
    plant, expected = FAULTS[name]
    plant(bundle)
    faults = check_bundle(bundle).faults
    assert any(expected in fault for fault in faults), faults


def test_the_command_names_the_faults_and_ends_with_its_code(bundle: Path) -> None:
    assert mill("check-bundle", bundle).returncode == 0
    edit_array(ROWS, lambda rows: rows[:-1])(bundle)
    ended = mill("check-bundle", bundle)
    assert ended.returncode == 81
    assert "81 rows for 82 classes" in ended.stderr
