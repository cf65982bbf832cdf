"""The Kubernetes objects of a run, as plain data: functions of what was asked and of the platform, nothing else.

Plain data rather than the client's typed models, so that this file needs no client; the tests parse every object with
those models, which know no unknown fields, and submit has the server check them before any is created.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import yaml

from mill_jobs.config import RunConfig
from mill_jobs.trainer.config import EmbeddingsConfig
from mill_k8s.platform import CA_FOLDER, READY, RUN_FOLDER, RUN_KEY, PlatformConfig
from mill_shared.config import Section
from mill_shared.errors import ExitCode
from mill_shared.plan import code_version

Object = dict[str, Any]
"""A Kubernetes object in its JSON form."""
Kind = Literal["label", "finalize", "task"]

NAME_LABEL = "app.kubernetes.io/name"
KIND_LABEL = "app.kubernetes.io/component"
MANAGER_LABEL = "app.kubernetes.io/managed-by"
RUN_LABEL = "labelmill/run"
ATTEMPT_LABEL = "labelmill/attempt"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
CONFIG_NOTE = "labelmill/config"
"""Annotation: name of the ConfigMap that the Job's run file is in."""
OPTIONS_NOTE = "labelmill/options"
"""Annotation: options of `mill label`, one a word."""
SHARDS_NOTE = "labelmill/shards"
"""Annotation: shards of the attempt."""
CANCELLED_NOTE = "labelmill/cancelled"
"""Annotation: when `millctl cancel` was typed."""
RUN_FILE = f"{RUN_FOLDER}/{RUN_KEY}"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
TOKEN_LIFETIME_S = 3607
"""What Kubernetes itself gives a pod; the kubelet renews it."""
USAGE = 2
"""click's exit code for an unknown option or a missing file: millctl and the image are of different versions."""
FINALIZE_BACKOFF = 6
DAY_S = 86_400
READY_WAIT_S = 300
"""Seconds for which a worker waits for the weights' marker: a network file system may show it late."""
MAX_SHARDS = 100_000
"""Completions of an Indexed Job with `backoffLimitPerIndex`. Source: KEP-3850."""

Action = Literal["Ignore", "FailJob"]


def worker_action(code: ExitCode) -> Action | None:
    """Return what an exit code of a labelling pod means for its Job; None: it counts against the shard.

    COVERAGE stops the whole Job, as `mill local` does: one shard alone lost more images than the run may lose, and
    each start of it would label, and lose, some more.
    """
    match code:
        case ExitCode.INTERRUPTED:
            return "Ignore"
        case ExitCode.CONFIG | ExitCode.COVERAGE:
            return "FailJob"
        case ExitCode.OK | ExitCode.INTERNAL | ExitCode.OUTSIDE | ExitCode.STALLED | ExitCode.INVARIANT:
            return None
        case ExitCode.CORRUPT | ExitCode.PENDING:
            return None
        case _:
            assert_never(code)


def finalize_action(code: ExitCode) -> Action | None:
    """Return what an exit code of a finalize or task pod means for its Job; None: it is tried again."""
    match code:
        case ExitCode.INTERRUPTED:
            return "Ignore"
        case ExitCode.CONFIG | ExitCode.COVERAGE | ExitCode.INVARIANT | ExitCode.CORRUPT:
            return "FailJob"
        case ExitCode.OK | ExitCode.INTERNAL | ExitCode.OUTSIDE | ExitCode.STALLED | ExitCode.PENDING:
            return None
        case _:
            assert_never(code)


@dataclass(frozen=True)
class Request:
    """One attempt at a run."""

    run: str
    text: str
    """The run file, as the pods read it."""
    shards: int
    parallelism: int | None = None
    """Pods at a time; None: as many as shards."""
    label_options: tuple[str, ...] = ()
    """More options of `mill label`."""
    finalize_options: tuple[str, ...] = ()
    """More options of `mill finalize`."""
    needs_models: bool = False
    """Finalize makes class embeddings, so it runs in the worker image, with the weights, on a CPU."""

    @property
    def config_map(self) -> str:
        """Name of the ConfigMap: the run and the digest of its run file."""
        return f"{self.run}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def make_request(
    config: RunConfig, shards: int, *, parallelism: int | None = None, pilot: int | None = None,
    label_options: Sequence[str] = (),
) -> Request:  # fmt: skip
    """Return the request of a run file.

    Args:
        config: with its run id.
        shards: as asked for; a pilot gets no more than it has chunks.
        parallelism: pods at a time.
        pilot: label the chunks of the first so many images alone, and finalize whatever there is.
        label_options: more options of `mill label`.
    """
    assert config.run is not None, "a run gets its id before its objects"
    finalize_options: tuple[str, ...] = ()
    if pilot is not None:
        shards = min(shards, -(-pilot // config.sharding.chunk_size))
        label_options = (*label_options, f"--first={pilot}")
        finalize_options = ("--set=limits.min_coverage=0",)
    return Request(
        config.run, run_text(config), shards, parallelism, tuple(label_options), finalize_options,
        _makes_embeddings(config),
    )  # fmt: skip


def run_text(config: RunConfig) -> str:
    """Return a run file with what was set in it; defaults stay out, so that the file reads as it was written."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)


def _makes_embeddings(section: Section) -> bool:
    if isinstance(section, EmbeddingsConfig):
        return section.clip is not None
    parts = (getattr(section, name) for name in type(section).model_fields)
    return any(_makes_embeddings(part) for part in parts if isinstance(part, Section))


def label_name(run: str, attempt: int) -> str:
    """Name of an attempt's label Job. With an index behind it, it is a pod's host name: 63 characters at most."""
    return f"{run}-label-{attempt}"


def finalize_name(run: str, attempt: int) -> str:
    """Name of an attempt's finalize Job."""
    return f"{run}-finalize-{attempt}"


def selector(run: str | None = None, kind: Kind | None = None, attempt: int | None = None) -> str:
    """Return the label selector of what millctl made."""
    labels = _labels(run, kind, attempt)
    return ",".join(f"{name}={value}" for name, value in labels.items())


def _labels(run: str | None, kind: Kind | None, attempt: int | None) -> dict[str, str]:
    wanted = {
        NAME_LABEL: "labelmill",
        MANAGER_LABEL: "millctl",
        KIND_LABEL: kind,
        RUN_LABEL: run,
        ATTEMPT_LABEL: None if attempt is None else str(attempt),
    }
    return {name: value for name, value in wanted.items() if value is not None}


def config_map(request: Request) -> Object:
    """Return the immutable ConfigMap with the run file."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": request.config_map, "labels": _labels(request.run, None, None)},
        "immutable": True,
        "data": {RUN_KEY: request.text},
    }


def owner(job: Mapping[str, str]) -> Object:
    """Return the reference that makes a Job an owner; the ConfigMap goes when its last owner is gone."""
    return {"apiVersion": "batch/v1", "kind": "Job", "name": job["name"], "uid": job["uid"]}


def max_failed_indexes(shards: int) -> int:
    """Return after how many given-up shards the rest is not worth the money: an eighth, but 5 at least."""
    return min(shards, 100, max(5, shards // 8))


def label_job(request: Request, attempt: int, platform: PlatformConfig) -> Object:
    """Return the Indexed Job: a pod a shard, each with its GPUs."""
    resources = platform.worker.model_dump()
    if platform.gpu.count:
        for part in ("requests", "limits"):
            resources[part][platform.gpu.resource] = str(platform.gpu.count)
    command = ["mill", "label", RUN_FILE, f"--shards={request.shards}", *request.label_options]
    pod = _pod(platform, "worker", platform.images.worker, command, resources, request.config_map, models=True)
    spec: Object = pod["spec"]
    spec["serviceAccountName"] = platform.service_accounts.worker
    spec["volumes"] += [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": platform.shared_memory}},
        *platform.volumes,
    ]
    spec["containers"][0]["volumeMounts"] += [{"name": "shm", "mountPath": "/dev/shm"}, *platform.volume_mounts]
    if platform.node_selector:
        spec["nodeSelector"] = dict(platform.node_selector)
    if platform.tolerations:
        spec["tolerations"] = list(platform.tolerations)
    if platform.priority_class is not None:
        spec["priorityClassName"] = platform.priority_class
    queue = {} if platform.queue is None else {QUEUE_LABEL: platform.queue}
    job = {
        "completionMode": "Indexed",
        "completions": request.shards,
        "parallelism": min(request.parallelism or request.shards, request.shards),
        "backoffLimitPerIndex": platform.backoff_limit_per_index,
        "maxFailedIndexes": max_failed_indexes(request.shards),
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules("worker", worker_action)},
    }
    return _job(label_name(request.run, attempt), request, "label", attempt, platform, job, pod, queue)


def finalize_job(request: Request, attempt: int, platform: PlatformConfig) -> Object:
    """Return the Job that waits for the label Job and then finalizes. No GPU, no queue, no deadline."""
    finalize = ["mill", "finalize", RUN_FILE, *request.finalize_options]
    command = ["millctl", "wait", request.run, f"--attempt={attempt}", f"--run-file={RUN_FILE}", "--", *finalize]
    image = platform.images.worker if request.needs_models else platform.images.control
    pod = _pod(
        platform, "finalize", image, command, platform.finalize.model_dump(), request.config_map,
        models=request.needs_models,
    )  # fmt: skip
    spec: Object = pod["spec"]
    spec["serviceAccountName"] = platform.service_accounts.finalize
    spec["volumes"].append({"name": "token", "projected": {"sources": _token_sources()}})
    spec["containers"][0]["volumeMounts"].append({"name": "token", "mountPath": TOKEN_FOLDER, "readOnly": True})
    job = {
        "backoffLimit": FINALIZE_BACKOFF,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules("finalize", finalize_action)},
    }
    return _job(finalize_name(request.run, attempt), request, "finalize", attempt, platform, job, pod, {})


def task_job(
    name: str, request: Request, arguments: Sequence[str], platform: PlatformConfig, *, pull_worker: bool = False
) -> Object:
    """Return a small Job in the control image that runs `mill` once, with the worker's rights to the bucket.

    Args:
        name: of the Job.
        request: its run file is mounted.
        arguments: of `mill`.
        platform: the cluster's facts.
        pull_worker: first start the worker image, which proves that it can be pulled.
    """
    pod = _pod(
        platform, "task", platform.images.control, ["mill", *arguments], platform.finalize.model_dump(),
        request.config_map, models=False,
    )  # fmt: skip
    spec: Object = pod["spec"]
    spec["serviceAccountName"] = platform.service_accounts.worker
    if pull_worker:
        spec["initContainers"] = [
            {
                "name": "worker-image",
                "image": platform.images.worker,
                "imagePullPolicy": platform.images.pull_policy,
                "command": ["tini", "--version"],
                "securityContext": _container_security(),
                "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
            }
        ]
    job = {
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules("task", finalize_action)},
    }
    return _job(name, request, "task", 0, platform, job, pod, {})


def _job(
    name: str, request: Request, kind: Kind, attempt: int, platform: PlatformConfig, job: Object, pod: Object,
    labels: Mapping[str, str],
) -> Object:  # fmt: skip
    known = _labels(request.run, kind, attempt)
    pod["metadata"]["labels"] = known
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "labels": {**known, **labels},
            "annotations": {
                CONFIG_NOTE: request.config_map,
                OPTIONS_NOTE: " ".join(request.label_options),
                SHARDS_NOTE: str(request.shards),
                "labelmill/version": code_version(),
            },
        },
        "spec": {**job, "ttlSecondsAfterFinished": int(platform.ttl_days * DAY_S), "template": pod},
    }


def _failure_rules(container: str, action_of: Callable[[ExitCode], Action | None]) -> list[Object]:
    """Return the rules in order; the first that fits decides, and what fits none counts as a failure."""
    codes: dict[str, list[int]] = {"Ignore": [], "FailJob": [USAGE]}
    for code in ExitCode:
        action = action_of(code)
        if action is not None:
            codes[action].append(int(code))
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        *(
            {"action": action, "onExitCodes": {"containerName": container, "operator": "In", "values": sorted(values)}}
            for action, values in codes.items()
        ),
    ]


def _container_security() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _pod(
    platform: PlatformConfig, container: str, image: str, command: Sequence[str], resources: Object, run_map: str, *,
    models: bool,
) -> Object:  # fmt: skip
    """Return a pod template that the restricted Pod Security Standard lets pass, without an API token."""
    volumes: list[Object] = [
        {"name": "run", "configMap": {"name": run_map}},
        {"name": "tmp", "emptyDir": {"sizeLimit": platform.scratch}},
    ]
    mounts: list[Object] = [
        {"name": "run", "mountPath": RUN_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    env: list[Object] = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "HF_HOME", "value": "/tmp/huggingface"},
        {"name": "HF_HUB_OFFLINE", "value": "1"},
        {"name": "TRANSFORMERS_OFFLINE", "value": "1"},
    ]
    if platform.ca_bundle is not None:
        volumes.append({"name": "ca", "configMap": {"name": platform.ca_bundle.config_map}})
        mounts.append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
        env.append({"name": "AWS_CA_BUNDLE", "value": f"{CA_FOLDER}/{platform.ca_bundle.key}"})
    given = {item.get("name") for item in platform.env}
    spec: Object = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": container,
                "image": image,
                "imagePullPolicy": platform.images.pull_policy,
                "command": ["tini", "--", *command],
                # Server-side apply refuses two entries of one name; the platform's own wins.
                "env": [*(item for item in env if item["name"] not in given), *platform.env],
                "resources": resources,
                "securityContext": _container_security(),
                "volumeMounts": mounts,
                # The end of a failed container's log is then in the pod's status, for whoever may list pods.
                "terminationMessagePolicy": "FallbackToLogsOnError",
            }
        ],
        "volumes": volumes,
    }
    if platform.images.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in platform.images.pull_secrets]
    if platform.credentials_secret is not None:
        spec["containers"][0]["envFrom"] = [{"secretRef": {"name": platform.credentials_secret}}]
    if models and platform.models is not None:
        mount: Object = {"name": "models", "mountPath": platform.models.mount_path, "readOnly": True}
        if platform.models.content is not None:
            mount["subPath"] = platform.models.content
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": platform.models.claim}})
        mounts.append(mount)
        if platform.models.content is not None:
            spec["initContainers"] = [_weights_gate(platform, image, mount)]
    return {
        "metadata": {
            "annotations": {
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
            }
        },
        "spec": spec,
    }


def _weights_gate(platform: PlatformConfig, image: str, mount: Object) -> Object:
    """Return the init container that lets nobody start on half-copied weights."""
    marker = f"{mount['mountPath']}/{READY}"
    fault = '{"level": "error", "event": "no %s: the weights are not complete; see the prefetch Job"}'
    script = (
        f"for i in $(seq {READY_WAIT_S // 5}); do test -e {marker} && exit 0; sleep 5; done; "
        f"printf '{fault}\\n' {marker} >&2; exit {int(ExitCode.OUTSIDE)}"
    )
    return {
        "name": "weights",
        "image": image,
        "imagePullPolicy": platform.images.pull_policy,
        "command": ["/bin/sh", "-c", script],
        "securityContext": _container_security(),
        "resources": {"requests": {"cpu": "50m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
        "volumeMounts": [mount],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _token_sources() -> list[Object]:
    return [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_LIFETIME_S}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {
            "downwardAPI": {
                "items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]
            }
        },
    ]
