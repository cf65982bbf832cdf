"""The demo: toy scenes, the shipped tiny models, and the same commands that real runs use."""

import tempfile
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import yaml

from mill_jobs.config import RunConfig, read_config
from mill_jobs.demo.scenes import BASE_CLASSES, EXTRA_CLASSES, NOVEL_CLASSES, write_scenes
from mill_jobs.evaluate import Scores, evaluate_final, evaluate_labels, read_labels, read_truth, same_name
from mill_jobs.final import fetch_final
from mill_jobs.finalize import finalize_run
from mill_jobs.gallery import draw_final
from mill_jobs.local import run_workers
from mill_jobs.report.page import write_report
from mill_jobs.run import plan_run
from mill_jobs.tables import print_comparison, print_evaluation, print_final

if TYPE_CHECKING:
    from rich.console import Console

    from mill_shared.plan import RunPlan
    from mill_shared.storage import Store

MODELS = Path(str(files("mill_jobs.demo"))) / "models"
DemoRecipe = Literal["cotpl", "vlplm"]
MARVELOVD = ("recipe.finalize.profile=marvelovd",)
"""What makes the other profile's final of a run of `vlplm`."""


def demo_config(folder: Path, scenes: Path, run: str, recipe: DemoRecipe = "cotpl") -> dict[str, object]:
    """Return the demo's run file: everything as in a real one, with the thresholds that the tiny models need."""
    return {
        "run": run,
        "store": str(folder / "store"),
        "dataset": {"images": str(scenes / "images"), "coco": str(scenes / "base.json")},
        "sharding": {"chunk_size": 8},
        "recipe": _cotpl() if recipe == "cotpl" else _vlplm(),
        "finalize": {"base": str(scenes / "base.json"), "base_classes": list(BASE_CLASSES)},
    }


def _cotpl() -> dict[str, object]:
    return {
        "name": "cotpl",
        "label": {
            "masks": {"kind": "sam", "checkpoint": str(MODELS / "sam.pth"), "architecture": "custom", "threads": 1},
            "mask_generator": {"points_per_side": 10, "crop_layers": 0},
            "chat": {
                "kind": "transformers", "model": str(MODELS / "chat"), "precision": "float32", "threads": 1,
                "max_new_tokens": 8,
            },
        },
    }  # fmt: skip


def _vlplm() -> dict[str, object]:
    """Return the recipe with the sizes of the tiny models.

    The original's 100 proposals of a picture are mostly empty, and without a name for that it gives each a novel one.
    """
    return {
        "name": "vlplm",
        "targets": list(NOVEL_CLASSES),
        "label": {
            "proposals": {
                "checkpoint": str(MODELS / "rpn.pth"), "threads": 1, "short_side_px": 224, "long_side_px": 224,
                "kept": 30, "keep_before_refining": True,
            },
            "clip": {"model": str(MODELS / "clip"), "precision": "float32", "threads": 1},
            "distractors": [*BASE_CLASSES, *EXTRA_CLASSES, "background"],
        },
    }  # fmt: skip


def run_demo(
    folder: Path, images: int, seed: int, workers: int, console: "Console", recipe: DemoRecipe = "cotpl"
) -> None:
    """Make scenes, label them, finalize, evaluate and draw the labels beside the truth.

    With `vlplm` both of its profiles are finals of one run, and CoT-PL labels the same scenes to be compared with.
    """
    started = time.monotonic()
    name = f"seed-{seed}-images-{images}"
    scenes = folder / f"scenes-{name}"
    truth = scenes / "truth.json"
    if not truth.exists():
        write_scenes(scenes, seed, images)
    run_file = _write_run_file(folder, scenes, name, recipe)
    console.print(f"{images} scenes in {scenes}, run file {run_file}")
    compared: dict[str, Scores] = {}
    if recipe == "vlplm":
        config, store, plan = _label(_write_run_file(folder, scenes, name, "cotpl"), workers, console)
        cotpl = finalize_run(config, plan, store)
        compared["CoT-PL"] = evaluate_final(config, plan, store, cotpl.digest, truth).subsets["all"]
    config, store, plan = _label(run_file, workers, console)
    if recipe == "vlplm":
        # The other profile first, so that the run's latest final is the one that its file describes.
        other = read_config(run_file, MARVELOVD)
        marvelovd = finalize_run(other, plan, store).digest
        compared["MarvelOVD"] = evaluate_final(other, plan, store, marvelovd, truth).subsets["all"]
        compared["random names on its boxes"] = name_at_random(store, plan.run, marvelovd, truth)
    final = finalize_run(config, plan, store)
    print_final(console, final, store.url)
    evaluation = evaluate_final(config, plan, store, final.digest, truth)
    print_evaluation(console, evaluation)
    if recipe == "vlplm":
        compared["VL-PLM"] = evaluation.subsets["all"]
        compared["random names on VL-PLM's boxes"] = name_at_random(store, plan.run, final.digest, truth)
        print_comparison(console, f"novel shapes on {evaluation.images} images, IoU 0.5 but for AP", compared)
    pictures = draw_final(config, plan, store, final.digest, truth, folder / f"pictures-{run_file.stem}")
    console.print(f"pictures: {pictures}")
    report = write_report(config, plan, store, final.digest)
    console.print(f"report: {folder / 'store' / report}")
    console.print(f"{time.monotonic() - started:.0f} s in all; `mill verify {run_file}` proves it")


def name_at_random(store: "Store", run: str, digest: str, truth_path: Path) -> Scores:
    """Return the scores of a final's boxes if each had the name of a novel shape drawn by lot, the same at each call.

    Raises:
        ConfigError: no such final, or the truth is no COCO file.
    """
    with tempfile.TemporaryDirectory(prefix="mill-demo-") as scratch:
        fetch_final(store, run, digest, Path(scratch), ("regions.parquet",))
        labels, _ = read_labels(Path(scratch) / "regions.parquet")
    drawn = np.random.default_rng(0).choice(NOVEL_CLASSES, len(labels)).astype(np.object_)
    truth = read_truth(truth_path)
    base = {same_name(name) for name in BASE_CLASSES}
    subsets, _, _ = evaluate_labels(replace(labels, name=drawn), truth.boxes, base, truth.names, 0)
    return subsets["all"]


def _write_run_file(folder: Path, scenes: Path, name: str, recipe: DemoRecipe) -> Path:
    stem = name if recipe == "cotpl" else f"{recipe}-{name}"
    path = folder / f"{stem}.yaml"
    path.write_text(yaml.safe_dump(demo_config(folder, scenes, f"demo-{stem}", recipe), sort_keys=False), "utf-8")
    return path


def _label(run_file: Path, workers: int, console: "Console") -> "tuple[RunConfig, Store, RunPlan]":
    config = read_config(run_file)
    store, plan = plan_run(config)
    run_workers(str(run_file), (), store, plan, workers=workers, console=console)
    return config, store, plan
