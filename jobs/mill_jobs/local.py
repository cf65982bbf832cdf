"""A run on one machine: one worker process a shard, pinned to GPUs, started again where a retry may help."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mill_shared.errors import ConfigError, CoverageError, ExitCode, MillError, OutsideError
from mill_shared.heartbeat import read_heartbeat
from mill_shared.keys import RunKeys
from mill_shared.plan import RunPlan, read_passes
from mill_shared.storage import LocalStore, Store

log = structlog.get_logger()

RETRIES = 6
"""Starts after the first that a shard gets; as `backoffLimitPerIndex` in the cluster."""
FINAL_CODES = frozenset({ExitCode.CONFIG, ExitCode.COVERAGE, 2})
"""Exit codes after which another start cannot help."""
POLL_S = 0.5
LOG_EVERY_S = 30


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that this machine shows, without loading torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu for gpu in given.split(",") if gpu and gpu != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def default_workers() -> int:
    """One worker a GPU, else one for two CPU cores."""
    return len(visible_gpus()) or max(1, (os.cpu_count() or 1) // 2)


@dataclass
class _Worker:
    shard: int
    process: "subprocess.Popen[str]"
    started: int = 1
    start_again_at: float | None = None
    last_error: str = ""
    readers: list[threading.Thread] = field(default_factory=list)


def run_workers(
    run_file: str, assignments: Sequence[str], store: Store, plan: RunPlan, *, workers: int, console: Console,
    extra: Sequence[str] = (),
) -> None:  # fmt: skip
    """Label a run with worker processes and show how far they are.

    Args:
        run_file: path of the run file, for the workers.
        assignments: its `path=value` changes.
        store: the run's store.
        plan: the run's plan.
        workers: number of processes, which is the number of shards.
        console: where progress is shown; a terminal gets a bar, everything else log lines.
        extra: more options of `mill label`.

    Raises:
        MillError: a worker ended for good; the error says why, all others were ended.
    """
    command = [
        sys.executable,
        "-m",
        "mill_jobs.cli",
        "label",
        run_file,
        *(f"--set={item}" for item in assignments),
        *extra,
    ]
    gpus = visible_gpus()
    on_terminal = console.is_terminal

    def start(shard: int) -> "subprocess.Popen[str]":
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[shard % len(gpus)]
        return subprocess.Popen(
            [*command, f"--shard={shard}/{workers}", "--with-parent"],
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
        )

    def read(stream: IO[str], worker: _Worker) -> None:
        for line in stream:
            try:
                entry = json.loads(line)
                bad = entry.get("level") in ("warning", "error", "critical")
            except (ValueError, AttributeError):
                entry, bad = {"event": line.rstrip()}, True
            if entry.get("level") in ("error", "critical"):
                worker.last_error = str(entry.get("event", ""))
            if not on_terminal:
                sys.stderr.write(line)
                sys.stderr.flush()
            elif bad:
                detail = " ".join(str(entry[key]) for key in ("image", "reason", "detail", "error") if entry.get(key))
                console.print(f"shard {worker.shard}: {entry.get('event', '')} {detail}".rstrip(), markup=False)

    def watch(worker: _Worker) -> None:
        assert worker.process.stderr is not None
        thread = threading.Thread(target=read, args=(worker.process.stderr, worker), daemon=True)
        thread.start()
        worker.readers.append(thread)

    with _terminate_on_signals():
        running = [_Worker(shard, start(shard)) for shard in range(workers)]
        try:
            for worker in running:
                watch(worker)
            with _shown(console, store, plan, workers) as show:
                while running:
                    for worker in list(running):
                        if worker.start_again_at is not None:
                            if time.monotonic() >= worker.start_again_at:
                                worker.process, worker.start_again_at = start(worker.shard), None
                                watch(worker)
                            continue
                        code = worker.process.poll()
                        if code is None:
                            continue
                        for thread in worker.readers:
                            thread.join(timeout=5)
                        if code == 0:
                            running.remove(worker)
                        elif code in FINAL_CODES or worker.started > RETRIES:
                            raise _worker_error(worker, code)
                        else:
                            pause_s = min(2.0 ** (worker.started - 1), 30)
                            log.warning(
                                "worker ended, starting it again", shard=worker.shard, code=code, pause_s=pause_s
                            )
                            interrupted = code in (-signal.SIGTERM, ExitCode.INTERRUPTED)
                            worker.started += 0 if interrupted else 1
                            worker.start_again_at = time.monotonic() + pause_s
                    show()
                    time.sleep(POLL_S)
        finally:
            for worker in running:
                if worker.process.poll() is None:
                    worker.process.terminate()
            for worker in running:
                worker.process.wait()


def _worker_error(worker: _Worker, code: int) -> MillError:
    text = worker.last_error or f"worker {worker.shard} ended with code {code}"
    if code in (ExitCode.CONFIG, 2):
        return ConfigError(text)
    if code == ExitCode.COVERAGE:
        return CoverageError(text)
    return OutsideError(
        f"worker {worker.shard} ended {worker.started} times, the last time with code {code}: {text}. What is "
        "committed is kept; the same command goes on. If one image ends the process, --one-by-one isolates it"
    )


@contextmanager
def _terminate_on_signals() -> "Iterator[None]":
    """Turn SIGTERM into SystemExit, so that the workers are ended too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(ExitCode.INTERRUPTED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _shown(console: Console, store: Store, plan: RunPlan, workers: int) -> "Iterator[Callable[[], None]]":
    """Yield a function that brings the shown progress up to date from the heartbeats."""
    keys, index = RunKeys(plan.run), len(read_passes(store, plan)) - 1
    every_s = POLL_S if isinstance(store, LocalStore) else 5.0
    last_read, last_logged = 0.0, time.monotonic()
    started = time.monotonic()

    def read_beats() -> tuple[int, int, int, dict[str, int]]:
        done = labelled = total = 0
        failed: dict[str, int] = {}
        for shard in range(workers):
            beat = read_heartbeat(store, keys, index, shard, workers)
            if beat is not None:
                done, labelled, total = done + beat.images_done, labelled + beat.images_labelled, total + beat.images
                for reason, count in beat.failed.items():
                    failed[reason] = failed.get(reason, 0) + count
        return done, labelled, total, failed

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[failed]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=120) as bar:
        task = bar.add_task(f"labelling {plan.run}", total=plan.images if index == 0 else None, rate="", failed="")

        def show() -> None:
            nonlocal last_read, last_logged
            now = time.monotonic()
            if now - last_read < every_s:
                return
            last_read = now
            try:
                done, labelled, total, failed = read_beats()
            except OutsideError:
                return
            rate = labelled / max(now - started, 1e-9)
            text = ", ".join(f"{count} {reason}" for reason, count in sorted(failed.items()))
            bar.update(
                task,
                completed=done,
                total=total or None,
                rate=f"{rate:.2f} images/s",
                failed=f"failed: {text}" if text else "",
            )
            if not console.is_terminal and now - last_logged >= LOG_EVERY_S:
                last_logged = now
                left_s = round((total - done) / rate) if rate > 0 else None
                log.info("progress", images=done, of=total, images_per_s=round(rate, 2), left_s=left_s, failed=failed)

        yield show
        last_read = 0.0
        show()
