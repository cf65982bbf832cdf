"""Real runs for tests: photographs, oracles for models, and the command as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import yaml

from mill_jobs.config import RunConfig, read_config
from mill_jobs.finalize import Finalized, finalize_run
from mill_jobs.label import Shard
from mill_jobs.run import label_shard, open_run

SAMPLE = Path(__file__).parent.parent / "data" / "coco-sample"


def write_run(folder: Path, *, images: int = 12, name: str = "run", **changes: object) -> Path:
    """Write a run file that labels the first photographs of the sample with oracles; sections are merged."""
    truth = msgspec.json.decode((SAMPLE / "instances.json").read_bytes())
    truth["images"] = sorted(truth["images"], key=lambda image: str(image["file_name"]))[:images]
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "images.json"
    listed.write_text(json.dumps({**truth, "annotations": []}))
    tree: dict[str, object] = {
        "run": name,
        "store": str(folder / "store"),
        "dataset": {"images": str(SAMPLE / "images"), "coco": str(listed)},
        "sharding": {"chunk_size": 2},
        "limits": {"outside_wait_s": 120, "heartbeat_s": 0.2},
        "recipe": {
            "name": "cotpl",
            "label": {
                "masks": {"kind": "oracle", "truth": str(SAMPLE / "instances.json")},
                "chat": {"kind": "oracle", "truth": str(SAMPLE / "instances.json")},
            },
        },
        "finalize": {"base": str(SAMPLE / "instances.json"), "base_classes": "ov-coco-48"},
    }
    for section, values in changes.items():
        old = tree.get(section)
        tree[section] = {**old, **values} if isinstance(old, dict) and isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def mill(*arguments: object, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run the command and return how it ended."""
    return start_mill(*arguments).wait_for(timeout_s)


class Running(subprocess.Popen[str]):
    """A command that is running."""

    def wait_for(self, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
        """Wait for the end; a command that hangs is killed and fails the test."""
        try:
            out, err = self.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return subprocess.CompletedProcess(self.args, self.returncode, out, err)


def start_mill(*arguments: object) -> Running:
    """Start the command."""
    command = [sys.executable, "-m", "mill_jobs.cli", *(str(argument) for argument in arguments)]
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    return Running(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def last_error(ended: "subprocess.CompletedProcess[str]") -> str:
    """Return the message of the last log line, which must be an error."""
    entry = json.loads(ended.stderr.strip().splitlines()[-1])
    assert entry["level"] == "error", entry
    return str(entry["event"])


def label_all(run_file: Path, shards: int = 1) -> RunConfig:
    """Label a run in this process, the last shard first."""
    config = read_config(run_file)
    for shard in reversed(range(shards)):
        label_shard(config, Shard(shard, shards))
    return config


def finalize(config: RunConfig) -> Finalized:
    """Finalize a run in this process."""
    store, plan = open_run(config)
    return finalize_run(config, plan, store)


def final_files(config: RunConfig, final: Finalized) -> dict[str, bytes]:
    """Return the files of a final."""
    folder = Path(config.store) / final.manifest.run / "final" / final.digest
    return {path.name: path.read_bytes() for path in folder.iterdir()}
