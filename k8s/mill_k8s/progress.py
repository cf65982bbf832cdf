"""What a run is doing: pure functions from Kubernetes' objects and heartbeats to what `millctl` prints.

The objects are read into our own types, which name what is used and let pass what a newer server adds.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Literal

import msgspec

from mill_k8s.manifests import (
    ATTEMPT_LABEL,
    CANCELLED_NOTE,
    CONFIG_NOTE,
    INDEX_LABEL,
    KIND_LABEL,
    OPTIONS_NOTE,
    RUN_LABEL,
    SHARDS_NOTE,
)
from mill_shared.heartbeat import BEATS_BEFORE_SILENT, WAITING, WORKING, Heartbeat

STUCK_AFTER_S = 600
"""A pod that has been Pending or Terminating for longer is worth a line."""
REASON_CHARS = 400
STARTING = frozenset({"ContainerCreating", "PodInitializing"})
"""Reasons of a waiting container that say nothing."""


class Meta(msgspec.Struct, frozen=True, rename="camel"):
    """Metadata of an object."""

    name: str
    uid: str = ""
    labels: Mapping[str, str] = {}
    annotations: Mapping[str, str] = {}
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None


class Condition(msgspec.Struct, frozen=True, rename="camel"):
    """A condition of a Job or a pod."""

    type: str
    status: str
    reason: str = ""
    message: str = ""


class JobSpec(msgspec.Struct, frozen=True, rename="camel"):
    """What a Job was asked to be."""

    completions: int = 1
    parallelism: int = 1
    suspend: bool = False


class JobStatus(msgspec.Struct, frozen=True, rename="camel"):
    """How far a Job is."""

    active: int = 0
    ready: int = 0
    succeeded: int = 0
    failed: int = 0
    terminating: int = 0
    completed_indexes: str = ""
    failed_indexes: str = ""
    conditions: Sequence[Condition] = ()


class Job(msgspec.Struct, frozen=True, rename="camel"):
    """A Job as the API gives it."""

    metadata: Meta
    spec: JobSpec = JobSpec()
    status: JobStatus = JobStatus()

    @property
    def run(self) -> str:
        """Id of the run."""
        return self.metadata.labels.get(RUN_LABEL, "")

    @property
    def attempt(self) -> int:
        """Number of the attempt."""
        text = self.metadata.labels.get(ATTEMPT_LABEL, "0")
        return int(text) if text.isdigit() else 0

    @property
    def kind(self) -> str:
        """`label`, `finalize` or `task`."""
        return self.metadata.labels.get(KIND_LABEL, "")

    @property
    def config_map(self) -> str:
        """Name of the ConfigMap with its run file."""
        return self.metadata.annotations.get(CONFIG_NOTE, "")

    @property
    def options(self) -> str:
        """Options of `mill label`."""
        return self.metadata.annotations.get(OPTIONS_NOTE, "")

    @property
    def shards(self) -> int:
        """Shards of the attempt."""
        text = self.metadata.annotations.get(SHARDS_NOTE, "")
        return int(text) if text.isdigit() else self.spec.completions

    @property
    def end(self) -> Condition | None:
        """The condition that ended it; None while it is not at its end."""
        for condition in self.status.conditions:
            if condition.type in ("Complete", "Failed") and condition.status == "True":
                return condition
        return None

    @property
    def state(self) -> "JobState":
        """In one word."""
        if self.end is not None and self.end.type == "Complete":
            return "complete"
        if CANCELLED_NOTE in self.metadata.annotations:
            return "cancelled"
        if self.end is not None:
            return "failed"
        return "suspended" if self.spec.suspend else "active"

    @property
    def is_live(self) -> bool:
        """Whether it may still do something."""
        return self.state in ("active", "suspended") and self.metadata.deletion_timestamp is None


JobState = Literal["complete", "failed", "cancelled", "suspended", "active"]


class Waiting(msgspec.Struct, frozen=True, rename="camel"):
    """Why a container does not run."""

    reason: str = ""
    message: str = ""


class Terminated(msgspec.Struct, frozen=True, rename="camel"):
    """How a container ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    finished_at: datetime | None = None


class ContainerState(msgspec.Struct, frozen=True, rename="camel"):
    """One of the three."""

    waiting: Waiting | None = None
    terminated: Terminated | None = None


class ContainerStatus(msgspec.Struct, frozen=True, rename="camel"):
    """A container of a pod."""

    name: str
    state: ContainerState = ContainerState()


class PodStatus(msgspec.Struct, frozen=True, rename="camel"):
    """How a pod is."""

    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: Sequence[Condition] = ()
    container_statuses: Sequence[ContainerStatus] = ()
    init_container_statuses: Sequence[ContainerStatus] = ()


class Pod(msgspec.Struct, frozen=True, rename="camel"):
    """A pod as the API gives it."""

    metadata: Meta
    status: PodStatus = PodStatus()

    @property
    def shard(self) -> int | None:
        """Completion index; None for a pod of another Job."""
        text = self.metadata.labels.get(INDEX_LABEL)
        return None if text is None else int(text)

    @property
    def containers(self) -> list[ContainerStatus]:
        """All containers, those that run first first."""
        return [*self.status.init_container_statuses, *self.status.container_statuses]

    @property
    def ended(self) -> Terminated | None:
        """How its container ended that failed first, else its last one; None while one runs."""
        found = [item.state.terminated for item in self.containers if item.state.terminated is not None]
        return next((item for item in found if item.exit_code), found[-1] if found else None)


class StuckPod(msgspec.Struct, frozen=True):
    """A pod that does not start or does not go."""

    pod: str
    shard: int | None
    state: Literal["Pending", "Terminating"]
    for_s: int
    why: str


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far labelling is, by the heartbeats and the store."""

    label_pass: int
    images: int
    done: int
    failed: Mapping[str, int]
    """Images that the newest worker of each shard found failed, by reason."""
    images_per_s: float
    left_s: int | None
    """Seconds for the images that are left at this rate; None where nobody works."""
    shards: Mapping[str, int]
    """Shards by what their newest worker says: working, waiting, done, silent, stopped: <error>, not started."""


class StatusLine(msgspec.Struct, frozen=True, kw_only=True):
    """What the waiting finalize pod prints every 30 s; `millctl status` reads it from its log."""

    event: Literal["status"] = "status"
    at: datetime
    run: str
    attempt: int
    label: str
    """State of the label Job, or `gone`."""
    progress: Progress | None
    """None where the store does not answer; the line before says why."""
    stuck: Sequence[StuckPod]


class ShardCounts(msgspec.Struct, frozen=True):
    """Shards by what Kubernetes says of them."""

    total: int
    done: int
    running: int
    pending: int
    queued: int
    """Wait for another shard's pod to end, for the queue, or for their back-off."""
    failed: int
    """Given up: failed more often than allowed."""


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All that `millctl status` shows of a run."""

    run: str
    attempt: int
    state: str
    """queued, starting, labelling, finalizing, finished, incomplete, failed or cancelled."""
    shards: ShardCounts | None
    """None for an attempt without a label Job."""
    progress: Progress | None
    progress_age_s: int | None
    """Seconds since the finalize pod said so."""
    label: str
    """State of the label Job, or `gone`."""
    label_reason: str
    finalize: str
    """State of the finalize Job, or `gone`."""
    finalize_reason: str
    faults: Mapping[str, int]
    """What failed pods said last -> how many of them."""
    stuck: Sequence[StuckPod]
    next: str
    """What to type next."""


class Attempt(msgspec.Struct, frozen=True):
    """The Jobs of one attempt."""

    number: int
    label: Job | None
    finalize: Job | None

    @property
    def newest(self) -> Job:
        """One of its Jobs; the label Job if there is one."""
        job = self.label or self.finalize
        assert job is not None, "an attempt has a Job"
        return job

    @property
    def is_live(self) -> bool:
        """Whether one of its Jobs may still do something."""
        return any(job is not None and job.is_live for job in (self.label, self.finalize))


def attempts_of(jobs: Iterable[Job]) -> list[Attempt]:
    """Return the attempts of one run, oldest first."""
    found: dict[int, dict[str, Job]] = {}
    for job in jobs:
        if job.kind in ("label", "finalize"):
            found.setdefault(job.attempt, {})[job.kind] = job
    return [Attempt(number, kinds.get("label"), kinds.get("finalize")) for number, kinds in sorted(found.items())]


def parse_indexes(text: str) -> frozenset[int]:
    """Read completion indexes as a Job writes them, e.g. `0,2-4,7`."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def why_not_running(pod: Pod) -> str:
    """Return why a pod does not start, as far as its status says."""
    for condition in pod.status.conditions:
        if condition.type == "PodScheduled" and condition.status == "False":
            return _one_line(f"{condition.reason}: {condition.message}")
    for container in pod.containers:
        waiting = container.state.waiting
        if waiting is not None and waiting.reason and waiting.reason not in STARTING:
            return _one_line(f"{waiting.reason}: {waiting.message}")
    if pod.status.reason or pod.status.message:
        return _one_line(f"{pod.status.reason}: {pod.status.message}")
    return f"still starting; kubectl describe pod {pod.metadata.name}"


def stuck_pods(pods: Iterable[Pod], now: datetime, *, after_s: float) -> list[StuckPod]:
    """Return the pods that have been Pending or Terminating for longer than `after_s`, the longest first."""
    found = []
    for pod in pods:
        meta = pod.metadata
        state: Literal["Pending", "Terminating"]
        if meta.deletion_timestamp is not None:
            state, since = "Terminating", meta.deletion_timestamp
            why = "its node does not answer; kubectl get nodes" if pod.status.reason == "NodeLost" else "not gone yet"
        elif pod.status.phase == "Pending" and meta.creation_timestamp is not None:
            state, since, why = "Pending", meta.creation_timestamp, why_not_running(pod)
        else:
            continue
        for_s = (now - since).total_seconds()
        if for_s >= after_s:
            found.append(StuckPod(meta.name, pod.shard, state, int(for_s), why))
    return sorted(found, key=lambda stuck: (-stuck.for_s, stuck.pod))


def last_words(pod: Pod) -> str | None:
    """Return why a failed pod failed: its last error line, which names the fault; None for a pod that did not."""
    ended = pod.ended
    if pod.status.phase != "Failed":
        return None
    if ended is None:
        return _one_line(f"{pod.status.reason}: {pod.status.message}").strip(": ") or "ended without a word"
    if ended.reason == "OOMKilled":
        return "OOMKilled: above its memory limit; raise platform.worker.limits.memory"
    lines = ended.message.strip().splitlines()
    entries = [_event(line) for line in lines]
    for level, event in reversed(entries):
        if level in ("error", "critical"):
            return _one_line(f"exit {ended.exit_code}: {event}")
    if not entries:
        return _one_line(f"exit {ended.exit_code}: {ended.reason or pod.status.reason or 'no message'}")
    level, event = entries[-1]
    # Of a line that is no error the event alone, without its time and chunk: equal deaths are counted together.
    return _one_line(f"exit {ended.exit_code}" + (f", the last it said: {event}" if level else f": {event}"))


def _event(line: str) -> tuple[str, str]:
    """Return level and event of a log line; of one that is not ours no level and the line."""
    try:
        entry = json.loads(line)
    except ValueError:
        return "", line
    return (str(entry.get("level", "")), str(entry.get("event", ""))) if isinstance(entry, dict) else ("", line)


def faults_of(pods: Iterable[Pod]) -> dict[str, int]:
    """Count the failed pods by their last words, the most frequent first."""
    return dict(Counter(words for pod in pods if (words := last_words(pod)) is not None).most_common())


def summarise(
    beats: Iterable[Heartbeat], *, label_pass: int, shards: int, images: int, listed: Mapping[int, int], now: float,
    heartbeat_s: float,
) -> Progress:  # fmt: skip
    """Bring the shards' heartbeats together.

    Args:
        beats: of any pass and any shard count; only this pass's with this count matter.
        label_pass: the pass that is worked on.
        shards: of the attempt.
        images: of the pass.
        listed: shard -> images in committed chunks, by a listing; for shards that have no heartbeat yet.
        now: seconds since the epoch.
        heartbeat_s: seconds between heartbeats.
    """
    newest = {beat.shard: beat for beat in beats if beat.pass_index == label_pass and beat.shards == shards}
    done = sum(newest[shard].images_done if shard in newest else listed.get(shard, 0) for shard in range(shards))
    failed: Counter[str] = Counter()
    states: Counter[str] = Counter()
    working, labelled, worked_s = 0, 0, 0.0
    for beat in newest.values():
        failed.update(beat.failed)
        at_work = beat.state in (WORKING, WAITING)
        silent = at_work and now - beat.updated_at > BEATS_BEFORE_SILENT * heartbeat_s
        states["silent" if silent else beat.state] += 1
        working += at_work and not silent
        if beat.images_labelled:
            labelled += beat.images_labelled
            worked_s += max(beat.updated_at - beat.started_at, 1.0)
    if len(newest) < shards:
        states["not started"] += shards - len(newest)
    left = max(images - done, 0)
    # Those at work now, each as fast as all were on average: a shard that has just begun has no speed of its own yet.
    rate = working * labelled / worked_s if labelled else 0.0
    return Progress(
        label_pass=label_pass, images=images, done=done, failed=dict(failed.most_common()), images_per_s=round(rate, 3),
        left_s=round(left / rate) if rate > 0 else None, shards=dict(states.most_common()),
    )  # fmt: skip


def last_status_line(log: Iterable[str]) -> StatusLine | None:
    """Return the newest status line in a finalize pod's log."""
    found = None
    for line in log:
        if '"event":"status"' in line:
            try:
                found = msgspec.json.decode(line, type=StatusLine)
            except msgspec.DecodeError:
                continue
    return found


def count_shards(job: Job, pods: Sequence[Pod]) -> ShardCounts:
    """Count a label Job's shards by what Kubernetes says of them."""
    done = parse_indexes(job.status.completed_indexes)
    failed = parse_indexes(job.status.failed_indexes)
    live = [pod for pod in pods if pod.metadata.deletion_timestamp is None and pod.shard not in done | failed]
    running = {pod.shard for pod in live if pod.status.phase == "Running"}
    pending = {pod.shard for pod in live if pod.status.phase == "Pending"} - running
    total = job.spec.completions
    queued = total - len(done) - len(failed) - len(running) - len(pending)
    return ShardCounts(total, len(done), len(running), len(pending), max(queued, 0), len(failed))


def run_status(
    run: str, attempt: Attempt, pods: Sequence[Pod], line: StatusLine | None, now: datetime, *, stuck_after_s: float = 0
) -> RunStatus:
    """Bring together what the API and the finalize pod say of an attempt.

    Args:
        run: id.
        attempt: its Jobs.
        pods: of both Jobs.
        line: the finalize pod's newest.
        now: for ages.
        stuck_after_s: how long a pod must have been Pending to be named.
    """
    label, finalize = attempt.label, attempt.finalize
    label_pods = [pod for pod in pods if pod.metadata.labels.get(KIND_LABEL) == "label"]
    finalize_pods = [pod for pod in pods if pod.metadata.labels.get(KIND_LABEL) == "finalize"]
    shards = None if label is None else count_shards(label, label_pods)
    state = _state(attempt, shards)
    faults = faults_of(label_pods)
    for words, count in faults_of(finalize_pods).items():
        faults[f"finalize: {words}"] = count
    return RunStatus(
        run=run, attempt=attempt.number, state=state, shards=shards, progress=None if line is None else line.progress,
        progress_age_s=None if line is None else int((now - line.at).total_seconds()),
        label="gone" if label is None else label.state, label_reason=_reason(label),
        finalize="gone" if finalize is None else finalize.state, finalize_reason=_reason(finalize), faults=faults,
        stuck=stuck_pods(pods, now, after_s=stuck_after_s), next=_advice(run, state, attempt, faults),
    )  # fmt: skip


def _state(attempt: Attempt, shards: ShardCounts | None) -> str:
    label, finalize = attempt.label, attempt.finalize
    if any(job is not None and job.state == "cancelled" for job in (label, finalize)):
        return "cancelled"
    if label is not None and label.is_live:
        if label.spec.suspend:
            return "queued"
        assert shards is not None, "a label Job has shards"
        return "labelling" if shards.running or shards.done or shards.failed else "starting"
    if finalize is None:
        return "labelled" if label is not None and label.state == "complete" else "failed"
    if finalize.is_live:
        return "finalizing"
    if finalize.state == "complete":
        return "incomplete" if label is not None and label.state == "failed" else "finished"
    return "failed"


def _reason(job: Job | None) -> str:
    if job is None or job.end is None or job.end.type == "Complete":
        return ""
    return _one_line(f"{job.end.reason}: {job.end.message}")


def _advice(run: str, state: str, attempt: Attempt, faults: Mapping[str, int]) -> str:
    logs = f"millctl logs {run}"
    match state:
        case "queued":
            return f"the queue decides; kubectl get workloads, or millctl cancel {run}"
        case "starting" | "labelling":
            return f"{logs} --follow"
        case "finalizing":
            return f"{logs} --finalize --follow"
        case "finished":
            return "mill fetch RUN.yaml --to DIR"
        case "incomplete":
            return f"a final was made of what there is; mend the cause above, then millctl rerun {run}"
        case "cancelled":
            return f"nothing is lost; millctl submit RUN.yaml --shards N goes on, millctl rerun {run} too"
        case "labelled":
            return f"millctl finalize {run}"
    if faults or attempt.label is not None:
        return f"mend the cause above ({logs} shows more), then millctl rerun {run}"
    return f"{logs} --finalize"


def duration(seconds: float) -> str:
    """Return a time span in its two largest units, e.g. `3 h 20 min`."""
    whole = int(seconds)
    for unit, small, size, part in (("d", "h", 86_400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit} {rest} {small}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def status_lines(status: RunStatus) -> list[str]:
    """Return a run's status as a person reads it."""
    lines = [f"{status.run}, attempt {status.attempt}: {status.state}"]
    found = status.progress
    if found is not None:
        share = f" ({100 * found.done / found.images:.1f} %)" if found.images else ""
        failed = sum(found.failed.values())
        lines.append(
            f"  images    {found.done} of {found.images} done{share}, {max(found.images - found.done, 0)} left"
            + (f", pass {found.label_pass}" if found.label_pass else "")
        )
        if failed:
            reasons = ", ".join(f"{count} {reason}" for reason, count in found.failed.items())
            lines.append(f"  failed    {failed}: {reasons}")
        if status.state == "labelling":
            left = "" if found.left_s is None else f", {duration(found.left_s)} left"
            lines.append(f"  speed     {found.images_per_s:g} images/s{left}")
        if status.progress_age_s is not None and status.progress_age_s > 120 and status.state == "labelling":
            lines.append(
                f"            as of {duration(status.progress_age_s)} ago: the finalize pod says nothing newer"
            )
    elif status.state in ("labelling", "starting"):
        lines.append(
            "  images    not known: the finalize pod, which counts them, has not begun, or its node does not answer"
        )
    if status.shards is not None:
        counts = status.shards
        parts = [("done", counts.done), ("running", counts.running), ("pending", counts.pending),
                 ("queued", counts.queued), ("given up", counts.failed)]  # fmt: skip
        lines.append(f"  shards    {counts.total}: " + ", ".join(f"{count} {name}" for name, count in parts if count))
        waiting = {} if found is None else found.shards
        for name in ("waiting", "silent"):
            if waiting.get(name) and status.state == "labelling":
                why = "for something outside" if name == "waiting" else "no heartbeat; lost node or dead process"
                lines.append(f"            {waiting[name]} {name} ({why})")
    lines.append(f"  label     {status.label}" + (f": {status.label_reason}" if status.label_reason else ""))
    lines.append(f"  finalize  {status.finalize}" + (f": {status.finalize_reason}" if status.finalize_reason else ""))
    lines += [f"  {count} x {words}" for words, count in list(status.faults.items())[:8]]
    for stuck in status.stuck[:8]:
        lines.append(f"  {stuck.pod} {stuck.state} for {duration(stuck.for_s)}: {stuck.why}")
    if len(status.stuck) > 8:
        lines.append(f"  and {len(status.stuck) - 8} pods more that do not start")
    lines.append(f"  next: {status.next}")
    return lines


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_CHARS else f"{line[: REASON_CHARS - 3]}..."
