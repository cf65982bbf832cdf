"""From a run file to a run: its store, its images, its plan, and the pass that labels the failed again."""

import os
import socket
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import structlog

from mill_jobs.config import RunConfig
from mill_jobs.label import LabelResult, LabelWorker, Shard
from mill_jobs.progress import active_heartbeats
from mill_jobs.recipes.choose import build_labeller
from mill_shared.errors import AlreadyExists, ConfigError, MillError
from mill_shared.heartbeat import BEATS_BEFORE_SILENT
from mill_shared.keys import RunKeys
from mill_shared.logs import last_log_lines
from mill_shared.patience import wait_out
from mill_shared.plan import (
    ImageRow,
    LabelPass,
    RunPlan,
    build_plan,
    compare_identity,
    list_coco_images,
    list_images,
    read_passes,
    read_plan,
    write_pass,
    write_plan,
)
from mill_shared.storage import Store, open_store

log = structlog.get_logger()


def open_images(config: RunConfig) -> Store:
    """Open the dataset's root.

    Raises:
        ConfigError: the folder does not exist.
    """
    root = config.dataset.images
    if not root.startswith("s3://") and not Path(root).is_dir():
        raise ConfigError(f"dataset.images: no such folder: {root}")
    return open_store(root, config.storage)


def read_dataset(config: RunConfig) -> list[ImageRow]:
    """List the dataset: names, sizes and etags, never pixels.

    Raises:
        ConfigError: no images, or two with one id.
    """
    dataset, images = config.dataset, open_images(config)
    if dataset.coco is None:
        return list_images(images, dataset.extensions, dataset.ids)
    if dataset.coco.startswith("s3://"):
        parent, _, name = dataset.coco.rpartition("/")
        return list_coco_images(open_store(parent, config.storage).get(name), dataset.coco, images)
    try:
        return list_coco_images(Path(dataset.coco).read_bytes(), dataset.coco, images)
    except OSError as error:
        raise ConfigError(f"dataset.coco: {error}") from error


def plan_run(config: RunConfig) -> tuple[Store, RunPlan]:
    """Adopt the run's plan, or make it where it is absent.

    Raises:
        PlanMismatch: the run exists with another identity.
        ConfigError: the dataset, the weights or the store are wrong.
    """
    store = open_store(config.store, config.storage)
    identity, content = config.identity(), config.recipe.content()
    if config.run is not None and store.exists(RunKeys(config.run).plan):
        plan = read_plan(store, config.run)
        compare_identity(plan, identity, content)
        return store, plan
    images = read_dataset(config)
    plan = build_plan(
        run=config.run, recipe=config.recipe.name, identity=identity, content=content,
        chunk_size=config.sharding.chunk_size, images=images,
    )  # fmt: skip
    written = write_plan(store, plan, images)
    compare_identity(written, identity, content)
    return store, written


def open_run(config: RunConfig) -> tuple[Store, RunPlan]:
    """Open a run that was planned, without the weights.

    Raises:
        ConfigError: there is no such run.
        PlanMismatch: the run file means another run.
    """
    if config.run is None:
        return plan_run(config)
    store = open_store(config.store, config.storage)
    plan = read_plan(store, config.run)
    compare_identity(plan, config.identity(), None)
    return store, plan


def label_shard(
    config: RunConfig, shard: Shard, *, one_by_one: bool = False, repair: bool = False, parent: int | None = None,
    first: int | None = None,
) -> LabelResult:  # fmt: skip
    """Label what is missing of one shard, in every pass of the run.

    Args:
        config: the run file.
        shard: which part.
        one_by_one: work image by image, and fail the image that was in hand alone when a worker died.
        repair: label damaged chunks again and overwrite them.
        parent: process id whose end also ends this process.
        first: only the chunks that hold the first so many images of a pass.
    """

    def prepare() -> tuple[Store, RunPlan, list[LabelPass]]:
        store, plan = plan_run(config)
        return store, plan, read_passes(store, plan)

    store, plan, passes = wait_out(prepare, "the store", limit_s=config.limits.outside_wait_s)
    committed = images = 0
    for label_pass in passes:
        structlog.contextvars.bind_contextvars(
            run=plan.run, shard=f"{shard.index}/{shard.count}", label_pass=label_pass.index
        )
        worker = LabelWorker(
            config, plan, label_pass, shard, store=store, images=open_images(config),
            make_labeller=lambda: build_labeller(config), one_by_one=one_by_one, repair=repair, parent=parent,
            first=first,
        )  # fmt: skip
        done = worker.run()
        committed, images = committed + done.committed, images + done.images
    return LabelResult(committed, images)


def keep_failure(config: RunConfig, shard: Shard, error: BaseException) -> None:
    """Store how this process failed, as far as the store answers: its pod and the pod's log may be gone tomorrow."""
    run = structlog.contextvars.get_contextvars().get("run") or config.run
    if run is None:
        return
    text = "\n".join([*last_log_lines(), *traceback.format_exception(error)])
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    key = RunKeys(run).failure(shard.index, shard.count, f"{when}-{socket.gethostname()}-{os.getpid()}")
    try:
        open_store(config.store, config.storage).put(key, text.encode(errors="backslashreplace"))
    except MillError as failing:
        log.warning("the end of the log is not in the store", error=str(failing))


def plan_again(config: RunConfig, reasons: Sequence[str]) -> int:
    """Make the next pass: the images whose newest record is `failed`.

    Args:
        config: the run file.
        reasons: only these reasons; empty for all.

    Returns:
        The number of images in the new pass; 0 where none is failed, and then no pass is made.

    Raises:
        ConfigError: a worker is labelling this run now, or chunks of an earlier pass are missing.
    """
    import tempfile

    from mill_jobs.finalize import gather_chunks, record_table

    store, plan = open_run(config)
    fresh_s = BEATS_BEFORE_SILENT * config.limits.heartbeat_s
    active = active_heartbeats(store, RunKeys(plan.run), now=time.time(), fresh_s=fresh_s)
    if active:
        who = ", ".join(f"shard {beat.shard}/{beat.shards} on {beat.host}" for beat in active[:5])
        raise ConfigError(f"run {plan.run} is being labelled now ({who}); wait for its end, then plan again")
    with tempfile.TemporaryDirectory(prefix="mill-again-") as scratch:
        gathered = gather_chunks(store, plan, Path(scratch))
        if gathered.missing:
            index, chunk, why = gathered.missing[0]
            raise ConfigError(
                f"run {plan.run}: {len(gathered.missing)} chunks are not labelled yet, the first is chunk {chunk} of "
                f"pass {index} ({why}); label them first"
            )
        with record_table(gathered, plan, Path(scratch)) as table:
            found = table.connection.execute(
                "select row from records where status = 'failed' and (len(?) = 0 or reason in ?) order by row",
                [list(reasons), list(reasons)],
            ).fetchall()
    rows = [row for (row,) in found]
    if rows:
        try:
            write_pass(store, plan, gathered.passes, rows, reasons)
        except AlreadyExists as error:
            raise ConfigError(f"run {plan.run}: pass {gathered.passes} was just made by somebody else") from error
    return len(rows)
