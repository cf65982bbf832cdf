"""The command `millctl`: parse, call, print. Everything heavy is imported by the command that needs it."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mill_shared.errors import ExitCode, MillError

if TYPE_CHECKING:
    from mill_jobs.config import RunConfig
    from mill_k8s.client import Cluster
    from mill_k8s.submit import Platform

F = TypeVar("F", bound=Callable[..., Any])

WATCH_S = 5.0


def cluster_options(command: F) -> F:
    """Add `--namespace` and `--context`."""
    for decorate in (
        click.option("--context", help="Context of the kubeconfig.  [default: the current one]"),
        click.option("-n", "--namespace", help="Where the chart is installed.  [default: that of the context]"),
    ):
        command = decorate(command)
    return command


set_option = click.option(
    "--set", "assignments", multiple=True, metavar="PATH=VALUE", help="Change one field of the run file."
)
run_argument = click.argument("run", required=False)
parallelism_option = click.option(
    "--parallelism", type=click.IntRange(1), help="Pods at a time.  [default: as many as shards]"
)
shards_option = click.option(
    "--shards", type=click.IntRange(1, 100_000), help="Shards; a few times the number of GPUs is plenty."
)
one_by_one_option = click.option(
    "--one-by-one", is_flag=True, help="Work image by image; isolates an image that ends the process."
)
repair_option = click.option("--repair", is_flag=True, help="Label damaged chunks again and overwrite them.")
wait_option = click.option("--wait", "wait_for_end", is_flag=True, help="Follow to the end, with the run's exit code.")
pending_option = click.option(
    "--pending-minutes", type=click.FloatRange(0, min_open=True), default=30, show_default=True,
    help="With --wait: end with code 83 when pods have been Pending for so long and none runs.",
)  # fmt: skip


def _cluster(namespace: str | None, context: str | None) -> "Cluster":
    from mill_k8s.client import Cluster

    return Cluster.connect(namespace, context)


def _newest(cluster: "Cluster", run: str | None) -> str:
    from mill_k8s.watch import newest_run

    return run if run is not None else newest_run(cluster)


def _say(text: str) -> None:
    click.echo(text)


def _note(text: str) -> None:
    click.echo(text, err=True)


def _follow(cluster: "Cluster", run: str, pending_minutes: float) -> None:
    from mill_k8s.watch import follow

    code = follow(cluster, run, _say, pending_s=60 * pending_minutes)
    sys.exit(int(code))


def _label_options(one_by_one: bool, repair: bool) -> tuple[str, ...]:
    return tuple(flag for flag, on in (("--one-by-one", one_by_one), ("--repair", repair)) if on)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="labelmill", prog_name="millctl")
def millctl() -> None:
    """Label on a Kubernetes cluster: one GPU pod a shard, and a pod that finalizes when they are done.

    The chart installs the platform once; `millctl submit` starts runs. Everything may be typed again: nothing that is
    committed is lost, and nothing is done twice. Where RUN may be left out, the youngest run is meant.

    \b
    Exit codes: 0 done, 2 usage, 75 the cluster does not answer (try again), 78 something is wrong and the message says
    what, 83 pods stay Pending; with --wait also those of the run: 80 too few or too many failed records, 81 broken
    bundle, 82 damaged data, 143 cancelled.
    """


def _run_config(platform: "Platform", path: Path | None, assignments: tuple[str, ...]) -> "RunConfig":
    from mill_jobs.config import read_config
    from mill_k8s.submit import default_config, with_run_id

    config = default_config(platform, assignments) if path is None else read_config(path, assignments)
    return with_run_id(config)


@millctl.command()
@click.argument(
    "path", metavar="[RUN.yaml]", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@set_option
@click.option(
    "--shards", type=click.IntRange(1, 100_000), required=True, help="Shards; a few times the number of GPUs is plenty."
)
@parallelism_option
@click.option("--pilot", type=click.IntRange(1), metavar="N", help="Only the first N images of the run, and a report.")
@one_by_one_option
@repair_option
@click.option("--dry-run", is_flag=True, help="Print what would be created, and create nothing.")
@click.option("-o", "--output", type=click.Choice(["yaml"]), help="With --dry-run.  [default: yaml]")
@wait_option
@pending_option
@cluster_options
def submit(
    path: Path | None,
    assignments: tuple[str, ...],
    shards: int,
    parallelism: int | None,
    pilot: int | None,
    one_by_one: bool,
    repair: bool,
    dry_run: bool,
    output: str | None,
    wait_for_end: bool,
    pending_minutes: float,
    namespace: str | None,
    context: str | None,
) -> None:
    """Start a run, or go on with it. Without RUN.yaml: the chart's default run."""
    import yaml

    from mill_k8s.manifests import make_request
    from mill_k8s.submit import decide, objects, read_attempts, read_platform, require_reachable, require_same_run
    from mill_k8s.submit import submit as submit_run

    if output is not None and not dry_run:
        raise click.UsageError("-o goes with --dry-run")
    cluster = _cluster(namespace, context)
    platform = read_platform(cluster)
    config = _run_config(platform, path, assignments)
    request = make_request(
        config, shards, parallelism=parallelism, pilot=pilot, label_options=_label_options(one_by_one, repair)
    )
    if dry_run:
        require_reachable(config, platform.config)
        attempts = read_attempts(cluster, request.run)
        require_same_run(cluster, attempts, config)
        bodies = objects(request, decide(attempts, request).attempt, platform.config)
        click.echo(yaml.safe_dump_all(bodies, sort_keys=False), nl=False)
        return
    submit_run(cluster, platform.config, config, request, _note)
    if wait_for_end:
        _follow(cluster, request.run, pending_minutes)
    else:
        _say(f"millctl status {request.run} --watch\nmillctl logs {request.run} --follow")


@millctl.command()
@run_argument
@click.option("--watch", "-w", is_flag=True, help="Again and again, until the run's end.")
@click.option("-o", "--output", type=click.Choice(["json"]), help="One JSON object.")
@cluster_options
def status(run: str | None, watch: bool, output: str | None, namespace: str | None, context: str | None) -> None:
    """Show how far a run is: images, speed, time left, shards, failures, pods that do not start, what to type next."""
    import msgspec

    from mill_k8s.client import ClusterError
    from mill_k8s.progress import status_lines
    from mill_k8s.watch import read_status

    cluster = _cluster(namespace, context)
    run = _newest(cluster, run)
    while True:
        try:
            found = read_status(cluster, run)
        except ClusterError as error:
            if not watch:
                raise
            _note(f"{error}; asking again")
        else:
            text = msgspec.json.encode(found).decode() if output else "\n".join(status_lines(found))
            if watch and not output and sys.stdout.isatty():
                click.clear()
            _say(text)
            if not watch or found.state in ("finished", "incomplete", "failed", "cancelled", "labelled"):
                return
        time.sleep(WATCH_S)


@millctl.command()
@click.option("-o", "--output", type=click.Choice(["json"]), help="One JSON list.")
@cluster_options
def runs(output: str | None, namespace: str | None, context: str | None) -> None:
    """List all runs in the namespace, the youngest first."""
    import msgspec

    from mill_k8s.watch import read_runs

    found = read_runs(_cluster(namespace, context))
    if output:
        _say(msgspec.json.encode([status for status, _ in found]).decode())
        return
    if not found:
        _note("no runs; millctl submit RUN.yaml --shards 12 starts one")
    rows = [("RUN", "ATTEMPT", "STATE", "SHARDS DONE", "SUBMITTED")]
    for one, since in found:
        shards = "-" if one.shards is None else f"{one.shards.done}/{one.shards.total}"
        rows.append((one.run, str(one.attempt), one.state, shards, f"{since:%Y-%m-%d %H:%M} UTC" if since else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@millctl.command()
@run_argument
@click.option("--shard", type=click.IntRange(0), help="Only this shard.  [default: all, each line with its shard]")
@click.option("--finalize", "of_finalize", is_flag=True, help="The pod that waits and finalizes.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the end, with pods that start later.")
@click.option("--tail", type=click.IntRange(1), help="Only the last so many lines of each pod.")
@cluster_options
def logs(
    run: str | None,
    shard: int | None,
    of_finalize: bool,
    follow: bool,
    tail: int | None,
    namespace: str | None,
    context: str | None,
) -> None:
    """Show the logs of a run's pods, any number of them at once: one JSON object a line, the shard before it."""
    from mill_k8s.watch import print_logs

    if of_finalize and shard is not None:
        raise click.UsageError("--shard names a labelling pod; leave --finalize out")
    cluster = _cluster(namespace, context)
    print_logs(
        cluster, _newest(cluster, run), _say, kind="finalize" if of_finalize else "label", shard=shard, tail=tail,
        follow=follow,
    )  # fmt: skip


@millctl.command(context_settings={"ignore_unknown_options": True})
@run_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--attempt", type=click.IntRange(1), help="In the finalize pod: whose label Job.")
@click.option(
    "--run-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="In the finalize pod: the run file.",
)
@pending_option
@cluster_options
def wait(
    run: str | None,
    command: tuple[str, ...],
    attempt: int | None,
    run_file: Path | None,
    pending_minutes: float,
    namespace: str | None,
    context: str | None,
) -> None:
    """Follow a run to its end, with its exit code.

    With `-- COMMAND...`, which is how the finalize pod starts: wait for the label Job alone, print a status line every
    30 s, then become that command.
    """
    if not command:
        cluster = _cluster(namespace, context)
        _follow(cluster, _newest(cluster, run), pending_minutes)
        return
    if run is None or attempt is None or run_file is None:
        raise click.UsageError("a command needs RUN, --attempt and --run-file before it")
    from mill_jobs.config import read_config
    from mill_k8s.waiting import StoreView, wait_for_label

    view = StoreView(read_config(run_file), run)
    wait_for_label(_cluster(namespace, context), run, attempt, view, _say)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise click.UsageError(f"{command[0]}: {error.strerror}") from error


@millctl.command()
@run_argument
@set_option
@wait_option
@pending_option
@cluster_options
def finalize(
    run: str | None,
    assignments: tuple[str, ...],
    wait_for_end: bool,
    pending_minutes: float,
    namespace: str | None,
    context: str | None,
) -> None:
    """Make another final of what is labelled, e.g. with other thresholds: no GPU, seconds to minutes."""
    from mill_k8s.submit import finalize_again, read_platform

    cluster = _cluster(namespace, context)
    run = _newest(cluster, run)
    number = finalize_again(cluster, read_platform(cluster).config, run, assignments)
    _note(f"run {run}, attempt {number}: finalizing")
    if wait_for_end:
        _follow(cluster, run, pending_minutes)
    else:
        _say(f"millctl logs {run} --finalize --follow")


@millctl.command()
@run_argument
@click.option("--failed", is_flag=True, help="Also the failed images, as the run's next pass.")
@click.option("--reason", "reasons", multiple=True, help="With --failed: only images that failed for this reason.")
@shards_option
@parallelism_option
@one_by_one_option
@repair_option
@wait_option
@pending_option
@cluster_options
def rerun(
    run: str | None,
    failed: bool,
    reasons: tuple[str, ...],
    shards: int | None,
    parallelism: int | None,
    one_by_one: bool,
    repair: bool,
    wait_for_end: bool,
    pending_minutes: float,
    namespace: str | None,
    context: str | None,
) -> None:
    """Label what is missing of a run that has ended, and with --failed the images that failed too."""
    from mill_k8s.submit import read_platform
    from mill_k8s.submit import rerun as run_again

    if reasons and not failed:
        raise click.UsageError("--reason goes with --failed")
    cluster = _cluster(namespace, context)
    run = _newest(cluster, run)
    number = run_again(
        cluster, read_platform(cluster).config, run, _note, failed=failed, reasons=reasons, shards=shards,
        parallelism=parallelism, label_options=_label_options(one_by_one, repair),
    )  # fmt: skip
    if number is None:
        return
    _note(f"run {run}, attempt {number}: submitted")
    if wait_for_end:
        _follow(cluster, run, pending_minutes)
    else:
        _say(f"millctl status {run} --watch\nmillctl logs {run} --follow")


@millctl.command()
@run_argument
@cluster_options
def cancel(run: str | None, namespace: str | None, context: str | None) -> None:
    """Stop a run. What is committed stays, and the run can go on at any time."""
    from datetime import UTC, datetime

    from mill_k8s.submit import cancel as cancel_run

    cluster = _cluster(namespace, context)
    cancel_run(cluster, _newest(cluster, run), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", _say)


@millctl.command()
@click.argument(
    "path", metavar="[RUN.yaml]", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@set_option
@click.option("--no-bucket", is_flag=True, help="Start no pod; look at what the API tells alone.")
@click.option("--pull-worker", is_flag=True, help="Also pull the worker image, which may take minutes.")
@cluster_options
def doctor(
    path: Path | None,
    assignments: tuple[str, ...],
    no_bucket: bool,
    pull_worker: bool,
    namespace: str | None,
    context: str | None,
) -> None:
    """Look for what would stop a run: cluster, rights, weights, GPUs, images and, from inside, the bucket."""
    from mill_k8s.doctor import check_bucket, check_platform, check_rights
    from mill_k8s.manifests import make_request
    from mill_k8s.submit import read_platform
    from mill_shared.errors import ConfigError

    cluster = _cluster(namespace, context)
    platform = read_platform(cluster)
    findings = [*check_platform(cluster, platform.config), *check_rights(cluster, platform.config)]
    if not no_bucket:
        request = make_request(_run_config(platform, path, assignments), 1)
        stamp = f"{int(time.time())}-{os.getpid()}"
        findings += check_bucket(cluster, platform.config, request, pull_worker=pull_worker, stamp=stamp)
    for finding in findings:
        mark = {"ok": "ok         ", "problem": "PROBLEM    ", "cannot see": "cannot see "}[finding.level]
        _say(f"{mark} {finding.text}")
    problems = sum(finding.level == "problem" for finding in findings)
    if problems:
        raise ConfigError(f"{problems} problems, listed above")
    _note("nothing that was seen stands in the way of a run")


def main() -> None:
    """Run the command line; every known error is one line and its own exit code."""
    from mill_shared.logs import configure_logs

    configure_logs()
    import structlog

    log = structlog.get_logger()
    try:
        millctl(standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except MillError as error:
        log.error(str(error), kind=type(error).__name__, exit_code=int(error.exit_code))
        sys.exit(error.exit_code)
    except Exception:
        log.exception("this is a defect of Labelmill")
        sys.exit(ExitCode.INTERNAL)


if __name__ == "__main__":
    main()
