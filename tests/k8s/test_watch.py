"""Status and logs over a scripted API: what is shown when part of the cluster does not answer."""

from typing import Any

import pytest

from mill_k8s.client import Cluster, PendingError
from mill_k8s.watch import follow, print_logs, read_runs, read_status
from mill_shared.errors import ConfigError, ExitCode

JOBS, PODS = "GET /apis/batch/v1/namespaces/mill/jobs", "GET /api/v1/namespaces/mill/pods"
LINE = (
    '{"event":"status","at":"2026-11-21T03:00:00Z","run":"birds","attempt":1,"label":"active","progress":{"label_pass":0,'
    '"images":100,"done":40,"failed":{},"images_per_s":2.0,"left_s":30,"shards":{"working":2}},"stuck":[]}'
)


def labels(kind: str) -> dict[str, str]:
    return {
        "labelmill/run": "birds", "labelmill/attempt": "1", "app.kubernetes.io/component": kind,
        "app.kubernetes.io/name": "labelmill",
    }  # fmt: skip


def job(kind: str, end: str | None = None) -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"birds-{kind}-1", "labels": labels(kind), "annotations": {"labelmill/shards": "12"},
            "creationTimestamp": "2026-11-21T02:00:00Z",
        },
        "spec": {"completions": 12 if kind == "label" else 1},
        "status": {"conditions": [{"type": end, "status": "True"}] if end else []},
    }  # fmt: skip


def pod(kind: str, phase: str, shard: int = 0, exit_code: int | None = None) -> dict[str, Any]:
    state = {} if exit_code is None else {"terminated": {"exitCode": exit_code}}
    return {
        "metadata": {
            "name": f"birds-{kind}-1-{shard}", "creationTimestamp": "2026-11-21T02:00:00Z",
            "labels": {**labels(kind), "batch.kubernetes.io/job-completion-index": str(shard)},
        },
        "status": {"phase": phase, "containerStatuses": [{"name": "c", "state": state}]},
    }  # fmt: skip


def show(api: Any, jobs: list[dict[str, Any]], pods: list[dict[str, Any]]) -> None:
    api.say(JOBS, (200, {"items": jobs}))
    api.say(PODS, (200, {"items": pods}))


def test_progress_comes_from_the_log_of_the_finalize_pod(api: Any, cluster: Cluster) -> None:
    show(api, [job("label"), job("finalize")], [pod("label", "Running"), pod("finalize", "Running")])
    api.say(f"{PODS}/birds-finalize-1-0/log", (200, f"{LINE}\n"))
    found = read_status(cluster, "birds")
    assert found.state == "labelling"
    assert found.progress is not None
    assert found.progress.done == 40


def test_a_node_that_does_not_answer_hides_the_progress_alone(api: Any, cluster: Cluster) -> None:
    show(api, [job("label"), job("finalize")], [pod("label", "Running"), pod("finalize", "Running")])
    api.say(f"{PODS}/birds-finalize-1-0/log", (500, {"message": "TLS handshake timeout"}))
    found = read_status(cluster, "birds")
    assert found.progress is None
    assert found.shards is not None
    assert found.shards.running == 1


def test_runs_are_listed_without_reading_a_log(api: Any, cluster: Cluster) -> None:
    show(api, [job("label", "Complete"), job("finalize", "Complete")], [])
    [(found, _)] = read_runs(cluster)
    assert (found.run, found.state) == ("birds", "finished")
    assert not any("/log" in asked for asked in api.asked)


def test_logs_of_more_than_five_pods_carry_their_shard(api: Any, cluster: Cluster) -> None:
    show(api, [job("label")], [pod("label", "Running", shard) for shard in range(12)])
    for shard in range(12):
        api.say(f"{PODS}/birds-label-1-{shard}/log", (200, f"line of {shard}\n"))
    said: list[str] = []
    print_logs(cluster, "birds", said.append, kind="label", shard=None, tail=None, follow=False)
    assert said == [f"[{shard}] line of {shard}" for shard in range(12)]
    said.clear()
    print_logs(cluster, "birds", said.append, kind="label", shard=7, tail=None, follow=False)
    assert said == ["line of 7"]
    with pytest.raises(ConfigError, match="shards 0 to 11"):
        print_logs(cluster, "birds", said.append, kind="label", shard=12, tail=None, follow=False)


def test_followed_logs_take_in_pods_that_start_later_and_end_with_the_job(api: Any, cluster: Cluster) -> None:
    api.say(JOBS, (200, {"items": [job("label")]}))
    first, both = [pod("label", "Running", 0)], [pod("label", "Running", shard) for shard in range(8)]
    api.say(PODS, (200, {"items": first}), (200, {"items": both}))
    for shard in range(8):
        api.say(f"{PODS}/birds-label-1-{shard}/log", (200, f"line of {shard}\n"))
    api.say(f"{JOBS}/birds-label-1", (200, job("label")), (200, job("label", "Complete")))
    said: list[str] = []
    print_logs(cluster, "birds", said.append, kind="label", shard=None, tail=None, follow=True, sleep=lambda _: None)
    assert sorted(said) == [f"[{shard}] line of {shard}" for shard in range(8)]


@pytest.mark.parametrize(
    ("label", "finalize", "pods", "code"),
    [
        ("Complete", "Complete", [], ExitCode.OK),
        ("Failed", "Complete", [], ExitCode.OK),
        ("Failed", "Failed", [pod("label", "Failed", 0, 75), pod("finalize", "Failed", 0, 80)], ExitCode.COVERAGE),
        ("Failed", "Failed", [pod("label", "Failed", 0, 78)], ExitCode.CONFIG),
        ("Complete", "Failed", [pod("finalize", "Failed", 0, 137)], ExitCode.OUTSIDE),
    ],
)
def test_the_exit_code_is_that_of_the_run(
    label: str, finalize: str, pods: list[dict[str, Any]], code: ExitCode, api: Any, cluster: Cluster
) -> None:
    show(api, [job("label", label), job("finalize", finalize)], pods)
    said: list[str] = []
    assert follow(cluster, "birds", said.append, pending_s=60) == code
    assert said[0].startswith("birds, attempt 1: ")


def test_waiting_outlives_an_api_that_fails(api: Any, cluster: Cluster) -> None:
    show(api, [], [])
    live, done = [job("label"), job("finalize")], [job("label", "Complete"), job("finalize", "Complete")]
    api.say(JOBS, (200, {"items": live}), (503, {"message": "overloaded"}), (200, {"items": done}))
    said: list[str] = []
    assert follow(cluster, "birds", said.append, pending_s=60, sleep=lambda _: None) == ExitCode.OK
    assert any("overloaded" in line for line in said)


def test_pods_that_stay_pending_end_the_wait_but_not_while_one_runs(api: Any, cluster: Cluster) -> None:
    live = [job("label"), job("finalize")]
    show(api, live, [pod("label", "Pending", 0), pod("finalize", "Running")])
    with pytest.raises(PendingError, match=r"1 pods Pending for .* and none at work"):
        follow(cluster, "birds", lambda _: None, pending_s=60, sleep=lambda _: None)
    show(api, live, [pod("label", "Pending", 0), pod("label", "Running", 1)])
    api.say(JOBS, (200, {"items": live}), (200, {"items": [job("label", "Complete"), job("finalize", "Complete")]}))
    assert follow(cluster, "birds", lambda _: None, pending_s=60, sleep=lambda _: None) == ExitCode.OK
