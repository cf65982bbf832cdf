"""What the finalize pod tells while it waits, and when it goes on: a real run in a real store, a scripted API."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mill_jobs.config import read_config
from mill_jobs.label import Shard
from mill_jobs.run import label_shard
from mill_k8s.client import Cluster
from mill_k8s.progress import StatusLine
from mill_k8s.waiting import StoreView, first_images, wait_for_label
from runs import write_run

LABEL = "GET /apis/batch/v1/namespaces/mill/jobs/run-label-1"
PODS = "GET /api/v1/namespaces/mill/pods"


def label_job(end: str | None = None, *, suspend: bool = False, options: str = "") -> tuple[int, object]:
    conditions = [{"type": end, "status": "True", "reason": "FailedIndexes", "message": "2 shards given up"}]
    return 200, {
        "metadata": {
            "name": "run-label-1",
            "labels": {"labelmill/run": "run", "labelmill/attempt": "1", "app.kubernetes.io/component": "label"},
            "annotations": {"labelmill/shards": "3", "labelmill/options": options},
        },
        "spec": {"completions": 3, "parallelism": 3, "suspend": suspend},
        "status": {"active": 3, "conditions": conditions if end else [], "failedIndexes": "1"},
    }


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.sleeps = 1_000_000.0, 0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        assert self.sleeps < 100, "waits for ever"

    def __call__(self) -> float:
        return self.now


def waited(cluster: Cluster, view: StoreView) -> tuple[list[StatusLine], Clock]:
    lines: list[str] = []
    clock = Clock()
    wait_for_label(cluster, "run", 1, view, lines.append, sleep=clock.sleep, clock=clock)
    return [msgspec.json.decode(line, type=StatusLine) for line in lines], clock


@pytest.fixture
def view(tmp_path: Path) -> StoreView:
    return StoreView(read_config(write_run(tmp_path, images=11)), "run")


def test_progress_comes_from_heartbeats_and_for_the_rest_from_the_chunks(tmp_path: Path) -> None:
    run_file = write_run(tmp_path, images=11)
    config = read_config(run_file)
    label_shard(config, Shard(0, 3), first=7)
    found = StoreView(config, "run").progress(3, None, 0)
    assert (found.images, found.done) == (11, 4)
    assert found.shards == {"done": 1, "not started": 2}
    assert StoreView(config, "run").progress(3, 7, 0).images == 8, "whole chunks"
    other = StoreView(config, "run").progress(2, None, 0)
    assert (other.done, dict(other.shards)) == (4, {"not started": 2}), "another count of shards counts the chunks"


def test_it_goes_on_when_the_label_job_is_complete(api: Any, cluster: Cluster, view: StoreView) -> None:
    api.say(PODS, (200, {"items": []}))
    api.say(LABEL, label_job(), label_job(), label_job("Complete"))
    lines, clock = waited(cluster, view)
    assert [line.label for line in lines] == ["active", "complete"]
    assert lines[0].progress is None, "not planned yet is nothing to fail for"
    assert clock.sleeps == 2


def test_a_status_line_comes_every_half_minute(api: Any, cluster: Cluster, view: StoreView) -> None:
    api.say(PODS, (200, {"items": []}))
    api.say(LABEL, *[label_job()] * 13, label_job("Complete"))
    lines, _ = waited(cluster, view)
    seconds = [(line.at - lines[0].at).total_seconds() for line in lines]
    assert seconds == [0, 30, 60, 65]


def test_a_suspended_job_and_a_failing_api_are_not_the_end(api: Any, cluster: Cluster, view: StoreView) -> None:
    api.say(PODS, (403, {"message": "forbidden"}))
    busy, forbidden = (503, {"message": "overloaded"}), (403, {"message": "forbidden"})
    missing = (404, {"message": "not found"})
    suspended = label_job(suspend=True)
    api.say(LABEL, busy, suspended, forbidden, missing, missing, suspended, busy, missing, label_job("Complete"))
    lines, clock = waited(cluster, view)
    assert clock.sleeps == 8
    assert (lines[0].label, lines[-1].label) == ("suspended", "complete")


def test_a_job_that_is_gone_ends_the_wait(api: Any, cluster: Cluster, view: StoreView) -> None:
    lines, clock = waited(cluster, view)
    assert lines[-1].label == "gone"
    assert clock.sleeps == 2


def test_how_labelling_failed_is_said_before_finalize_starts(
    api: Any, cluster: Cluster, view: StoreView, capsys: pytest.CaptureFixture[str]
) -> None:
    from mill_shared.logs import configure_logs

    error = json.dumps({"level": "error", "event": "no such bucket"})
    terminated = {"exitCode": 75, "message": error}
    failed = {
        "metadata": {"name": "p"},
        "status": {"phase": "Failed", "containerStatuses": [{"name": "worker", "state": {"terminated": terminated}}]},
    }
    api.say(PODS, (200, {"items": [failed, failed]}))
    api.say(LABEL, label_job("Failed"))
    configure_logs()
    waited(cluster, view)
    said = json.loads(capsys.readouterr().err.strip().splitlines()[-1])
    assert said["level"] == "error"
    assert said["message"] == "2 shards given up"
    assert said["pods_said"] == {"exit 75: no such bucket": 2}
    assert said["shards_given_up"] == "1"


@pytest.mark.parametrize(("options", "first"), [("", None), ("--repair", None), ("--one-by-one --first=64", 64)])
def test_a_pilot_is_known_by_its_options(options: str, first: int | None) -> None:
    assert first_images(options) == first
