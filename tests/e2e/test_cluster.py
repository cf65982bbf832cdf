"""The product on a real cluster: install, submit, watch, lose pods, get the same bytes."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml

from clusters import CHUNK, SCENES, Cluster, platform_settings
from mill_shared.errors import ExitCode
from seaweed import BUCKET

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

SHARDS = 12


def local_job(cluster: Cluster, run: str) -> dict[str, Any]:
    """Return a Job that does the whole run in one pod of the worker image with `mill local`."""
    settings = platform_settings()
    images: Any = settings["images"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": run},
        "spec": {
            "backoffLimit": 0,
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                    "containers": [
                        {
                            "name": "mill",
                            "image": images["worker"],
                            "imagePullPolicy": images["pull_policy"],
                            "command": ["tini", "--", "mill", "local", "/run/run.yaml", "--workers", "2"],
                            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
                            "envFrom": [{"secretRef": {"name": "s3"}}],
                            "securityContext": {
                                "allowPrivilegeEscalation": False,
                                "readOnlyRootFilesystem": True,
                                "capabilities": {"drop": ["ALL"]},
                            },
                            "volumeMounts": [
                                {"name": "run", "mountPath": "/run"}, {"name": "tmp", "mountPath": "/tmp"},
                            ],
                        }
                    ],
                    "volumes": [{"name": "run", "configMap": {"name": run}}, {"name": "tmp", "emptyDir": {}}],
                }
            },
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def reference(cluster: Cluster) -> dict[str, bytes]:
    """The final of `mill local`, in one pod of the same image on the same config."""
    path = cluster.write_run("reference")
    cluster.kubectl("create", "configmap", "reference", f"--from-file=run.yaml={path}")
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(local_job(cluster, "reference")))
    cluster.kubectl("wait", "--for=condition=complete", "job/reference", "--timeout=400s", timeout_s=420)
    return dict(cluster.final("reference"))


def status(cluster: Cluster, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.millctl("status", run, "-o", "json").out)
    return found


def test_twelve_shards_give_the_bytes_of_one_machine(cluster: Cluster, reference: dict[str, bytes]) -> None:
    path = cluster.write_run("twelve")
    ended = cluster.run(
        "make", "--no-print-directory", "submit", f"FILE={path}", f"SHARDS={SHARDS}", f"ARGS=-n {cluster.namespace}"
    )
    assert ended.code == 0, ended.err
    again = cluster.millctl("submit", path, "--shards", SHARDS)
    assert again.code == 0, again.err
    assert len(cluster.objects("jobs", "labelmill/run=twelve")) == 2, "a label Job and a finalize Job, once"
    cluster.wait_for("a pod at work", lambda: bool(cluster.pods("twelve")))
    assert len(cluster.pods("twelve", phase=None)) <= SHARDS
    waited = cluster.millctl("submit", path, "--shards", SHARDS, "--wait")
    assert waited.code == 0, waited.err
    assert dict(cluster.final("twelve")) == reference
    assert len([key for key in cluster.keys("twelve/pass-0/chunks/")]) == SCENES // CHUNK
    logs = cluster.millctl("logs", "twelve")
    assert logs.code == 0, logs.err
    lines = cluster.kubectl("logs", "-l", "labelmill/run=twelve,app.kubernetes.io/component=label").splitlines()
    assert lines
    assert all("event" in json.loads(line) for line in lines), "pod logs are one JSON object a line"
    found = cluster.millctl("runs")
    assert "twelve" in found.out


# One run through everything that happens to pods

KILL_WORKER = """
import os, signal
for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
    if pid != 1 and b"mill\\0label" in open(f"/proc/{pid}/cmdline", "rb").read().replace(b"/opt/code/bin/", b""):
        os.kill(pid, signal.SIGKILL)
"""


def evict(cluster: Cluster, pod: str) -> None:
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": cluster.namespace},
    }
    path = f"/api/v1/namespaces/{cluster.namespace}/pods/{pod}/eviction"
    cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))


def exit_codes(cluster: Cluster, run: str) -> list[int]:
    states = [
        container["state"].get("terminated") or container.get("lastState", {}).get("terminated")
        for pod in cluster.pods(run, phase=None)
        for container in pod["status"].get("containerStatuses", ())
    ]
    return [state["exitCode"] for state in states if state]


def test_pods_are_lost_in_every_way_and_the_bytes_stay_the_same(cluster: Cluster, reference: dict[str, bytes]) -> None:
    run = "chaos"
    path = cluster.write_run(run)
    assert cluster.millctl("submit", path, "--shards", SHARDS, "--parallelism", 4).code == 0

    def at_work() -> list[str]:
        return [
            pod["metadata"]["name"]
            for pod in cluster.pods(run)
            if pod["status"].get("containerStatuses", [{}])[0].get("ready")
            and "deletionTimestamp" not in pod["metadata"]
        ]

    def labelling() -> bool:
        return bool(cluster.keys(f"{run}/progress/")) and len(at_work()) >= 3

    cluster.wait_for("workers at work", labelling)
    deleted, evicted, killed = at_work()[:3]
    cluster.kubectl("delete", "pod", deleted, "--wait=false")
    evict(cluster, evicted)
    cluster.kubectl("exec", killed, "-c", "worker", "--", "python3", "-c", KILL_WORKER)
    cluster.wait_for("137 of the killed worker", lambda: 137 in exit_codes(cluster, run), 60)
    cluster.server.kill()
    time.sleep(60)
    cluster.server.start()
    kubelet = os.environ.get("E2E_KUBELET_PID")
    if kubelet:
        cluster.wait_for("workers at work again", lambda: len(at_work()) >= 2)
        os.kill(int(kubelet), signal.SIGSTOP)
        time.sleep(90)
        os.kill(int(kubelet), signal.SIGCONT)
    waited = cluster.millctl("submit", path, "--shards", SHARDS, "--parallelism", 4, "--wait", timeout_s=800)
    assert waited.code == 0, waited.err
    assert dict(cluster.final(run)) == reference
    job = next(item for item in cluster.objects("jobs", f"labelmill/run={run}") if "label" in item["metadata"]["name"])
    assert job["status"]["succeeded"] == SHARDS


# Mistakes and surprises, each with what an operator needs


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"store": "s3://no-such-bucket/runs"}, ExitCode.CONFIG, "no such bucket"),
        ({"recipe__label__masks__checkpoint": "/models/nothing.pth"}, ExitCode.CONFIG, "/models/nothing.pth"),
    ],
    ids=["bucket", "checkpoint"],
)  # fmt: skip
def test_a_fault_of_the_config_stops_the_job_at_once(
    cluster: Cluster, change: dict[str, object], code: ExitCode, said: str
) -> None:
    run = f"fault-{'bucket' if 'store' in change else 'weights'}"
    path = cluster.write_run(run, **change)
    ended = cluster.millctl("submit", path, "--shards", 4, "--wait")
    assert ended.code == code, ended.out + ended.err
    assert said in ended.out + ended.err
    job = next(
        item for item in cluster.objects("jobs", f"labelmill/run={run}") if "-label-" in item["metadata"]["name"]
    )
    reasons = {condition["reason"] for condition in job["status"]["conditions"]}
    assert "PodFailurePolicy" in reasons


def test_a_misspelled_key_never_reaches_the_cluster(cluster: Cluster) -> None:
    path = cluster.write_run("misspelled", sharding__chunk_sise=4)
    ended = cluster.millctl("submit", path, "--shards", 4)
    assert ended.code == ExitCode.CONFIG
    assert "chunk_sise" in ended.err
    assert not cluster.objects("jobs", "labelmill/run=misspelled")


def test_another_config_under_the_same_id_is_refused_with_the_difference(cluster: Cluster) -> None:
    assert cluster.millctl("submit", cluster.write_run("same"), "--shards", 2).code == 0
    other = cluster.write_run("same", recipe__label__score_threshold=0.5)
    ended = cluster.millctl("submit", other, "--shards", 2)
    assert ended.code == ExitCode.CONFIG
    assert "score_threshold" in ended.err
    assert cluster.millctl("cancel", "same").code == 0


def test_two_submits_at_once_make_one_run(cluster: Cluster) -> None:
    path = cluster.write_run("twice")
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda _: cluster.millctl("submit", path, "--shards", 2), range(2)))
    assert [ended.code for ended in ends] == [0, 0], [ended.err for ended in ends]
    assert len(cluster.objects("jobs", "labelmill/run=twice")) == 2
    assert cluster.millctl("cancel", "twice").code == 0


def test_cancel_then_another_number_of_shards_completes_the_run(cluster: Cluster, reference: dict[str, bytes]) -> None:
    run = "resized"
    path = cluster.write_run(run)
    assert cluster.millctl("submit", path, "--shards", 4).code == 0
    refused = cluster.millctl("submit", path, "--shards", 6)
    assert refused.code == ExitCode.CONFIG, refused.out
    cluster.wait_for("a chunk", lambda: bool(cluster.keys(f"{run}/pass-0/chunks/")))
    assert cluster.millctl("cancel", run).code == 0
    done = len(cluster.keys(f"{run}/pass-0/chunks/"))
    assert 0 < done < SCENES // CHUNK
    ended = cluster.millctl("submit", path, "--shards", 6, "--wait")
    assert ended.code == 0, ended.err
    assert dict(cluster.final(run)) == reference


def test_the_label_job_may_vanish_while_finalize_waits(cluster: Cluster) -> None:
    run = "vanished"
    assert cluster.millctl("submit", cluster.write_run(run), "--shards", 2).code == 0
    cluster.wait_for("a chunk", lambda: bool(cluster.keys(f"{run}/pass-0/chunks/")))
    cluster.kubectl("delete", "job", f"{run}-label-1", "--cascade=foreground")
    ended = cluster.millctl("wait", run)
    assert ended.code == ExitCode.COVERAGE, ended.out + ended.err
    said = cluster.kubectl("logs", f"job/{run}-finalize-1")
    assert "have no record" in said, "finalize says what is missing"
    assert not cluster.keys(f"{run}/final/refs/")


def test_an_image_that_cannot_be_read_fails_alone_and_is_labelled_when_it_is_mended(
    cluster: Cluster, reference: dict[str, bytes]
) -> None:
    run, client = "mended", cluster.server.client()
    key = min(item["Key"] for item in client.list_objects_v2(Bucket=BUCKET, Prefix="scenes/")["Contents"])
    whole = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=key, Body=whole[: len(whole) // 3])
    try:
        refused = cluster.millctl("submit", cluster.write_run(run), "--shards", 4, "--wait")
        assert refused.code == ExitCode.COVERAGE, refused.out + refused.err
        assert "truncated" in refused.out + refused.err, "the reason is named"
    finally:
        client.put_object(Bucket=BUCKET, Key=key, Body=whole)
    again = cluster.millctl("rerun", run, "--failed", "--shards", 1, "--wait")
    assert again.code == 0, again.out + again.err
    mended, expected = cluster.final(run), reference
    assert mended["instances.json"] == expected["instances.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpu": {"resource": "example.com/gpu", "count": 1}}, "example.com/gpu"),
        ({"credentials_secret": "nobody-made-it"}, "nobody-made-it"),
        ({"service_accounts": {"worker": "nobody"}}, "nobody"),
    ],
    ids=["gpu", "secret", "account"],
)
def test_what_the_cluster_lacks_is_said_before_a_gpu_is_rented(
    cluster: Cluster, change: dict[str, object], said: str
) -> None:
    before = cluster.kubectl("get", "configmap", "labelmill-platform", "-o", "jsonpath={.data.platform\\.yaml}")
    settings = {**yaml.safe_load(before), **change}

    def patch(text: str) -> None:
        body = json.dumps({"data": {"platform.yaml": text}})
        cluster.kubectl("patch", "configmap", "labelmill-platform", "--type=merge", "-p", body)

    patch(json.dumps(settings))
    try:
        ended = cluster.millctl("submit", cluster.write_run("lacking"), "--shards", 2)
    finally:
        patch(before)
    assert ended.code == ExitCode.CONFIG, ended.out + ended.err
    assert said in ended.err
    assert not cluster.objects("jobs", "labelmill/run=lacking")


# Rights


def test_the_worker_has_no_token_and_finalize_may_do_nothing_but_look(cluster: Cluster) -> None:
    for pod in cluster.pods("twelve", phase=None):
        assert pod["spec"]["automountServiceAccountToken"] is False

    def may(account: str, verb: str, resource: str) -> bool:
        name = f"system:serviceaccount:{cluster.namespace}:labelmill-{account}"
        return cluster.kubectl("auth", "can-i", verb, resource, f"--as={name}", check=False).strip() == "yes"

    assert may("finalize", "get", "jobs")
    assert may("finalize", "list", "pods")
    for account in ("finalize", "worker"):
        for verb in ("create", "delete", "patch", "update"):
            for resource in ("jobs", "pods", "configmaps", "secrets"):
                assert not may(account, verb, resource), f"{account} may {verb} {resource}"
        for resource in ("secrets", "configmaps", "pods/log"):
            assert not may(account, "get", resource), f"{account} may get {resource}"
    assert not may("worker", "get", "jobs")


def test_the_doctor_finds_a_healthy_platform_healthy(cluster: Cluster) -> None:
    ended = cluster.millctl("doctor")
    assert ended.code == 0, ended.out + ended.err


def test_helm_test_proves_the_bucket(cluster: Cluster) -> None:
    ended = cluster.run("helm", "test", "labelmill", "-n", cluster.namespace, "--timeout", "120s", timeout_s=150)
    assert ended.code == 0, ended.out + ended.err
