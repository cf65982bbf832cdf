"""Looking at runs from outside, with the Kubernetes API alone: status, logs, and waiting for the end."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Literal

from mill_k8s.client import Cluster, ClusterError, PendingError
from mill_k8s.manifests import selector
from mill_k8s.progress import (
    Attempt,
    Pod,
    RunStatus,
    attempts_of,
    duration,
    last_status_line,
    run_status,
    status_lines,
    stuck_pods,
)
from mill_k8s.submit import newest_attempt
from mill_shared.errors import ConfigError, ExitCode, MillError

LOG_TAIL = 300
"""Lines of the finalize pod's log in which the newest status line is looked for."""
FOLLOW_S = 10.0
LOOK_S = 3.0
"""Seconds between looks for new pods while logs are followed."""
CONTAINERS = {"label": "worker", "finalize": "finalize"}

Say = Callable[[str], object]


def newest_run(cluster: Cluster) -> str:
    """Return the run whose newest Job is the youngest.

    Raises:
        ConfigError: there is none.
    """
    jobs = [job for job in cluster.jobs(selector()) if job.kind in CONTAINERS and job.metadata.creation_timestamp]
    if not jobs:
        raise ConfigError(f"no run in namespace {cluster.namespace}; millctl submit RUN.yaml --shards 12 starts one")
    return max(jobs, key=lambda job: job.metadata.creation_timestamp or datetime.min.replace(tzinfo=UTC)).run


def read_status(cluster: Cluster, run: str, now: datetime | None = None, *, stuck_after_s: float = 30) -> RunStatus:
    """Return all that is known of a run's newest attempt.

    Args:
        cluster: where.
        run: id.
        now: for ages.
        stuck_after_s: how long a pod must have been Pending to be named.

    Raises:
        ConfigError: there is no such run here.
    """
    return _read(cluster, run, newest_attempt(cluster, run), now, stuck_after_s)


def _read(cluster: Cluster, run: str, attempt: Attempt, now: datetime | None, stuck_after_s: float) -> RunStatus:
    pods = cluster.pods(selector(run, attempt=attempt.number))
    line = None
    for pod in sorted(pods, key=_age, reverse=True):
        if _kind(pod) == "finalize" and line is None:
            # A log comes from the pod's node, which may be gone while the API answers; all else is still worth showing.
            with contextlib.suppress(ClusterError):
                line = last_status_line(cluster.log(pod.metadata.name, "finalize", tail=LOG_TAIL))
    return run_status(run, attempt, pods, line, now or datetime.now(UTC), stuck_after_s=stuck_after_s)


def read_runs(cluster: Cluster, now: datetime | None = None) -> list[tuple[RunStatus, datetime | None]]:
    """Return the newest attempt of every run and when it was submitted, the youngest first. Reads no logs."""
    by_run: dict[str, list[Attempt]] = {}
    jobs = cluster.jobs(selector())
    for run in {job.run for job in jobs}:
        by_run[run] = attempts_of(job for job in jobs if job.run == run)
    pods: dict[str, list[Pod]] = {}
    for pod in cluster.pods(selector()):
        pods.setdefault(pod.metadata.labels.get("labelmill/run", ""), []).append(pod)
    found = []
    for run, attempts in by_run.items():
        if attempts:
            status = run_status(run, attempts[-1], pods.get(run, []), None, now or datetime.now(UTC), stuck_after_s=600)
            found.append((status, attempts[-1].newest.metadata.creation_timestamp))
    return sorted(found, key=lambda item: (item[1] or datetime.max.replace(tzinfo=UTC), item[0].run), reverse=True)


def _kind(pod: Pod) -> str:
    return pod.metadata.labels.get("app.kubernetes.io/component", "")


def _age(pod: Pod) -> tuple[datetime, str]:
    return (pod.metadata.creation_timestamp or datetime.min.replace(tzinfo=UTC), pod.metadata.name)


def exit_code_of(status: RunStatus, pods: Iterable[Pod]) -> ExitCode:
    """Return the exit code of a run at its end: that of finalize, which judges the whole."""
    if status.state in ("finished", "incomplete"):
        return ExitCode.OK
    if status.state == "cancelled":
        return ExitCode.INTERRUPTED
    known = {int(code) for code in ExitCode} - {0}
    for kind in ("finalize", "label"):
        for pod in sorted((pod for pod in pods if _kind(pod) == kind), key=_age, reverse=True):
            if pod.ended is not None and pod.ended.exit_code in known:
                return ExitCode(pod.ended.exit_code)
    return ExitCode.OUTSIDE


def follow(
    cluster: Cluster, run: str, say: Say, *, pending_s: float, sleep: Callable[[float], None] = time.sleep
) -> ExitCode:
    """Print a run's status whenever it changes, until its end.

    Args:
        cluster: where; its errors are waited out.
        run: id.
        say: prints a line.
        pending_s: for how long no pod may get to run while some are Pending.
        sleep: between looks.

    Returns:
        What the process should end with.

    Raises:
        PendingError: pods stayed Pending; says why. The run is left as it is.
    """
    shown: list[str] = []
    attempt: Attempt | None = None
    while True:
        try:
            attempt = newest_attempt(cluster, run)
            pods = cluster.pods(selector(run, attempt=attempt.number))
            status = _read(cluster, run, attempt, None, 60)
        except ClusterError as error:
            say(f"{error}; asking again")
            sleep(FOLLOW_S)
            continue
        except ConfigError:
            if attempt is None:
                raise
            say(f"run {run}: its Jobs are gone")
            return ExitCode.OUTSIDE
        lines = status_lines(status)
        if _worth_showing(lines, shown):
            for text in lines:
                say(text)
            shown = lines
        if not attempt.is_live:
            return exit_code_of(status, pods)
        _require_start(run, attempt, pods, pending_s)
        sleep(FOLLOW_S)


def _worth_showing(lines: list[str], shown: list[str]) -> bool:
    """Whether something changed that is no age."""
    moving = ("speed", "as of")

    def steady(texts: list[str]) -> list[str]:
        return [text.split(" for ")[0] for text in texts if not text.strip().startswith(moving)]

    return steady(lines) != steady(shown)


def _require_start(run: str, attempt: Attempt, pods: list[Pod], pending_s: float) -> None:
    label_lives = attempt.label is not None and attempt.label.is_live
    mine = [pod for pod in pods if _kind(pod) == ("label" if label_lives else "finalize")]
    if any(pod.status.phase == "Running" for pod in mine):
        return
    stuck = [item for item in stuck_pods(mine, datetime.now(UTC), after_s=pending_s) if item.state == "Pending"]
    if stuck:
        raise PendingError(
            f"run {run}: {len(stuck)} pods Pending for {duration(stuck[0].for_s)} and none at work; {stuck[0].pod}: "
            f"{stuck[0].why}. The run is left as it is: mend that, or millctl cancel {run}"
        )


def print_logs(
    cluster: Cluster, run: str, say: Say, *, kind: Literal["label", "finalize"], shard: int | None, tail: int | None,
    follow: bool, sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Print the logs of a run's newest attempt, each line with its shard before it.

    Args:
        cluster: where.
        run: id.
        say: prints a line; called from many threads, one at a time.
        kind: which Job.
        shard: only this one; None for all.
        tail: only the last so many lines of each pod; None for all.
        follow: go on until the Job's end, with pods that start later.
        sleep: between looks for new pods.

    Raises:
        ConfigError: no such run or shard.
    """
    attempt = newest_attempt(cluster, run)
    job = attempt.label if kind == "label" else attempt.finalize
    if job is None:
        raise ConfigError(f"run {run}, attempt {attempt.number}: its {kind} Job is gone, and with it the logs")
    if shard is not None and shard >= job.spec.completions:
        raise ConfigError(f"--shard {shard}: run {run} has shards 0 to {job.spec.completions - 1}")
    lock = threading.Lock()
    seen: set[str] = set()
    readers: list[threading.Thread] = []
    alone = shard is not None or kind == "finalize"

    def read(pod: Pod) -> None:
        mark = "" if alone else f"[{pod.shard}] "
        try:
            for line in cluster.log(pod.metadata.name, CONTAINERS[kind], tail=tail, follow=follow):
                with lock:
                    say(f"{mark}{line}")
        except MillError as error:
            with lock:
                say(f"{mark}{pod.metadata.name}: {error}")

    def start_new() -> None:
        pods = cluster.pods(selector(run, kind, attempt.number))
        for pod in sorted(pods, key=lambda pod: (pod.shard or 0, _age(pod))):
            begun = pod.status.phase in ("Running", "Succeeded", "Failed")
            if begun and pod.metadata.name not in seen and shard in (None, pod.shard):
                seen.add(pod.metadata.name)
                if follow:
                    readers.append(threading.Thread(target=read, args=(pod,), daemon=True))
                    readers[-1].start()
                else:
                    read(pod)

    start_new()
    while follow:
        now = cluster.job(job.metadata.name)
        if now is None or not now.is_live:
            break
        sleep(LOOK_S)
        start_new()
    for reader in readers:
        reader.join(timeout=30)
    if not seen:
        say(f"no {kind} pod of run {run} has started yet; millctl status {run} says why")
