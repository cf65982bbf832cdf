"""The demo: toy scenes, the shipped tiny models, and the same commands that real runs use."""

import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mill_jobs.config import read_config
from mill_jobs.demo.scenes import BASE_CLASSES, write_scenes
from mill_jobs.evaluate import evaluate_final
from mill_jobs.finalize import finalize_run
from mill_jobs.gallery import draw_final
from mill_jobs.local import run_workers
from mill_jobs.report.page import write_report
from mill_jobs.run import plan_run
from mill_jobs.tables import print_evaluation, print_final

if TYPE_CHECKING:
    from rich.console import Console

MODELS = Path(str(files("mill_jobs.demo"))) / "models"


def demo_config(folder: Path, scenes: Path, run: str) -> dict[str, object]:
    """Return the demo's run file: everything as in a real one, with the thresholds that the tiny models need."""
    return {
        "run": run,
        "store": str(folder / "store"),
        "dataset": {"images": str(scenes / "images"), "coco": str(scenes / "base.json")},
        "sharding": {"chunk_size": 8},
        "recipe": {
            "name": "cotpl",
            "label": {
                "masks": {
                    "kind": "sam", "checkpoint": str(MODELS / "sam.pth"), "architecture": "custom", "threads": 1,
                },
                "mask_generator": {"points_per_side": 10, "crop_layers": 0},
                "chat": {
                    "kind": "transformers", "model": str(MODELS / "chat"), "precision": "float32", "threads": 1,
                    "max_new_tokens": 8,
                },
            },
        },
        "finalize": {"base": str(scenes / "base.json"), "base_classes": list(BASE_CLASSES)},
    }  # fmt: skip


def run_demo(folder: Path, images: int, seed: int, workers: int, console: "Console") -> None:
    """Make scenes, label them, finalize, evaluate and draw the labels beside the truth."""
    started = time.monotonic()
    name = f"seed-{seed}-images-{images}"
    scenes = folder / f"scenes-{name}"
    if not (scenes / "truth.json").exists():
        write_scenes(scenes, seed, images)
    run_file = folder / f"{name}.yaml"
    run_file.write_text(yaml.safe_dump(demo_config(folder, scenes, f"demo-{name}"), sort_keys=False), encoding="utf-8")
    config = read_config(run_file)
    console.print(f"{images} scenes in {scenes}, run file {run_file}")
    store, plan = plan_run(config)
    run_workers(str(run_file), (), store, plan, workers=workers, console=console)
    final = finalize_run(config, plan, store)
    print_final(console, final, store.url)
    print_evaluation(console, evaluate_final(config, plan, store, final.digest, scenes / "truth.json"))
    pictures = draw_final(config, plan, store, final.digest, scenes / "truth.json", folder / f"pictures-{name}")
    console.print(f"pictures: {pictures}")
    report = write_report(config, plan, store, final.digest)
    console.print(f"report: {folder / 'store' / report}")
    console.print(f"{time.monotonic() - started:.0f} s in all; `mill verify {run_file}` proves it")
