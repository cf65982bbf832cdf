"""What status makes of Jobs, pods and heartbeats."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from mill_k8s.manifests import CANCELLED_NOTE
from mill_k8s.progress import (
    Attempt,
    Job,
    Pod,
    Progress,
    StatusLine,
    attempts_of,
    count_shards,
    duration,
    faults_of,
    last_status_line,
    parse_indexes,
    run_status,
    status_lines,
    stuck_pods,
    summarise,
)
from mill_shared.heartbeat import Heartbeat

NOW = datetime(2026, 11, 21, 3, 0, tzinfo=UTC)


def job(
    kind: str = "label", attempt: int = 1, *, end: str | None = None, reason: str = "", message: str = "",
    suspend: bool = False, cancelled: bool = False, shards: int = 12, **status: Any,
) -> Job:  # fmt: skip
    conditions = [{"type": end, "status": "True", "reason": reason, "message": message}] if end else []
    notes = {CANCELLED_NOTE: "now"} if cancelled else {}
    return msgspec.convert(
        {
            "metadata": {
                "name": f"birds-{kind}-{attempt}",
                "labels": {
                    "labelmill/run": "birds", "labelmill/attempt": str(attempt), "app.kubernetes.io/component": kind,
                },
                "annotations": {"labelmill/config": "birds-12345678", "labelmill/shards": str(shards), **notes},
            },
            "spec": {"completions": shards, "parallelism": shards, "suspend": suspend},
            "status": {**status, "conditions": conditions},
        },
        Job,
    )  # fmt: skip


def pod(
    shard: int | None = 0, phase: str = "Running", *, kind: str = "label", age_s: float = 0,
    deleted_s: float | None = None, scheduled: str | None = None, waiting: tuple[str, str] | None = None,
    ended: tuple[int, str, str] | None = None, name: str | None = None,
) -> Pod:  # fmt: skip
    state: dict[str, Any] = {}
    if waiting:
        state = {"waiting": {"reason": waiting[0], "message": waiting[1]}}
    if ended:
        state = {"terminated": {"exitCode": ended[0], "reason": ended[1], "message": ended[2]}}
    labels = {"app.kubernetes.io/component": kind}
    if shard is not None:
        labels["batch.kubernetes.io/job-completion-index"] = str(shard)
    meta: dict[str, Any] = {
        "name": name or f"birds-{kind}-1-{shard}-x",
        "labels": labels,
        "creationTimestamp": (NOW - timedelta(seconds=age_s)).isoformat(),
    }
    if deleted_s is not None:
        meta["deletionTimestamp"] = (NOW - timedelta(seconds=deleted_s)).isoformat()
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": scheduled}
    return msgspec.convert(
        {
            "metadata": meta,
            "status": {
                "phase": phase,
                "conditions": [condition] if scheduled else [],
                "containerStatuses": [{"name": "worker", "state": state}],
            },
        },
        Pod,
    )


def beat(shard: int, **changes: Any) -> Heartbeat:
    base: dict[str, Any] = {
        "pass_index": 0, "shard": shard, "shards": 3, "state": "working", "host": "h", "pid": 1, "started_at": 900.0,
        "updated_at": 1000.0, "chunks": 4, "chunks_done": 2, "images": 100, "images_done": 50, "images_labelled": 50,
        "failed": {},
    }  # fmt: skip
    return Heartbeat(**{**base, **changes})


@pytest.mark.parametrize(
    ("text", "indexes"), [("", set()), ("3", {3}), ("0,2-4,7", {0, 2, 3, 4, 7}), ("0-11", set(range(12)))]
)
def test_completion_indexes_are_read_as_kubernetes_writes_them(text: str, indexes: set[int]) -> None:
    assert parse_indexes(text) == indexes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (12_000, "3 h 20 min"), (180_000, "2 d 2 h")],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_heartbeats_add_up_and_a_shard_without_one_counts_by_its_chunks() -> None:
    beats = [
        beat(0, failed={"decode": 2}),
        beat(1, state="done", images_done=100, images_labelled=0, failed={"decode": 1, "missing": 1}),
        beat(1, shards=5, images_done=77),
        beat(0, pass_index=1, images_done=99),
    ]
    found = summarise(beats, label_pass=0, shards=3, images=300, listed={1: 5, 2: 20}, now=1010.0, heartbeat_s=15)
    assert found.done == 50 + 100 + 20
    assert found.failed == {"decode": 3, "missing": 1}
    assert found.images_per_s == 0.5
    assert found.left_s == 260
    assert found.shards == {"working": 1, "done": 1, "not started": 1}


def test_a_shard_that_has_just_begun_is_expected_to_be_as_fast_as_the_others() -> None:
    beats = [
        beat(0, state="done", images_done=100, images_labelled=100),
        beat(1, images_done=0, images_labelled=0, started_at=999.0),
        beat(2, images_done=0, images_labelled=0, started_at=999.0),
    ]
    found = summarise(beats, label_pass=0, shards=3, images=300, listed={}, now=1000.0, heartbeat_s=15)
    assert (found.images_per_s, found.left_s) == (2.0, 100)


def test_a_worker_that_says_nothing_for_long_is_silent_and_adds_no_speed() -> None:
    beats = [beat(0, shards=1)]
    silent = summarise(beats, label_pass=0, shards=1, images=100, listed={}, now=1091.0, heartbeat_s=15)
    assert silent.shards == {"silent": 1}
    assert silent.left_s is None
    fresh = summarise(beats, label_pass=0, shards=1, images=100, listed={}, now=1089.0, heartbeat_s=15)
    assert fresh.shards == {"working": 1}


def test_shards_are_counted_by_what_kubernetes_says() -> None:
    pods = [pod(0), pod(1, "Pending"), pod(2, "Pending"), pod(2), pod(3, "Failed"), pod(5, "Running", deleted_s=5)]
    counts = count_shards(job(completed_indexes="4,6-7", failed_indexes="8"), pods)
    assert msgspec.to_builtins(counts) == {
        "total": 12, "done": 0, "running": 2, "pending": 1, "queued": 9, "failed": 0,
    }  # fmt: skip
    counts = count_shards(job(completedIndexes="4,6-7", failedIndexes="8"), pods)
    assert msgspec.to_builtins(counts) == {
        "total": 12, "done": 3, "running": 2, "pending": 1, "queued": 5, "failed": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            pod(0, "Pending", age_s=700, scheduled="0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
            "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        ),
        (
            pod(0, "Pending", age_s=700, waiting=("ImagePullBackOff", "Back-off pulling image x")),
            "ImagePullBackOff: Back-off pulling image x",
        ),
        (
            pod(0, "Pending", age_s=700, waiting=("CreateContainerConfigError", 'secret "bucket" not found')),
            'CreateContainerConfigError: secret "bucket" not found',
        ),
        (pod(0, "Pending", age_s=700, waiting=("ContainerCreating", "")), "kubectl describe pod birds-label-1-0-x"),
        (pod(0, "Running", deleted_s=700), "not gone yet"),
    ],
)
def test_a_stuck_pod_says_why(given: Pod, why: str) -> None:
    [stuck] = stuck_pods([given, pod(1, "Pending", age_s=10), pod(2)], NOW, after_s=600)
    assert stuck.for_s == 700
    assert why in stuck.why


LINE = json.dumps({"level": "error", "event": "s3://no-bucket: no such bucket: no-bucket; make it"})


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (
            (78, "Error", f'{{"level": "info"}}\n{LINE}\n'),
            "exit 78: s3://no-bucket: no such bucket: no-bucket; make it",
        ),
        ((137, "OOMKilled", ""), "OOMKilled: above its memory limit; raise platform.worker.limits.memory"),
        ((137, "Error", "Killed"), "exit 137: Killed"),
        ((137, "Error", '{"event": "shard", "level": "info"}\n'), "exit 137, the last it said: shard"),
        ((139, "Error", ""), "exit 139: Error"),
    ],
)
def test_a_failed_pod_is_summed_up_by_its_last_words(ended: tuple[int, str, str], says: str) -> None:
    pods = [pod(shard, "Failed", ended=ended) for shard in range(3)]
    assert faults_of([*pods, pod(4), pod(5, "Succeeded", ended=(0, "Completed", ""))]) == {says: 3}


LIVE, DONE = {"end": None}, {"end": "Complete"}
LOST = {"end": "Failed", "reason": "FailedIndexes", "message": "Job has failed indexes"}


@pytest.mark.parametrize(
    ("label", "finalize", "pods", "state"),
    [
        ({**LIVE, "suspend": True}, LIVE, [], "queued"),
        (LIVE, LIVE, [pod(0, "Pending")], "starting"),
        (LIVE, LIVE, [pod(0)], "labelling"),
        (DONE, LIVE, [], "finalizing"),
        (LOST, LIVE, [], "finalizing"),
        (DONE, DONE, [], "finished"),
        (LOST, DONE, [], "incomplete"),
        (DONE, LOST, [], "failed"),
        (None, LIVE, [], "finalizing"),
        (None, DONE, [], "finished"),
        (DONE, None, [], "labelled"),
        ({**LIVE, "cancelled": True}, {**LIVE, "cancelled": True}, [], "cancelled"),
        ({**LOST, "cancelled": True}, {**LOST, "cancelled": True}, [], "cancelled"),
        ({**DONE, "cancelled": True}, DONE, [], "finished"),
    ],
)
def test_the_state_of_a_run(
    label: dict[str, Any] | None, finalize: dict[str, Any] | None, pods: list[Pod], state: str
) -> None:
    attempt = Attempt(
        1, None if label is None else job(**label), None if finalize is None else job("finalize", **finalize)
    )
    found = run_status("birds", attempt, pods, None, NOW)
    assert found.state == state
    assert "birds" in found.next or state == "finished"


def progress(**changes: Any) -> Progress:
    base: dict[str, Any] = {
        "label_pass": 0, "images": 1000, "done": 250, "failed": {"decode": 3}, "images_per_s": 2.5, "left_s": 300,
        "shards": {"working": 3, "silent": 1},
    }  # fmt: skip
    return Progress(**{**base, **changes})


def test_status_reads_like_this() -> None:
    line = StatusLine(
        at=NOW - timedelta(seconds=300), run="birds", attempt=2, label="active", progress=progress(), stuck=[]
    )
    pods = [pod(0), pod(1, "Pending", age_s=900, scheduled="0/1 nodes: Insufficient nvidia.com/gpu."),
            pod(2, "Failed", ended=(78, "Error", LINE))]  # fmt: skip
    found = run_status("birds", Attempt(2, job(attempt=2), job("finalize", 2)), pods, line, NOW)
    assert status_lines(found) == [
        "birds, attempt 2: labelling",
        "  images    250 of 1000 done (25.0 %), 750 left",
        "  failed    3: 3 decode",
        "  speed     2.5 images/s, 5 min left",
        "            as of 5 min ago: the finalize pod says nothing newer",
        "  shards    12: 1 running, 1 pending, 10 queued",
        "            1 silent (no heartbeat; lost node or dead process)",
        "  label     active",
        "  finalize  active",
        "  1 x exit 78: s3://no-bucket: no such bucket: no-bucket; make it",
        "  birds-label-1-1-x Pending for 15 min: Unschedulable: 0/1 nodes: Insufficient nvidia.com/gpu.",
        "  next: millctl logs birds --follow",
    ]


def test_the_newest_status_line_is_found_among_other_lines() -> None:
    lines = [
        msgspec.json.encode(
            StatusLine(at=NOW, run="birds", attempt=1, label="active", progress=progress(done=done), stuck=[])
        ).decode()
        for done in (1, 2)
    ]
    found = last_status_line([lines[0], '{"event":"status","broken', lines[1], '{"event": "chunk committed"}', "text"])
    assert found is not None
    assert found.progress is not None
    assert found.progress.done == 2
    assert last_status_line(["text"]) is None


def test_attempts_are_told_apart_and_tasks_left_out() -> None:
    jobs = [job("finalize", 2), job(attempt=1), job("task", 0), job(attempt=10), job("finalize", 10)]
    found = attempts_of(jobs)
    assert [(one.number, one.label is not None, one.finalize is not None) for one in found] == [
        (1, True, False), (2, False, True), (10, True, True),
    ]  # fmt: skip
