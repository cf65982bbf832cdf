"""What the finalize pod does before it finalizes: waits for the label Job, and tells how far it is.

It trusts nothing but the store in the end: whatever became of the label Job, finalize counts the records itself.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec
import structlog

from mill_jobs.config import RunConfig
from mill_k8s.client import Cluster
from mill_k8s.manifests import label_name, selector
from mill_k8s.progress import STUCK_AFTER_S, Job, Progress, StatusLine, faults_of, stuck_pods, summarise
from mill_shared.errors import MillError
from mill_shared.heartbeat import read_heartbeats
from mill_shared.keys import RunKeys
from mill_shared.plan import LabelPass, RunPlan, read_passes, read_plan
from mill_shared.storage import Store, open_store

log = structlog.get_logger()

POLL_S = 5.0
LINE_S = 30.0
"""Seconds between status lines."""
LOOKS_BEFORE_GONE = 3
"""Answers that there is no label Job before it counts as gone; its creation may be on its way."""


class StoreView:
    """How far the run in the store is. What is costly is read once: the plan, and the listing of its chunks."""

    def __init__(self, config: RunConfig, run: str) -> None:
        self._config, self._run, self._keys = config, run, RunKeys(run)
        self._store: Store | None = None
        self._plan: RunPlan | None = None
        self._pass: LabelPass | None = None
        self._listed: dict[int, int] = {}

    def progress(self, shards: int, first: int | None, now: float) -> Progress:
        """Return how far the newest pass is.

        Args:
            shards: of the attempt.
            first: only the chunks with the first so many images count.
            now: seconds since the epoch.

        Raises:
            MillError: the store does not answer, or the run is not planned yet.
        """
        if self._store is None:
            self._store = open_store(self._config.store, self._config.storage)
        if self._plan is None or self._pass is None:
            self._plan = read_plan(self._store, self._run)
            self._pass = read_passes(self._store, self._plan)[-1]
            self._listed = self._list(self._store, self._pass, shards)
        size = self._plan.chunk_size
        images = sum(
            len(self._pass.chunk_rows(chunk))
            for chunk in range(self._pass.chunks)
            if first is None or chunk * size < first
        )
        return summarise(
            read_heartbeats(self._store, self._keys), label_pass=self._pass.index, shards=shards, images=images,
            listed=self._listed, now=now, heartbeat_s=self._config.limits.heartbeat_s,
        )  # fmt: skip

    def _list(self, store: Store, label_pass: LabelPass, shards: int) -> dict[int, int]:
        present = {entry.key for entry in store.list(self._keys.chunks(label_pass.index))}
        found: dict[int, int] = {}
        for chunk in range(label_pass.chunks):
            if self._keys.chunk(label_pass.index, chunk) in present:
                found[chunk % shards] = found.get(chunk % shards, 0) + len(label_pass.chunk_rows(chunk))
        return found


def first_images(options: str) -> int | None:
    """Return N of `--first=N` in the options of `mill label`; None where all images are labelled."""
    for option in options.split():
        name, _, value = option.partition("=")
        if name == "--first":
            return int(value)
    return None


def wait_for_label(
    cluster: Cluster, run: str, attempt: int, view: StoreView, emit: Callable[[str], object], *,
    sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.time,
) -> None:  # fmt: skip
    """Return when the label Job of an attempt is at its end or gone. A suspended one is neither.

    Args:
        cluster: where; its errors are logged and waited out, for ever: finalize has no deadline.
        run: id.
        attempt: number.
        view: of the store.
        emit: gets a status line every 30 s.
        sleep: between looks.
        clock: seconds since the epoch.
    """
    name, missing, next_line, job = label_name(run, attempt), 0, 0.0, None
    while True:
        try:
            job = cluster.job(name)
        except MillError as error:
            log.warning("the Kubernetes API does not say how the label Job is; asking again", error=str(error))
        else:
            missing = missing + 1 if job is None else 0
            ended = job is not None and job.end is not None
            gone = missing >= LOOKS_BEFORE_GONE
            if ended or gone or clock() >= next_line:
                next_line = clock() + LINE_S
                emit(_status_line(cluster, run, attempt, job, view, clock()))
            if gone:
                log.warning("there is no label Job; going on with what is in the store", job=name)
                return
            if ended:
                assert job is not None, "an ended Job is there"
                _explain_end(cluster, run, attempt, job)
                return
        sleep(POLL_S)


def _status_line(cluster: Cluster, run: str, attempt: int, job: Job | None, view: StoreView, now: float) -> str:
    progress, stuck = None, []
    at = datetime.fromtimestamp(now, UTC)
    if job is not None:
        try:
            progress = view.progress(job.shards, first_images(job.options), now)
        except MillError as error:
            log.warning("no progress to tell", error=str(error))
        try:
            stuck = stuck_pods(cluster.pods(selector(run, "label", attempt)), at, after_s=STUCK_AFTER_S)
        except MillError as error:
            log.warning("no pods to tell of", error=str(error))
    label = "gone" if job is None else job.state
    line = StatusLine(at=at, run=run, attempt=attempt, label=label, progress=progress, stuck=stuck)
    return msgspec.json.encode(line).decode()


def _explain_end(cluster: Cluster, run: str, attempt: int, job: Job) -> None:
    """Say first how labelling ended: what finalize says of missing records is only its consequence."""
    if job.end is None or job.end.type == "Complete":
        log.info("the label Job is complete", job=job.metadata.name)
        return
    try:
        faults = faults_of(cluster.pods(selector(run, "label", attempt)))
    except MillError:
        faults = {}
    log.error(
        "the label Job failed; finalize goes on with what it committed",
        job=job.metadata.name, reason=job.end.reason, message=job.end.message, pods_said=faults,
        shards_given_up=job.status.failed_indexes,
    )  # fmt: skip
