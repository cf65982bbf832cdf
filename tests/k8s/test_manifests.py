"""The objects of a run: parsed by the client's typed models, and with what the design promises of them."""

import re
from typing import Any

import pytest
from kubernetes.client import V1ConfigMap, V1Job

from mill_jobs.config import RUN_ID_PATTERN, RunConfig, parse_config
from mill_k8s.manifests import (
    Object,
    config_map,
    finalize_job,
    label_job,
    make_request,
    max_failed_indexes,
    run_text,
    selector,
    task_job,
)
from mill_k8s.platform import PlatformConfig
from mill_shared.errors import ExitCode

DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def all_objects(config: RunConfig, platform: PlatformConfig, **asked: Any) -> dict[str, Object]:
    request = make_request(config, 12, **asked)
    return {
        "map": config_map(request),
        "label": label_job(request, 3, platform),
        "finalize": finalize_job(request, 3, platform),
        "task": task_job("t", request, ["probe", "/etc/labelmill/run.yaml"], platform, pull_worker=True),
    }


def pod_of(job: Object) -> Any:
    return job["spec"]["template"]["spec"]


def containers_of(job: Object) -> list[Any]:
    return [*pod_of(job).get("initContainers", []), *pod_of(job)["containers"]]


@pytest.mark.parametrize("which", ["platform", "everything"])
def test_every_object_is_one_that_kubernetes_knows(
    which: str, config: RunConfig, request: pytest.FixtureRequest
) -> None:
    for name, body in all_objects(config, request.getfixturevalue(which)).items():
        model: Any = V1ConfigMap if name == "map" else V1Job
        parsed = model.from_dict(body)
        assert parsed.metadata.name == body["metadata"]["name"]


@pytest.mark.parametrize("which", ["platform", "everything"])
def test_every_pod_passes_the_restricted_standard(
    which: str, config: RunConfig, request: pytest.FixtureRequest
) -> None:
    for name, job in all_objects(config, request.getfixturevalue(which)).items():
        if name == "map":
            continue
        pod = pod_of(job)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in containers_of(job):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "projected", "persistentVolumeClaim", "secret"}


def test_the_label_job_is_what_the_design_says(config: RunConfig, platform: PlatformConfig) -> None:
    spec = all_objects(config, platform)["label"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert (spec["completions"], spec["parallelism"]) == (12, 12)
    assert spec["backoffLimitPerIndex"] == 6
    assert spec["podReplacementPolicy"] == "Failed"
    assert "activeDeadlineSeconds" not in spec
    assert spec["ttlSecondsAfterFinished"] == 7 * 24 * 3600
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    [worker] = pod["containers"]
    assert worker["command"][:3] == ["tini", "--", "mill"]
    assert worker["command"][3:] == ["label", "/etc/labelmill/run.yaml", "--shards=12"]
    for part in ("requests", "limits"):
        assert worker["resources"][part]["nvidia.com/gpu"] == "1"
    assert spec["template"]["metadata"]["annotations"] == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
    env = {item["name"]: item["value"] for item in worker["env"]}
    assert (env["HF_HUB_OFFLINE"], env["TRANSFORMERS_OFFLINE"]) == ("1", "1")
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in worker["volumeMounts"]


def test_the_failure_policies_are_the_exit_codes(config: RunConfig, platform: PlatformConfig) -> None:
    objects = all_objects(config, platform)
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    expected = {
        "label": ("worker", [2, ExitCode.CONFIG, ExitCode.COVERAGE]),
        "finalize": ("finalize", [2, ExitCode.CONFIG, ExitCode.COVERAGE, ExitCode.INVARIANT, ExitCode.CORRUPT]),
    }
    for kind, (container, fatal) in expected.items():
        first, ignored, failing = objects[kind]["spec"]["podFailurePolicy"]["rules"]
        assert first == disrupted
        assert ignored["action"] == "Ignore"
        assert ignored["onExitCodes"] == {"containerName": container, "operator": "In", "values": [143]}
        assert failing["action"] == "FailJob"
        assert failing["onExitCodes"] == {"containerName": container, "operator": "In", "values": fatal}
        assert pod_of(objects[kind])["containers"][0]["name"] == container


def test_only_finalize_gets_a_token_and_only_where_it_waits(config: RunConfig, everything: PlatformConfig) -> None:
    objects = all_objects(config, everything)
    for name in ("label", "finalize", "task"):
        pod = pod_of(objects[name])
        assert pod["automountServiceAccountToken"] is False
        projected = [volume for volume in pod["volumes"] if "projected" in volume]
        assert len(projected) == (name == "finalize")
    assert pod_of(objects["label"])["serviceAccountName"] == "w"
    assert pod_of(objects["finalize"])["serviceAccountName"] == "f"


def test_finalize_waits_in_its_main_container_and_rents_nothing(config: RunConfig, everything: PlatformConfig) -> None:
    job = all_objects(config, everything)["finalize"]
    pod = pod_of(job)
    assert "initContainers" not in pod
    assert not {"tolerations", "nodeSelector", "priorityClassName"} & pod.keys()
    assert "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]
    assert "activeDeadlineSeconds" not in job["spec"]
    [container] = pod["containers"]
    assert container["image"] == "registry/control:1"
    assert not any("/" in name for name in container["resources"]["limits"])
    assert container["command"] == [
        "tini", "--", "millctl", "wait", "birds", "--attempt=3", "--run-file=/etc/labelmill/run.yaml", "--",
        "mill", "finalize", "/etc/labelmill/run.yaml",
    ]  # fmt: skip


def test_finalize_with_class_embeddings_runs_in_the_worker_image_on_a_cpu(
    config: RunConfig, everything: PlatformConfig
) -> None:
    request = make_request(config, 2)
    assert not request.needs_models
    from dataclasses import replace

    pod = pod_of(finalize_job(replace(request, needs_models=True), 1, everything))
    [container] = pod["containers"]
    assert container["image"] == "registry/worker:1"
    assert {"name": "models", "mountPath": "/models", "readOnly": True, "subPath": "0a1b2c"} in container[
        "volumeMounts"
    ]
    assert "nvidia.com/mig-1g.10gb" not in container["resources"]["limits"]


def test_what_the_platform_says_is_in_the_pods(config: RunConfig, everything: PlatformConfig) -> None:
    job = all_objects(config, everything)["label"]
    pod = pod_of(job)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert pod["priorityClassName"] == "backfill"
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    gate, worker = containers_of(job)
    assert gate["name"] == "weights"
    assert "/models/READY" in gate["command"][2]
    assert worker["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    names = [item["name"] for item in worker["env"]]
    assert len(names) == len(set(names)), "server-side apply refuses duplicates"
    env = {item["name"]: item.get("value") for item in worker["env"]}
    assert env["HF_HUB_OFFLINE"] == "0", "the platform's own wins"
    assert env["AWS_CA_BUNDLE"] == "/etc/labelmill-ca/ca.crt"
    assert worker["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/mig-1g.10gb": "2"}
    mounted = {mount["name"] for mount in worker["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]} == {"run", "tmp", "shm", "models", "ca", "key"}


def test_the_platform_is_not_changed_by_rendering(config: RunConfig, platform: PlatformConfig) -> None:
    before = platform.model_dump()
    all_objects(config, platform)
    assert platform.model_dump() == before
    assert "nvidia.com/gpu" not in str(finalize_job(make_request(config, 1), 1, platform))


def test_no_gpu_is_asked_for_where_the_platform_has_none(config: RunConfig, platform: PlatformConfig) -> None:
    on_cpu = platform.model_copy(update={"gpu": platform.gpu.model_copy(update={"count": 0})})
    assert "nvidia.com/gpu" not in str(label_job(make_request(config, 2), 1, on_cpu))


def test_the_longest_run_id_fits_into_every_name(config: RunConfig, platform: PlatformConfig) -> None:
    run = "a" * 40
    assert re.match(RUN_ID_PATTERN, run)
    longest = config.model_copy(update={"run": run})
    request = make_request(longest, 100_000)
    for body in (config_map(request), label_job(request, 9999, platform), finalize_job(request, 9999, platform)):
        assert DNS_LABEL.fullmatch(body["metadata"]["name"])
    host = f"{label_job(request, 9999, platform)['metadata']['name']}-99999"
    assert DNS_LABEL.fullmatch(host), "a pod's host name is the Job's name and the index"


def test_the_config_map_is_named_by_its_content_and_says_the_same_run(config: RunConfig) -> None:
    first = make_request(config, 12)
    other = make_request(config.model_copy(update={"store": "s3://bucket/other"}), 12)
    assert re.fullmatch(r"birds-[0-9a-f]{8}", first.config_map)
    assert first.config_map == make_request(config, 5).config_map
    assert first.config_map != other.config_map
    body = config_map(first)
    assert body["immutable"] is True
    assert parse_config(body["data"]["run.yaml"], "map") == config
    assert run_text(parse_config(first.text, "map")) == first.text, "a second time gives the same digest"


def test_a_pilot_labels_a_few_chunks_and_finalizes_what_there_is(config: RunConfig, platform: PlatformConfig) -> None:
    objects = all_objects(config, platform, pilot=64)
    label, finalize = objects["label"], objects["finalize"]
    assert label["spec"]["completions"] == 2, "no more shards than chunks"
    assert pod_of(label)["containers"][0]["command"][-2:] == ["--shards=2", "--first=64"]
    assert pod_of(finalize)["containers"][0]["command"][-1] == "--set=limits.min_coverage=0"
    assert objects["map"]["metadata"]["name"] == all_objects(config, platform)["map"]["metadata"]["name"]


@pytest.mark.parametrize(("shards", "given_up"), [(1, 1), (4, 4), (12, 5), (80, 10), (10_000, 100)])
def test_how_many_shards_may_be_given_up(shards: int, given_up: int) -> None:
    assert max_failed_indexes(shards) == given_up


def test_the_selector_finds_what_was_made(config: RunConfig, platform: PlatformConfig) -> None:
    job = all_objects(config, platform)["label"]
    wanted = dict(part.split("=") for part in selector("birds", "label", 3).split(","))
    assert wanted.items() <= job["metadata"]["labels"].items()
    assert wanted.items() <= job["spec"]["template"]["metadata"]["labels"].items()
