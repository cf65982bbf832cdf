"""`mill try`: a few images through the whole pipeline in this process, before anything is rented."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mill_jobs.config import RunConfig
from mill_jobs.finalize import finalize_run
from mill_jobs.gallery import draw_final
from mill_jobs.label import LabelWorker, Shard
from mill_jobs.recipes.choose import build_labeller
from mill_jobs.run import open_images, read_dataset
from mill_jobs.tables import print_final
from mill_shared.plan import LabelPass, build_plan, write_plan
from mill_shared.storage import LocalStore

if TYPE_CHECKING:
    from rich.console import Console


def run_trial(config: RunConfig, count: int, folder: Path, console: "Console") -> None:
    """Label images spread over the dataset, draw them and estimate the whole.

    Args:
        config: the run file; its store is not touched.
        count: how many images.
        folder: where the pictures go.
        console: where the numbers go.
    """
    dataset = read_dataset(config)
    count = min(count, len(dataset))
    images = [dataset[position * len(dataset) // count] for position in range(count)]
    relaxed = config.limits.model_copy(update={"max_failed": 1.0})
    trial = config.model_copy(update={"run": "try", "limits": relaxed})
    started = time.monotonic()
    labeller = build_labeller(trial)
    loaded_s = time.monotonic() - started
    with tempfile.TemporaryDirectory(prefix="mill-try-") as name:
        store = LocalStore(Path(name))
        plan = build_plan(
            run="try", recipe=config.recipe.name, identity=config.identity(), content={},
            chunk_size=config.sharding.chunk_size, images=images,
        )  # fmt: skip
        write_plan(store, plan, images)
        started = time.monotonic()
        LabelWorker(
            trial, plan, LabelPass(0, range(count), plan.chunk_size), Shard(0, 1), store=store,
            images=open_images(trial), make_labeller=lambda: labeller,
        ).run()  # fmt: skip
        labelled_s = time.monotonic() - started
        final = finalize_run(trial, plan, store)
        print_final(console, final, "not stored: a trial")
        pictures = draw_final(trial, plan, store, final.digest, None, folder)
    hours = labelled_s / count * len(dataset) / 3600
    console.print(f"models loaded in {loaded_s:.1f} s; {labelled_s / count:.2f} s an image, one worker")
    console.print(f"all {len(dataset)} images: {hours:.2f} hours on one such worker, {hours / 12:.2f} on twelve")
    console.print(f"pictures: {pictures}")
