"""Whole runs on real photographs, with oracles for models: same bytes, kills, repairs, later passes, exit codes."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from mill_jobs.config import read_config
from mill_jobs.final import read_refs
from mill_jobs.label import Shard
from mill_jobs.run import label_shard, open_run, plan_again
from mill_jobs.verify import verify_run
from mill_shared.errors import ConfigError, CorruptError, CoverageError, ExitCode
from mill_shared.keys import RunKeys
from mill_shared.storage import LocalStore
from runs import SAMPLE, final_files, finalize, label_all, last_error, mill, start_mill, write_run


@pytest.mark.parametrize("shards", [3, 7])
def test_finals_are_byte_identical_for_any_number_of_shards(tmp_path: Path, shards: int) -> None:
    one, many = label_all(write_run(tmp_path / "one")), label_all(write_run(tmp_path / "many"), shards)
    assert final_files(one, finalize(one)) == final_files(many, finalize(many))


def test_a_final_again_is_the_same_final(tmp_path: Path) -> None:
    config = label_all(write_run(tmp_path))
    first, second = finalize(config), finalize(config)
    assert (first.digest, first.manifest) == (second.digest, second.manifest)
    assert len(read_refs(LocalStore(Path(config.store)), "run")) == 1


def test_other_thresholds_make_another_final_of_the_same_labels(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    config = label_all(path)
    first = finalize(config)
    other = finalize(read_config(path, ("recipe.finalize.selection.by=top_k", "recipe.finalize.selection.k=1")))
    assert first.digest != other.digest
    assert first.manifest.chunks == other.manifest.chunks
    assert other.is_latest


def test_a_killed_worker_loses_at_most_the_chunk_in_hand(tmp_path: Path) -> None:
    calm = label_all(write_run(tmp_path / "calm", images=45))
    path = write_run(tmp_path / "killed", images=45)
    chunks = tmp_path / "killed" / "store" / "run" / "pass-0" / "chunks"
    worker = start_mill("label", path)
    deadline = time.monotonic() + 60
    while len(list(chunks.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait_for().returncode == -signal.SIGKILL
    done = {file.name: file.read_bytes() for file in chunks.glob("*.parquet")}
    assert 3 <= len(done) < 23
    assert mill("label", path).returncode == 0
    config = read_config(path)
    assert {name: (chunks / name).read_bytes() for name in done} == done, "what was committed stays"
    assert final_files(config, finalize(config)) == final_files(calm, finalize(calm))


def test_sigterm_ends_a_worker_at_once_and_not_with_zero(tmp_path: Path) -> None:
    worker = start_mill("label", write_run(tmp_path, images=45))
    time.sleep(1.0)
    asked = time.monotonic()
    worker.terminate()
    ended = worker.wait_for(10)
    assert ended.returncode in (-signal.SIGTERM, ExitCode.INTERRUPTED)
    assert time.monotonic() - asked < 5


def test_two_workers_on_one_shard_and_two_finalizes_at_once(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    assert [worker.wait_for().returncode for worker in (start_mill("label", path), start_mill("label", path))] == [0, 0]
    ends = [worker.wait_for() for worker in (start_mill("finalize", path), start_mill("finalize", path))]
    assert [end.returncode for end in ends] == [0, 0], ends
    store, plan = open_run(read_config(path))
    assert verify_run(store, plan).problems == []
    assert len(read_refs(store, "run")) == 1


def test_mill_local_does_it_all_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    ended = mill("local", path, "--workers", 2, "--truth", SAMPLE / "instances.json")
    assert ended.returncode == 0, ended.stderr
    assert "10 ok, 2 empty" in ended.stdout
    assert "rightly named" in ended.stdout
    again = mill("local", path, "--workers", 3)
    assert again.returncode == 0, again.stderr
    assert "chunk committed" not in again.stderr
    one = label_all(write_run(tmp_path / "one"))
    config = read_config(path)
    assert final_files(config, finalize(config)) == final_files(one, finalize(one))


def damage(path: Path) -> Path:
    chunk = Path(read_config(path).store) / "run" / "pass-0" / "chunks" / "000003.parquet"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 0xFF
    chunk.write_bytes(bytes(data))
    return chunk


def test_a_damaged_chunk_counts_as_missing_until_it_is_repaired(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    config = label_all(path)
    whole = finalize(config)
    chunk = damage(path)
    ended = mill("verify", path)
    assert ended.returncode == ExitCode.CORRUPT
    assert (
        "pass 0, chunk 3: the chunk's bytes do not match its digest; label the run again with --repair" in ended.stderr
    )
    ended = mill("finalize", path)
    assert ended.returncode == ExitCode.COVERAGE
    assert "2 of 12 images have no record (coverage 0.8333" in last_error(ended)
    assert "chunks 3 (the chunk's bytes do not match its digest)" in last_error(ended)
    assert "base annotations on these images: " in last_error(ended)
    assert mill("label", path, "--repair").returncode == 0
    assert mill("verify", path).returncode == 0
    assert finalize(config).digest == whole.digest
    assert chunk.exists()


def test_an_incomplete_run_may_be_finalized_where_the_limits_allow_and_a_worse_final_is_not_the_latest(
    tmp_path: Path,
) -> None:
    path = write_run(tmp_path)
    config = label_all(path)
    whole = finalize(config)
    damage(path)
    partial = finalize(read_config(path, ("limits.min_coverage=0.5",)))
    assert partial.manifest.records["missing"] == 2
    assert not partial.is_latest
    assert read_refs(LocalStore(Path(config.store)), "run")[-1].final == whole.digest


def broken_dataset(tmp_path: Path) -> tuple[Path, Path]:
    images = tmp_path / "images"
    images.mkdir()
    for source in sorted((SAMPLE / "images").iterdir())[:12]:
        shutil.copy(source, images)
    bad = sorted(images.iterdir())[4]
    bad.write_bytes(bad.read_bytes()[:5000])
    return write_run(tmp_path, dataset={"images": str(images)}), bad


def test_failed_images_are_labelled_again_in_the_next_pass(tmp_path: Path) -> None:
    path, bad = broken_dataset(tmp_path)
    config = label_all(path)
    with pytest.raises(
        CoverageError, match=rf"1 of 12 images failed .*1 truncated; {bad.name} \(truncated\): mend them"
    ):
        finalize(config)
    shutil.copy(SAMPLE / "images" / bad.name, bad)
    assert plan_again(config, ("missing",)) == 0, "no image failed for that reason"
    assert plan_again(config, ()) == 1
    label_shard(config, Shard(0, 1))
    final = finalize(config)
    assert final.manifest.records == {"ok": 10, "empty": 2, "failed": 0, "missing": 0}
    assert final.manifest.passes == 2
    store, plan = open_run(config)
    assert verify_run(store, plan).problems == []
    clean = label_all(write_run(tmp_path / "clean"))
    written = (final_files(config, final), final_files(clean, finalize(clean)))
    assert written[0]["instances.json"] == written[1]["instances.json"]


def test_failed_images_are_not_planned_again_while_a_worker_is_at_work(tmp_path: Path) -> None:
    path, _ = broken_dataset(tmp_path)
    config = label_all(path)
    beat = Path(config.store) / RunKeys("run").heartbeat(0, 0, 1)
    entry = json.loads(beat.read_text())
    beat.write_text(json.dumps({**entry, "state": "working", "updated_at": time.time() + 60}))
    with pytest.raises(ConfigError, match=r"run run is being labelled now \(shard 0/1 on "):
        plan_again(config, ())
    beat.write_text(json.dumps({**entry, "state": "working", "updated_at": time.time() - 60}))
    assert plan_again(config, ()) == 1, "a worker that was not heard of for long is gone"


def test_a_pass_is_not_planned_before_the_one_before_is_complete(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    config = read_config(path)
    label_shard(config, Shard(0, 2))
    with pytest.raises(ConfigError, match="3 chunks are not labelled yet, the first is chunk 1 of pass 0"):
        plan_again(config, ())


def test_fetch_brings_a_verified_final_and_refuses_a_damaged_one(tmp_path: Path) -> None:
    from mill_jobs.final import fetch_final

    config = label_all(write_run(tmp_path))
    final = finalize(config)
    store, _ = open_run(config)
    fetch_final(store, "run", final.digest, tmp_path / "bundle")
    assert {p.name: p.read_bytes() for p in (tmp_path / "bundle").iterdir()} == final_files(config, final)
    stored = Path(config.store) / "run" / "final" / final.digest / "instances.json"
    stored.write_bytes(stored.read_bytes() + b" ")
    with pytest.raises(CorruptError, match=r"instances\.json: does not match the manifest's SHA-256"):
        fetch_final(store, "run", final.digest, tmp_path / "other")
    assert not (tmp_path / "other" / "instances.json").exists()
    with pytest.raises(ConfigError, match="no final beef"):
        fetch_final(store, "run", "beef", tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("recipe.label.maks=1", ExitCode.CONFIG, "recipe.label.maks: Extra inputs are not permitted"),
        ("dataset.images=/nowhere", ExitCode.CONFIG, "dataset.images: no such folder: /nowhere"),
        ("dataset.coco=/nowhere.json", ExitCode.CONFIG, "dataset.coco: "),
        (
            "recipe.label.masks={kind: sam, checkpoint: /nowhere.pth}",
            ExitCode.CONFIG,
            "/nowhere.pth: no such file or folder; put the weights there",
        ),
        ("recipe.label.chat.truth=/nowhere.json", ExitCode.CONFIG, "/nowhere.json: no such file or folder"),
        ("recipe.label.prompts=/nowhere.yaml", ExitCode.CONFIG, "prompts file /nowhere.yaml"),
        ("store=/proc/nowhere", ExitCode.OUTSIDE, "/proc/nowhere"),
    ],
)
def test_errors_that_are_everyones_stop_at_once_with_one_clear_line(
    tmp_path: Path, change: str, code: ExitCode, message: str
) -> None:
    ended = mill("label", write_run(tmp_path, limits={"outside_wait_s": 0}), "--set", change)
    assert ended.returncode == code, ended.stderr
    assert message in last_error(ended)
    assert "Traceback" not in ended.stderr


def test_another_identity_under_the_same_id_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    label_all(path)
    ended = mill("label", path, "--set", "dataset.max_side=512")
    assert ended.returncode == ExitCode.CONFIG
    assert "dataset.max_side: 1024 in the plan, 512 now" in last_error(ended)
    assert mill("finalize", path, "--set", "dataset.max_side=512").returncode == ExitCode.CONFIG
