"""The command `mill`: parse, call, print. Everything heavy is imported by the command that needs it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mill_shared.errors import ExitCode, MillError

if TYPE_CHECKING:
    from rich.console import Console

    from mill_jobs.config import RunConfig
    from mill_jobs.demo.run import DemoRecipe
    from mill_jobs.finalize import Finalized

F = TypeVar("F", bound=Callable[..., Any])


def run_file(command: F) -> F:
    """Add the run file and `--set`; the command gets `path` and `assignments`."""
    for decorate in (
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="PATH=VALUE",
            help="Change one field, e.g. recipe.finalize.masks=true.",
        ),
        click.argument("path", metavar="RUN.yaml", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    ):
        command = decorate(command)
    return command


final_option = click.option("--final", "digest", help="Which final, by its digest.  [default: the latest]")


def _config(path: Path, assignments: tuple[str, ...]) -> "RunConfig":
    from mill_jobs.config import read_config

    return read_config(path, assignments)


def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=False, highlight=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="labelmill", prog_name="mill")
def mill() -> None:
    """Turn a folder of images into a trainer-ready set of pseudo-labels.

    A run file (RUN.yaml) says which images, which models and where results go. `mill local RUN.yaml` does everything on
    this machine; the other commands are its steps.

    \b
    Exit codes: 0 done, 2 usage, 70 defect of mill, 75 something outside was unavailable (try again), 76 stalled (try
    again), 78 wrong configuration, 80 too few or too many failed records, 81 broken bundle, 82 damaged data.
    """


@mill.command()
@run_file
@click.option("--again", is_flag=True, help="Make the next pass: the images whose newest record is failed.")
@click.option("--reason", "reasons", multiple=True, help="With --again: only images that failed for this reason.")
def plan(path: Path, assignments: tuple[str, ...], again: bool, reasons: tuple[str, ...]) -> None:
    """List the images and fix what the run is. Done once; later calls adopt it."""
    from mill_jobs.run import plan_again, plan_run

    config = _config(path, assignments)
    if reasons and not again:
        raise click.UsageError("--reason goes with --again")
    if again:
        count = plan_again(config, reasons)
        click.echo(
            f"{count} failed images are planned again; label the run" if count else "no failed images; nothing to do"
        )
        return
    store, made = plan_run(config)
    chunks = -(-made.images // made.chunk_size)
    click.echo(
        f"run {made.run}: {made.images} images in {chunks} chunks, label digest {made.label_digest[:8]}, in {store.url}"
    )


@mill.command()
@run_file
@click.option("--shard", default="0/1", show_default=True, metavar="s/S", help="Which part: chunks k with k mod S = s.")
@click.option(
    "--shards", type=click.IntRange(1), help="S, where Kubernetes says which shard this is (JOB_COMPLETION_INDEX)."
)
@click.option("--one-by-one", is_flag=True, help="Work image by image; isolates an image that ends the process.")
@click.option("--repair", is_flag=True, help="Label damaged chunks again and overwrite them.")
@click.option("--first", type=click.IntRange(1), metavar="N", help="Only the chunks that hold the first N images.")
@click.option("--with-parent", is_flag=True, hidden=True, help="End when the process that started this one ends.")
def label(
    path: Path,
    assignments: tuple[str, ...],
    shard: str,
    shards: int | None,
    one_by_one: bool,
    repair: bool,
    first: int | None,
    with_parent: bool,
) -> None:
    """Label one shard of the run: whatever of it is not committed yet."""
    from mill_jobs.label import Shard
    from mill_jobs.run import keep_failure, label_shard

    if shards is not None:
        index = os.environ.get("JOB_COMPLETION_INDEX")
        if index is None:
            raise click.UsageError("--shards needs JOB_COMPLETION_INDEX in the environment; elsewhere use --shard s/S")
        shard = f"{index}/{shards}"
    try:
        part = Shard.parse(shard)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    parent = os.getppid() if with_parent else None
    config = _config(path, assignments)
    try:
        label_shard(config, part, one_by_one=one_by_one, repair=repair, parent=parent, first=first)
    except Exception as error:
        keep_failure(config, part, error)
        raise


def _report(config: "RunConfig", digest: str) -> None:
    """Make the report; the final is there whatever becomes of it."""
    import structlog

    from mill_jobs.report.page import write_report
    from mill_jobs.run import open_run

    store, made = open_run(config)
    try:
        key = write_report(config, made, store, digest)
    except MillError as error:
        structlog.get_logger().warning("no report, the final is whole; try `mill report`", error=str(error))
    else:
        click.echo(f"report: {store.url.rstrip('/')}/{key}")


report_option = click.option("--report/--no-report", "with_report", default=True, help="Make report.html too.")


@mill.command()
@run_file
@report_option
def finalize(path: Path, assignments: tuple[str, ...], with_report: bool) -> None:
    """Make a final of the run: classes, weights and a COCO file from the records. Seconds, no GPU."""
    from mill_jobs.finalize import finalize_run
    from mill_jobs.run import open_run
    from mill_jobs.tables import print_final
    from mill_shared.patience import wait_out

    config = _config(path, assignments)

    def work() -> "tuple[Finalized, str]":
        store, made = open_run(config)
        return finalize_run(config, made, store), store.url

    final, url = wait_out(work, "the store", limit_s=config.limits.outside_wait_s)
    print_final(_console(), final, url)
    if with_report:
        _report(config, final.digest)


@mill.command()
@run_file
def verify(path: Path, assignments: tuple[str, ...]) -> None:
    """Prove that every image has one record and every digest is right. Names the chunks for `label --repair`."""
    from mill_jobs.run import open_run
    from mill_jobs.verify import verify_run
    from mill_shared.errors import CorruptError

    store, made = open_run(_config(path, assignments))
    found = verify_run(store, made)
    click.echo(f"{found.recorded} of {found.images} images recorded in {found.chunks} chunks; {found.finals} finals")
    for problem in found.problems:
        click.echo(problem, err=True)
    if found.problems:
        raise CorruptError(f"run {made.run}: {len(found.problems)} problems, listed above")
    click.echo("every image once, every digest right")


@mill.command()
@run_file
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: one a GPU, else one for two cores]")
@click.option(
    "--truth", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="COCO truth to evaluate with."
)
@click.option("--again", is_flag=True, help="First plan the failed images again.")
@click.option("--one-by-one", is_flag=True, help="Work image by image; isolates an image that ends the process.")
@click.option("--repair", is_flag=True, help="Label damaged chunks again and overwrite them.")
@report_option
def local(
    path: Path,
    assignments: tuple[str, ...],
    workers: int | None,
    truth: Path | None,
    again: bool,
    one_by_one: bool,
    repair: bool,
    with_report: bool,
) -> None:
    """Do the whole run on this machine: plan, label with several processes, finalize. Goes on where it stopped."""
    from mill_jobs.finalize import finalize_run
    from mill_jobs.local import default_workers, run_workers
    from mill_jobs.run import plan_again, plan_run
    from mill_jobs.tables import print_final

    config = _config(path, assignments)
    store, made = plan_run(config)
    console = _console()
    if again:
        plan_again(config, ())
    extra = [flag for flag, on in (("--one-by-one", one_by_one), ("--repair", repair)) if on]
    run_workers(str(path), assignments, store, made, workers=workers or default_workers(), console=console, extra=extra)
    final = finalize_run(config, made, store)
    print_final(console, final, store.url)
    if truth is not None:
        _evaluate(config, truth, final.digest)
    if with_report:
        _report(config, final.digest)


@mill.command(name="try")
@run_file
@click.option(
    "--images", type=click.IntRange(1), default=20, show_default=True, help="How many, spread over the dataset."
)
@click.option(
    "--to", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path("try"), show_default=True
)
def try_(path: Path, assignments: tuple[str, ...], images: int, folder: Path) -> None:
    """Look first: label a few images here, draw them, count every step and estimate the hours for all."""
    from mill_jobs.trial import run_trial

    run_trial(_config(path, assignments), images, folder, _console())


def _evaluate(config: "RunConfig", truth: Path, digest: str | None) -> None:
    from mill_jobs.evaluate import evaluate_final
    from mill_jobs.final import latest_final
    from mill_jobs.run import open_run
    from mill_jobs.tables import print_evaluation

    store, made = open_run(config)
    found = evaluate_final(config, made, store, digest or latest_final(store, made.run), truth)
    print_evaluation(_console(), found)


@mill.command()
@run_file
@click.option("--truth", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="COCO file.")
@final_option
def evaluate(path: Path, assignments: tuple[str, ...], truth: Path, digest: str | None) -> None:
    """Score a final's labels against COCO ground truth; base classes are left out."""
    _evaluate(_config(path, assignments), truth, digest)


@mill.command()
@run_file
@click.option("--to", "file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the page here.")
@final_option
def report(path: Path, assignments: tuple[str, ...], file: Path | None, digest: str | None) -> None:
    """Make report.html of a final: numbers, and labels on their pictures, on one page that needs nothing else."""
    from mill_jobs.final import latest_final
    from mill_jobs.report.page import write_report
    from mill_jobs.run import open_run

    config = _config(path, assignments)
    store, made = open_run(config)
    key = write_report(config, made, store, digest or latest_final(store, made.run))
    if file is not None:
        store.get_file(key, file)
    click.echo(f"{store.url.rstrip('/')}/{key}" if file is None else str(file))


@mill.command()
@run_file
@click.option(
    "--to", "folder", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where the files go."
)
@click.option("--file", "names", multiple=True, help="Only this file; may be given again.  [default: all]")
@final_option
def fetch(path: Path, assignments: tuple[str, ...], folder: Path, names: tuple[str, ...], digest: str | None) -> None:
    """Bring a final to this disk, every file checked against its digest."""
    from mill_jobs.final import fetch_final, latest_final
    from mill_jobs.run import open_run

    store, made = open_run(_config(path, assignments))
    for written in fetch_final(store, made.run, digest or latest_final(store, made.run), folder, names):
        click.echo(str(written))


@mill.command(name="check-bundle")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def check_bundle_(folder: Path) -> None:
    """Test every rule that a trainer depends on, on the files that `mill fetch` brought."""
    from mill_jobs.trainer.check import check_bundle
    from mill_shared.errors import InvariantError

    checked = check_bundle(folder)
    for line in checked.warnings:
        click.echo(f"warning: {line}", err=True)
    for line in checked.faults:
        click.echo(line, err=True)
    if checked.faults:
        raise InvariantError(f"{folder}: {len(checked.faults)} faults, listed above; do not train on it")
    click.echo(f"{folder}: {checked.annotations} annotations of {checked.classes} classes, every rule holds")


@mill.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("configs", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kind", type=click.Choice(["mmdet", "baron"]), help="The trainer.  [default: what the final names]")
@click.option(
    "--metainfo",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="mmdetection's datasets/coco.py: put the class names there, not into the configs.",
)
@click.option("--check", is_flag=True, help="Write nothing; end with 1 if a file would change.")
def patch(bundle: Path, configs: tuple[Path, ...], kind: str | None, metainfo: Path | None, check: bool) -> None:
    """Patch a trainer's CONFIGS in place from a fetched bundle: all of them or none, and only the named values.

    Give the config and those of its inherited files that set some of the values. `overlay.py` of the bundle does the
    same and leaves them alone.
    """
    from mill_jobs.trainer.patch import bundle_targets, plan_patch, replace_file

    changed = plan_patch(bundle, configs, bundle_targets(bundle, kind), metainfo)
    for path, data in changed.items():
        if not check:
            replace_file(path, data)
        click.echo(f"{path}: {'would change' if check else 'patched'}")
    if not changed:
        click.echo("nothing to change")
    elif check:
        raise click.exceptions.Exit(1)


@mill.command()
@click.argument("layout", type=click.Choice(["yolo", "coco"]))
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="Folder (yolo) or file (coco).")
@click.option("--images", help="Folder or s3:// prefix of the pictures; for yolo.")
@click.option("--pseudo-only", is_flag=True, help="Leave the base annotations out; coco always does.")
def export(layout: str, bundle: Path, target: Path, images: str | None, pseudo_only: bool) -> None:
    """Write a fetched bundle in another layout: a YOLO dataset, or COCO with the pseudo-labels alone."""
    from mill_jobs.export import export_coco, export_yolo

    if layout == "coco":
        done = export_coco(bundle, target)
    elif images is None:
        raise click.UsageError("yolo needs --images: its text files lie beside the pictures' folder")
    else:
        done = export_yolo(bundle, target, images, pseudo_only=pseudo_only)
    click.echo(f"{target}: {done.labels} labels on {done.images} images, {done.left_out} left out")


@mill.command()
@run_file
@click.argument("a")
@click.argument("b", default="latest")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, every box included.")
def diff(path: Path, assignments: tuple[str, ...], a: str, b: str, as_json: bool) -> None:
    """Show what final B has that final A has not, per class and box by box. `latest` names the newest final."""
    import tempfile

    import msgspec

    from mill_jobs.diff import diff_finals
    from mill_jobs.final import fetch_final, latest_final
    from mill_jobs.run import open_run
    from mill_jobs.tables import print_diff

    store, made = open_run(_config(path, assignments))
    with tempfile.TemporaryDirectory(prefix="mill-diff-") as scratch:
        folders = []
        for side, name in (("a", a), ("b", b)):
            folders.append(Path(scratch) / side)
            digest = latest_final(store, made.run) if name == "latest" else name
            fetch_final(store, made.run, digest, folders[-1], ("regions.parquet", "classes.json"))
        found = diff_finals(*folders)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        print_diff(_console(), found)


@mill.command()
@click.argument("coco", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--base-classes", required=True, help="Names, separated by commas, or ov-coco-48.")
@click.option(
    "--base", "base_path", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Base file to write."
)
@click.option(
    "--novel", "novel_path", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Novel file to write."
)
def split(coco: Path, base_classes: str, base_path: Path, novel_path: Path) -> None:
    """Split a COCO file into one with the base annotations and one with the rest; images and categories stay."""
    from mill_shared.coco import split_coco
    from mill_shared.presets import base_class_names

    preset = base_classes == "ov-coco-48"
    names = base_class_names("ov-coco-48" if preset else tuple(name.strip() for name in base_classes.split(",")))
    counts = split_coco(coco, names, base_path, novel_path)
    click.echo(f"{base_path}: {counts.base} annotations; {novel_path}: {counts.novel} annotations")


@mill.command(name="import")
@click.argument("layout", type=click.Choice(["cotpl", "vlplm"]))
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@run_file
@click.option("--skip-broken", is_flag=True, help="Leave out files that cannot be read, and say which.")
def import_(layout: str, folder: Path, path: Path, assignments: tuple[str, ...], skip_broken: bool) -> None:
    """Take what the original scripts made as the labels of a run: shard JSONs of CoT-PL, CLIP_scores_*.json of VL-PLM.

    The run file has no recipe.label.
    """
    from mill_jobs.importing import import_labels

    config = _config(path, assignments)
    if config.recipe.name != layout:
        raise click.UsageError(f"files of {layout}, but recipe.name is {config.recipe.name}; correct one of them")
    images, missing = import_labels(config, folder, skip_broken=skip_broken)
    click.echo(f"{images} images imported, {missing} of the dataset are not in {folder}; finalize the run")


@mill.command()
@click.argument("target", metavar="URL|RUN.yaml")
@click.option("--endpoint", help="With a URL: the S3-compatible server.  [default: AWS]")
@click.option("--path-style", is_flag=True, help="With a URL: address the bucket as a path.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a check.")
def probe(target: str, endpoint: str | None, path_style: bool, as_json: bool) -> None:
    """Prove what a run needs of its bucket: create-once, a plain answer for an absent key, the same time of day.

    Leaves two small objects under `.labelmill-probe/`.
    """
    import json
    from dataclasses import asdict

    from mill_jobs.bucket import probe_run, probe_url
    from mill_shared.config import StorageConfig
    from mill_shared.errors import ConfigError

    if target.endswith((".yaml", ".yml")):
        if endpoint is not None or path_style:
            raise click.UsageError("--endpoint and --path-style go with a URL; a run file has its own `storage`")
        checks = probe_run(_config(Path(target), ()))
    else:
        checks = probe_url(target, StorageConfig(endpoint=endpoint, path_style=path_style))
    for check in checks:
        click.echo(json.dumps(asdict(check)) if as_json else f"{'ok' if check.ok else 'PROBLEM'}  {check.text}")
    bad = sum(not check.ok for check in checks)
    if bad:
        raise ConfigError(f"{target}: {bad} of {len(checks)} checks found a problem, listed above")


@mill.command()
@click.argument("spec", metavar="SPEC.yaml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--to", "folder", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to fill.")
def prefetch(spec: Path, folder: Path) -> None:
    """Fill a folder with the weights that SPEC.yaml names, check every digest, and write the marker READY last.

    HF_ENDPOINT and HF_TOKEN say where hub:// is and who asks.
    """
    from mill_jobs.prefetch import HUB, READY, Hub, read_spec
    from mill_jobs.prefetch import prefetch as fetch

    hub = Hub(os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), os.environ.get("HF_TOKEN"))
    done = fetch(read_spec(spec), folder, hub)
    click.echo(f"{folder}: {'complete' if done else 'was complete'}, {READY} is written")


@mill.command()
@click.option(
    "--to", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-run"), show_default=True
)
@click.option("--images", type=click.IntRange(4), default=100, show_default=True, help="Scenes to label.")
@click.option(
    "--seed", type=click.IntRange(1), default=1, show_default=True, help="Of the scenes; 0 is what the models learned."
)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--recipe",
    type=click.Choice(["cotpl", "vlplm"]),
    default="cotpl",
    show_default=True,
    help="vlplm shows both of its profiles beside CoT-PL.",
)
def demo(folder: Path, images: int, seed: int, workers: int, recipe: "DemoRecipe") -> None:
    """Label toy scenes with the tiny models that come with Labelmill: real pixels, real models, no downloads."""
    from mill_jobs.demo.run import run_demo

    run_demo(folder, images, seed, workers, _console(), recipe)


def main() -> None:
    """Run the command line; every known error is one line and its own exit code."""
    from mill_shared.logs import configure_logs

    configure_logs()
    import structlog

    log = structlog.get_logger()
    try:
        mill(standalone_mode=False)
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
