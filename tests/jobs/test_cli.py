"""The command line: usage errors, what each command prints, and commands that nothing else tests."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mill_jobs.cli import mill as command
from mill_jobs.config import read_config
from runs import SAMPLE, finalize, label_all, mill, write_run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--reason", "missing"], "--reason goes with --again"),
        (["label", "--shard", "3/3"], "shard 3/3: expected s/S with 0 <= s < S"),
        (["label", "--shards", "3"], "--shards needs JOB_COMPLETION_INDEX in the environment"),
        (["evaluate"], "Missing option '--truth'"),
        (["local", "--workers", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_is_explained_with_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    ended = CliRunner().invoke(command, [arguments[0], str(write_run(tmp_path)), *arguments[1:]])
    assert ended.exit_code == 2
    assert message in ended.output


def test_a_run_file_that_does_not_exist_is_a_usage_error() -> None:
    ended = CliRunner().invoke(command, ["plan", "nowhere.yaml"])
    assert ended.exit_code == 2
    assert "File 'nowhere.yaml' does not exist" in ended.output


def test_the_completion_index_of_kubernetes_is_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert CliRunner().invoke(command, ["label", str(path), "--shards", "3"]).exit_code == 0
    chunks = Path(read_config(path).store) / "run" / "pass-0" / "chunks"
    assert sorted(file.name for file in chunks.iterdir()) == ["000001.parquet", "000004.parquet"]


def test_plan_says_what_the_run_is(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    first, second = mill("plan", path), mill("plan", path)
    assert first.stdout == second.stdout
    assert first.stdout.startswith("run run: 12 images in 6 chunks, label digest ")


def test_a_run_without_an_id_gets_the_recipe_and_its_digest(tmp_path: Path) -> None:
    path = write_run(tmp_path, run=None)
    planned = mill("plan", path)
    assert planned.stdout.startswith("run cotpl-")
    assert mill("local", path, "--workers", 1).returncode == 0
    assert mill("verify", path).returncode == 0


def test_diff_shows_what_other_thresholds_change(tmp_path: Path) -> None:
    path = write_run(tmp_path, images=45)
    config = label_all(path)
    first = finalize(config)
    second = finalize(read_config(path, ("recipe.finalize.selection.at_least=1",)))
    shown = mill("diff", path, first.digest)
    assert shown.returncode == 0, shown.stderr
    assert "couch" in shown.stdout
    found = json.loads(mill("diff", path, first.digest, second.digest, "--json").stdout)
    assert found["classes"]
    assert found["boxes"]
    same = json.loads(mill("diff", path, first.digest, first.digest, "--json").stdout)
    assert same["classes"] == []
    assert same["boxes"] == []


def test_split_writes_a_base_and_a_novel_file(tmp_path: Path) -> None:
    base, novel = tmp_path / "base.json", tmp_path / "novel.json"
    ended = mill("split", SAMPLE / "instances.json", "--base-classes", "ov-coco-48", "--base", base, "--novel", novel)
    assert ended.returncode == 0, ended.stderr
    whole, kept, rest = (json.loads(path.read_text()) for path in (SAMPLE / "instances.json", base, novel))
    assert len(kept["annotations"]) + len(rest["annotations"]) == len(whole["annotations"])
    assert len(kept["annotations"]) == 353
    assert kept["categories"] == whole["categories"]


def test_import_takes_the_originals_shards_and_finalizes_them(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    entry = {
        "790": {
            "foreground": {"bbox": [[10, 20, 120, 100], [5, 5, 110, 110]], "category": ["otter", "otter"]},
            "background": {"bbox": [[0, 0, 300, 90]], "category": ["sky"]},
        }
    }
    (shards / "10000.json").write_text(json.dumps(entry))
    path = write_run(tmp_path, images=2, recipe={"label": None}, limits={"max_failed": 1.0})
    ended = mill("import", "cotpl", shards, path)
    assert ended.returncode == 0, ended.stderr
    assert "1 images imported, 1 of the dataset are not in" in ended.stdout
    assert mill("finalize", path).returncode == 0
    target = tmp_path / "bundle"
    assert mill("fetch", path, "--to", target, "--file", "instances.json").returncode == 0
    written = json.loads((target / "instances.json").read_text())
    otters = [item for item in written["annotations"] if item["id"] >= 909_000_554_146]
    assert [item["bbox"] for item in otters] == [[10, 20, 120, 100], [5, 5, 110, 110]]
    assert mill("label", path).returncode == 78, "there is nothing to label"


def test_try_labels_a_few_images_without_touching_the_store(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    ended = mill("try", path, "--images", 4, "--to", tmp_path / "pictures")
    assert ended.returncode == 0, ended.stderr
    assert "all 12 images: " in ended.stdout
    assert (tmp_path / "pictures" / "index.png").stat().st_size > 10_000
    assert not (tmp_path / "store").exists()


def test_evaluate_prints_scores_and_stores_them(tmp_path: Path) -> None:
    path = write_run(tmp_path, images=45)
    config = label_all(path)
    final = finalize(config)
    ended = mill("evaluate", path, "--truth", SAMPLE / "instances.json")
    assert ended.returncode == 0, ended.stderr
    assert "recall" in ended.stdout
    (stored,) = (Path(config.store) / "run" / "eval").glob(f"{final.digest}-*/evaluation.json")
    scores = json.loads(stored.read_text())["subsets"]["all"]
    assert scores["precision"] == 1.0, "oracles are never wrong"
    assert 0 < scores["recall"] < 1, "small instances are not asked about"
