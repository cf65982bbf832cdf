"""What a run needs of its cluster, looked at before anything is rented: fine, a problem, or out of sight."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from mill_k8s.client import Cluster
from mill_k8s.manifests import Object, Request, config_map, selector, task_job
from mill_k8s.platform import FINALIZE_MAY, SUBMITTER_MAY, Permission, PlatformConfig
from mill_k8s.progress import Job, faults_of, why_not_running
from mill_shared.errors import ConfigError

FLOOR = (1, 33)
"""Kubernetes version whose Jobs can do what a run needs: failure policies a shard. Source: design.md 5."""
TASK_TIMEOUT_S = 600
POLL_S = 2.0
POWERS = (
    Permission("batch", "jobs", ("create", "delete", "patch")),
    Permission("", "secrets", ("get", "list")),
    Permission("", "pods", ("create", "delete")),
    Permission("", "pods/exec", ("create",)),
    Permission("", "configmaps", ("create",)),
)
"""What no pod of a run may do, whatever it was tricked into by an image."""


@dataclass(frozen=True)
class Finding:
    """What one look found."""

    level: Literal["ok", "problem", "cannot see"]
    text: str
    """What was found and, if it is a problem, what to do."""


class _Check(msgspec.Struct):
    ok: bool
    text: str


def _ok(text: str) -> Finding:
    return Finding("ok", text)


def _problem(text: str) -> Finding:
    return Finding("problem", text)


def _unseen(text: str) -> Finding:
    return Finding("cannot see", text)


def check_platform(cluster: Cluster, platform: PlatformConfig) -> list[Finding]:
    """Look at everything that a run's pods refer to."""
    return [
        *_version(cluster), *_accounts(cluster, platform), *_secrets(cluster, platform), *_weights(cluster, platform),
        *_scheduling(cluster, platform), *_gpu(cluster, platform),
    ]  # fmt: skip


def _version(cluster: Cluster) -> Iterator[Finding]:
    major, minor = cluster.version()
    floor = ".".join(map(str, FLOOR))
    if (major, minor) < FLOOR:
        yield _problem(
            f"Kubernetes {major}.{minor} is older than {floor}, the first whose Jobs can do this; upgrade it"
        )
    else:
        yield _ok(f"Kubernetes {major}.{minor} (at least {floor})")


def _named(there: bool | None, what: str, todo: str) -> Finding:
    if there is None:
        return _unseen(f"{what}: no right to look; if it is missing, pods will not start")
    return _ok(what) if there else _problem(f"{what} does not exist; {todo}")


def _accounts(cluster: Cluster, platform: PlatformConfig) -> Iterator[Finding]:
    accounts = platform.service_accounts
    for name in dict.fromkeys((accounts.worker, accounts.finalize)):
        yield _named(cluster.exists("serviceaccounts", name), f"service account {name}", "helm upgrade makes it")


def _secrets(cluster: Cluster, platform: PlatformConfig) -> Iterator[Finding]:
    where = f"in namespace {cluster.namespace}"
    if platform.credentials_secret is not None:
        name = platform.credentials_secret
        todo = (
            f"kubectl -n {cluster.namespace} create secret generic {name} --from-literal=AWS_ACCESS_KEY_ID=... "
            "--from-literal=AWS_SECRET_ACCESS_KEY=..."
        )
        yield _named(cluster.exists("secrets", name), f"Secret {name} {where}", todo)
    for name in platform.images.pull_secrets:
        todo = f"make it {where}, or correct platform.images.pull_secrets"
        yield _named(cluster.exists("secrets", name), f"pull Secret {name}", todo)
    if platform.ca_bundle is not None:
        name = platform.ca_bundle.config_map
        todo = f"make it {where}, or correct platform.ca_bundle"
        yield _named(cluster.exists("configmaps", name), f"ConfigMap {name} of the certificate authority", todo)


def _weights(cluster: Cluster, platform: PlatformConfig) -> Iterator[Finding]:
    models = platform.models
    if models is None:
        return
    there = cluster.exists("persistentvolumeclaims", models.claim)
    claim = cluster.claim(models.claim) if there else None
    if claim is not None and claim.phase == "Lost":
        yield _problem(f"claim {models.claim} has lost its volume; restore it, or make a new one and prefetch again")
    else:
        phase = f", {claim.phase}" if claim is not None else ""
        yield _named(there, f"claim {models.claim} of the weights{phase}", "correct platform.models.claim")
    if models.prefetch_job is None:
        return
    job = cluster.job(models.prefetch_job)
    if job is None:
        yield _unseen(f"weights: the prefetch Job {models.prefetch_job} is gone; workers look for the READY marker")
    elif job.state == "complete":
        yield _ok(f"weights: the prefetch Job {models.prefetch_job} is complete")
    elif job.is_live:
        yield _problem(f"weights: still coming; kubectl -n {cluster.namespace} logs -f job/{models.prefetch_job}")
    else:
        reason = job.end.message if job.end else ""
        todo = f"kubectl -n {cluster.namespace} logs job/{models.prefetch_job} says why; mend it, then helm upgrade"
        yield _problem(f"weights: the prefetch Job {models.prefetch_job} failed ({reason}); {todo}")


def _scheduling(cluster: Cluster, platform: PlatformConfig) -> Iterator[Finding]:
    if platform.queue is not None:
        todo = "correct platform.queue (kubectl get localqueues), or install Kueue"
        yield _named(cluster.queue_exists(platform.queue), f"queue {platform.queue}", todo)
    if platform.priority_class is not None:
        name = platform.priority_class
        todo = "correct platform.priority_class (kubectl get priorityclasses)"
        yield _named(cluster.priority_class_exists(name), f"priority class {name}", todo)


def _gpu(cluster: Cluster, platform: PlatformConfig) -> Iterator[Finding]:
    gpu = platform.gpu
    if gpu.count == 0:
        return
    if gpu.on_demand:
        yield _unseen(f"GPU {gpu.resource}: nodes come on demand; a wrong name shows as pods that stay Pending")
        return
    resources = cluster.node_resources()
    if resources is None:
        yield _unseen(f"GPU {gpu.resource}: no right to list nodes; a wrong name shows as pods that stay Pending")
        return
    if gpu.resource in resources:
        yield _ok(f"GPU {gpu.resource} on {resources[gpu.resource]} nodes")
        return
    others = sorted(name for name in resources if "/" in name) or ["none"]
    yield _problem(
        f"no node has {gpu.resource}; nodes offer: {', '.join(others)}. Correct platform.gpu.resource, or set "
        "platform.gpu.on_demand where an autoscaler brings the nodes"
    )


def check_rights(cluster: Cluster, platform: PlatformConfig) -> list[Finding]:
    """Look at what this user must be able to do, and what a run's pods must not."""
    findings = []
    for permission in SUBMITTER_MAY:
        missing = [
            verb for verb in permission.verbs if cluster.may(verb, permission.group, permission.resource) is False
        ]
        what = f"you: {permission.resource}"
        if missing:
            todo = "ask for the role of the chart's submitter"
            findings.append(_problem(f"{what}: may not {', '.join(missing)}; {todo}"))
        else:
            findings.append(_ok(f"{what}: {', '.join(permission.verbs)}"))
    finalize = platform.service_accounts.finalize
    for permission in FINALIZE_MAY:
        found = [cluster.may(verb, permission.group, permission.resource, finalize) for verb in permission.verbs]
        what = f"{finalize}: {', '.join(permission.verbs)} {permission.resource}"
        if None in found:
            findings.append(_unseen(f"{what}: no right to ask for others"))
        elif False in found:
            findings.append(
                _problem(f"{what}: not allowed, so finalize would wait blindly; helm upgrade makes the role")
            )
        else:
            findings.append(_ok(what))
    for account in dict.fromkeys((platform.service_accounts.worker, finalize)):
        findings.append(_powers(cluster, account))
    return findings


def _powers(cluster: Cluster, account: str) -> Finding:
    asked = [(verb, p) for p in POWERS for verb in p.verbs]
    answers = [cluster.may(verb, p.group, p.resource, account) for verb, p in asked]
    if None in answers:
        return _unseen(f"{account}: no right to ask what it must not do")
    excess = [f"{verb} {p.resource}" for (verb, p), answer in zip(asked, answers, strict=True) if answer]
    if excess:
        return _problem(f"{account}: may {', '.join(excess)}, which no pod of a run needs; take that role from it")
    return _ok(f"{account}: may not touch Jobs, pods, Secrets or ConfigMaps")


def check_bucket(
    cluster: Cluster, platform: PlatformConfig, request: Request, *, pull_worker: bool = False, stamp: str,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Finding]:  # fmt: skip
    """Run `mill probe` in the cluster, as the account that labels, and return what it found.

    Args:
        cluster: where.
        platform: its facts.
        request: whose store and images are probed.
        pull_worker: also pull the worker image, which may take minutes.
        stamp: makes the Job's name unique.
        sleep: between looks.
    """
    name = f"labelmill-doctor-{stamp}"
    body = task_job(name, request, ["probe", "/etc/labelmill/run.yaml", "--json"], platform, pull_worker=pull_worker)
    made = cluster.create(config_map(request))
    try:
        log, fault = run_task(cluster, body, sleep=sleep)
    finally:
        cluster.delete_job(name)
        if made:
            cluster.delete_config_map(request.config_map)
    findings = []
    for line in log:
        try:
            check = msgspec.json.decode(line, type=_Check)
        except msgspec.DecodeError:
            continue
        findings.append(_ok(check.text) if check.ok else _problem(check.text))
    images = "both images" if pull_worker else "the control image"
    if findings:
        return [_ok(f"{images}: pulled and started"), *findings]
    return [_problem(f"bucket: not probed, since the probe's pod did not run: {fault or 'it said nothing'}")]


def run_task(cluster: Cluster, body: Object, *, sleep: Callable[[float], None] = time.sleep) -> tuple[list[str], str]:
    """Run a small Job to its end.

    Returns:
        The lines of its log, and why it failed; an empty text where it did not.

    Raises:
        ConfigError: there is a Job of this name.
    """
    name = body["metadata"]["name"]
    if not cluster.create(body):
        raise ConfigError(f"Job {name} exists; another millctl is at work, wait for it: kubectl get job {name}")
    own = f"batch.kubernetes.io/job-name={name},{selector(kind='task')}"
    job: Job | None = None
    for _ in range(int(TASK_TIMEOUT_S / POLL_S)):
        job = cluster.job(name)
        if job is None or job.end is not None:
            break
        sleep(POLL_S)
    pods = cluster.pods(own)
    lines = [line for pod in pods for line in cluster.log(pod.metadata.name, "task")]
    if job is not None and job.state == "complete":
        return lines, ""
    faults = faults_of(pods) or {why_not_running(pod): 1 for pod in pods if pod.status.phase == "Pending"}
    return lines, "; ".join(faults) or f"Job {name} did not end within {TASK_TIMEOUT_S} s"
