"""Starting, continuing and stopping runs. What decides between two who come at once is that names are create-once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mill_jobs.config import RunConfig, parse_config
from mill_k8s.client import Cluster
from mill_k8s.doctor import check_platform, run_task
from mill_k8s.manifests import (
    CANCELLED_NOTE,
    RUN_FILE,
    Object,
    Request,
    config_map,
    finalize_job,
    finalize_name,
    label_job,
    label_name,
    make_request,
    owner,
    selector,
    task_job,
)
from mill_k8s.platform import PLATFORM, PLATFORM_KEY, RUN_KEY, PlatformConfig, parse_platform
from mill_k8s.progress import Attempt, Job, attempts_of, duration
from mill_shared.errors import ConfigError
from mill_shared.plan import digest_of

WEIGHTS_TIMEOUT_S = 4 * 3600
WEIGHTS_POLL_S = 10.0

Say = Callable[[str], object]


@dataclass(frozen=True)
class Platform:
    """What the chart wrote down."""

    config: PlatformConfig
    default_run: str | None
    """Text of the default run file."""


@dataclass(frozen=True)
class Decision:
    """What submit does about an attempt."""

    attempt: int
    create: bool
    """False: it runs or is done already, and at most missing objects are added."""
    message: str
    parallelism: int | None = None
    """Change a live label Job to this."""


def read_platform(cluster: Cluster) -> Platform:
    """Read the chart's ConfigMap.

    Raises:
        ConfigError: the chart is not installed in this namespace, or what it wrote is wrong.
    """
    found = cluster.config_map(PLATFORM)
    if found is None or PLATFORM_KEY not in found.data:
        raise ConfigError(
            f"namespace {cluster.namespace} has no ConfigMap {PLATFORM}; install the chart there "
            f"(helm -n {cluster.namespace} install labelmill helm/labelmill -f values.yaml), or name another "
            "--namespace"
        )
    return Platform(parse_platform(found.data[PLATFORM_KEY]), found.data.get(RUN_KEY) or None)


def default_config(platform: Platform, assignments: tuple[str, ...] = ()) -> RunConfig:
    """Return the chart's default run.

    Raises:
        ConfigError: it has none, or a wrong one.
    """
    if platform.default_run is None:
        raise ConfigError(
            "the chart has no default run (values.yaml: run); name a run file: millctl submit RUN.yaml ..."
        )
    return parse_config(platform.default_run, f"ConfigMap {PLATFORM}, {RUN_KEY}", assignments)


def with_run_id(config: RunConfig) -> RunConfig:
    """Give a run without an id one that follows from what would be labelled: recipe, settings and place of the images.

    `mill` alone takes the digest of the images for that; it can list them, millctl cannot.
    """
    if config.run is not None:
        return config
    digest = digest_of({"identity": config.identity(), "images": config.dataset.images, "coco": config.dataset.coco})
    return config.model_copy(update={"run": f"{config.recipe.name}-{digest[:8]}"})


def require_reachable(config: RunConfig, platform: PlatformConfig) -> None:
    """Check that what a run file names can be there in a pod.

    Raises:
        ConfigError: a path of this machine, where pods need the bucket.
    """
    mounted = tuple(str(mount.get("mountPath")) for mount in platform.volume_mounts)
    if platform.models is not None:
        mounted += (platform.models.mount_path,)
    for name, url in (("store", config.store), ("finalize.base", config.finalize.base)):
        if url is not None and not url.startswith("s3://"):
            raise ConfigError(f"{name}: {url} is a path, and pods share none; use s3://bucket/prefix")
    for name, url in (("dataset.images", config.dataset.images), ("dataset.coco", config.dataset.coco)):
        if url is not None and not url.startswith(("s3://", *mounted)):
            raise ConfigError(f"{name}: no pod has {url}; use s3://bucket/prefix, or mount it (platform.volume_mounts)")


def decide(attempts: Sequence[Attempt], request: Request) -> Decision:
    """Return what a submit of this request does, given what is there.

    Raises:
        ConfigError: an attempt is at work that is not the same.
    """
    if not attempts:
        return Decision(1, True, "first attempt")
    newest = attempts[-1]
    job, number = newest.newest, newest.number
    differing = _differing(job, request)
    if newest.is_live:
        if not differing:
            live = newest.label is not None and newest.label.is_live
            wanted = min(request.parallelism or 0, request.shards) or None
            if live and newest.label is not None and wanted not in (None, newest.label.spec.parallelism):
                return Decision(
                    number, False, f"parallelism {newest.label.spec.parallelism} -> {wanted}", parallelism=wanted
                )
            return Decision(number, False, "at work already; nothing to do")
        raise ConfigError(
            f"run {request.run}: attempt {number} is at work with {'; '.join(differing)}. Wait for its end (millctl "
            f"wait {request.run}), or millctl cancel {request.run} first; nothing that is committed is lost"
        )
    done = newest.label is not None and newest.label.state == "complete"
    if not differing and done and newest.finalize is not None and newest.finalize.state == "complete":
        return Decision(
            number, False,
            f"finished already; nothing to do. Other thresholds: millctl finalize {request.run} --set ...; failed "
            f"images again: millctl rerun {request.run} --failed; label what is missing: millctl rerun {request.run}",
        )  # fmt: skip
    return Decision(number + 1, True, f"attempt {number} is {job.state}; committed chunks stay")


def _differing(job: Job, request: Request) -> list[str]:
    """Return how a Job differs from a request, in words; empty where it is the same."""
    found = []
    if job.shards != request.shards:
        found.append(f"{job.shards} shards, not {request.shards}")
    if job.config_map != request.config_map:
        found.append(f"another run file (ConfigMap {job.config_map}, now {request.config_map})")
    if job.options != " ".join(request.label_options):
        found.append(f"label options {job.options or 'none'!r}, not {' '.join(request.label_options) or 'none'!r}")
    return found


def require_same_run(cluster: Cluster, attempts: Sequence[Attempt], config: RunConfig) -> None:
    """Check that a run file means the run that has this id here.

    What the store says is final (workers refuse another plan); this is the same answer before a GPU is rented.

    Raises:
        ConfigError: names the fields that differ, with both values.
    """
    for attempt in reversed(attempts):
        name = attempt.newest.config_map
        found = cluster.config_map(name)
        if found is None or RUN_KEY not in found.data:
            continue
        try:
            before = parse_config(found.data[RUN_KEY], f"ConfigMap {name}").identity()
        except ConfigError:
            return  # written by another version; the plan in the store decides
        now = config.identity()
        differing = [
            f"{field}: {before.get(field)!r} before, {now.get(field)!r} now"
            for field in sorted(before.keys() | now.keys())
            if before.get(field) != now.get(field)
        ]
        if differing:
            raise ConfigError(
                f"run {config.run} exists with another identity: {'; '.join(differing)}. Restore these, or choose "
                "another run id (--set run=NAME)"
            )
        return


def read_attempts(cluster: Cluster, run: str) -> list[Attempt]:
    """Return a run's attempts, oldest first."""
    return attempts_of(cluster.jobs(selector(run)))


def require_platform(cluster: Cluster, platform: PlatformConfig, say: Say, *, sleep: Callable[[float], None]) -> None:
    """Check what can be known before a GPU is rented; wait for weights that are still coming.

    Raises:
        ConfigError: names every problem and what to do.
    """
    if platform.models is not None and platform.models.prefetch_job is not None:
        _await_weights(cluster, platform.models.prefetch_job, say, sleep)
    findings = check_platform(cluster, platform)
    for finding in findings:
        if finding.level == "cannot see":
            say(f"cannot see: {finding.text}")
    problems = [finding.text for finding in findings if finding.level == "problem"]
    if problems:
        raise ConfigError("; ".join(problems))


def _await_weights(cluster: Cluster, name: str, say: Say, sleep: Callable[[float], None]) -> None:
    for turn in range(int(WEIGHTS_TIMEOUT_S / WEIGHTS_POLL_S)):
        job = cluster.job(name)
        if job is None or not job.is_live:
            return
        if turn % 6 == 0:
            waited = duration(turn * WEIGHTS_POLL_S)
            say(
                f"waiting for the weights ({waited}); kubectl -n {cluster.namespace} logs -f job/{name} shows them come"
            )
        sleep(WEIGHTS_POLL_S)
    raise ConfigError(f"the weights did not come within {duration(WEIGHTS_TIMEOUT_S)}; see kubectl logs job/{name}")


def objects(request: Request, attempt: int, platform: PlatformConfig) -> list[Object]:
    """Return the three objects of an attempt in the order of their creation."""
    return [config_map(request), label_job(request, attempt, platform), finalize_job(request, attempt, platform)]


def create_attempt(cluster: Cluster, request: Request, bodies: Sequence[Object]) -> None:
    """Create an attempt's objects; those that are there and the same are left alone.

    Raises:
        ConfigError: the cluster refuses one, or another submit of something else came first.
    """
    run_map, *jobs = bodies
    for body in jobs:
        cluster.create(body, dry_run=True)
    made_map = cluster.create(run_map)
    if not made_map:
        found = cluster.config_map(request.config_map)
        if found is not None and dict(found.data) != run_map["data"]:
            raise ConfigError(f"ConfigMap {request.config_map} exists with another content; delete it and submit again")
    owners: list[Object] = []
    for body in jobs:
        name = body["metadata"]["name"]
        made = cluster.create(body)
        job = cluster.job(name)
        if job is None:
            raise ConfigError(f"Job {name} was deleted while it was created; submit again")
        differing = [] if made else _differing(job, request)
        if differing:
            if made_map and not owners:
                cluster.delete_config_map(request.config_map)
            raise ConfigError(
                f"Job {name} was just submitted by somebody else with {'; '.join(differing)}; see millctl status "
                f"{request.run}"
            )
        owners.append(owner({"name": name, "uid": job.metadata.uid}))
    cluster.add_owners(request.config_map, owners)


def submit(
    cluster: Cluster, platform: PlatformConfig, config: RunConfig, request: Request, say: Say, *,
    sleep: Callable[[float], None] = time.sleep,
) -> int:  # fmt: skip
    """Start a run, or go on with it. The same again changes nothing.

    Returns:
        The number of the attempt.

    Raises:
        ConfigError: something is wrong or missing, or another attempt is at work.
    """
    require_reachable(config, platform)
    attempts = read_attempts(cluster, request.run)
    require_same_run(cluster, attempts, config)
    decision = decide(attempts, request)
    if decision.create:
        require_platform(cluster, platform, say, sleep=sleep)
        create_attempt(cluster, request, objects(request, decision.attempt, platform))
    elif attempts[-1].is_live:
        if decision.parallelism is not None:
            changes = {"spec": {"parallelism": decision.parallelism}}
            cluster.patch_job(label_name(request.run, decision.attempt), changes)
        if attempts[-1].finalize is None:  # a submit died half way
            create_attempt(cluster, request, objects(request, decision.attempt, platform))
    say(f"run {request.run}, attempt {decision.attempt}: {decision.message}")
    return decision.attempt


def newest_attempt(cluster: Cluster, run: str) -> Attempt:
    """Return a run's newest attempt.

    Raises:
        ConfigError: there is none in this namespace.
    """
    attempts = read_attempts(cluster, run)
    if not attempts:
        raise ConfigError(f"no run {run} in namespace {cluster.namespace}; millctl runs lists all")
    return attempts[-1]


def stored_config(cluster: Cluster, attempt: Attempt, assignments: tuple[str, ...] = ()) -> RunConfig:
    """Return the run file of an attempt, with one-off changes.

    Raises:
        ConfigError: it is gone, or the changes are wrong.
    """
    name = attempt.newest.config_map
    found = cluster.config_map(name)
    if found is None or RUN_KEY not in found.data:
        raise ConfigError(f"ConfigMap {name} with the run file is gone; millctl submit RUN.yaml --shards N goes on")
    return parse_config(found.data[RUN_KEY], f"ConfigMap {name}", assignments)


def _require_idle(attempt: Attempt, run: str) -> None:
    if attempt.is_live:
        raise ConfigError(
            f"run {run}: attempt {attempt.number} is at work; wait for its end (millctl wait {run}), or "
            f"millctl cancel {run}"
        )


def rerun(
    cluster: Cluster, platform: PlatformConfig, run: str, say: Say, *, failed: bool, reasons: Sequence[str] = (),
    shards: int | None = None, parallelism: int | None = None, label_options: Sequence[str] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> int | None:  # fmt: skip
    """Label again: what is missing, and with `failed` the images that failed too, as the run's next pass.

    Returns:
        The number of the attempt; None where no image failed.

    Raises:
        ConfigError: the run is at work, or its next pass cannot be planned.
    """
    attempt = newest_attempt(cluster, run)
    _require_idle(attempt, run)
    config = stored_config(cluster, attempt)
    request = make_request(
        config, shards or attempt.newest.shards, parallelism=parallelism, label_options=label_options
    )
    require_platform(cluster, platform, say, sleep=sleep)
    if failed:
        arguments = ["plan", RUN_FILE, "--again", *(f"--reason={reason}" for reason in reasons)]
        name = f"{run}-again-{attempt.number + 1}"
        cluster.create(config_map(request))
        log, fault = run_task(cluster, task_job(name, request, arguments, platform), sleep=sleep)
        cluster.delete_job(name)
        if fault:
            raise ConfigError(f"run {run}: the failed images could not be planned again: {fault}")
        for line in log:
            if not line.startswith("{"):
                say(line)
        if any(line.startswith("no failed images") for line in log):
            return None
    create_attempt(cluster, request, objects(request, attempt.number + 1, platform))
    return attempt.number + 1


def finalize_again(cluster: Cluster, platform: PlatformConfig, run: str, assignments: tuple[str, ...]) -> int:
    """Make another final of what is labelled, without a label Job.

    Returns:
        The number of the attempt.

    Raises:
        ConfigError: the run is at work, or the changes would make another run.
    """
    attempt = newest_attempt(cluster, run)
    _require_idle(attempt, run)
    config = stored_config(cluster, attempt, assignments)
    if config.run != run:
        raise ConfigError(f"--set run={config.run}: a final belongs to its run, {run}")
    require_same_run(cluster, [attempt], config)
    require_reachable(config, platform)
    request = make_request(config, attempt.newest.shards)
    number = attempt.number + 1
    create_attempt(cluster, request, [config_map(request), finalize_job(request, number, platform)])
    return number


def cancel(cluster: Cluster, run: str, when: str, say: Say) -> None:
    """Stop a run's newest attempt. Its Jobs stay as a record; what is committed stays in the store.

    A deadline in the past ends a Job for good, whoever else (a queue) would resume it; one that is suspended has no
    clock, so it is deleted.
    """
    attempt = newest_attempt(cluster, run)
    if not attempt.is_live:
        say(f"run {run}, attempt {attempt.number}: not at work; nothing to cancel")
        return
    changes = {"metadata": {"annotations": {CANCELLED_NOTE: when}}, "spec": {"activeDeadlineSeconds": 1}}
    # Finalize first: it would take the end of the label Job for its cue.
    named = ((attempt.finalize, finalize_name), (attempt.label, label_name))
    for job, name_of in named:
        if job is None or not job.is_live:
            continue
        name = name_of(run, attempt.number)
        if job.spec.suspend:
            cluster.delete_job(name)
            say(f"Job {name} deleted")
        elif cluster.patch_job(name, changes):
            say(f"Job {name} stopped")
    say(f"nothing that is committed is lost; millctl submit RUN.yaml --shards N goes on, and millctl rerun {run} too")
