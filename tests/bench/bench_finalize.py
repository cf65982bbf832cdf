"""Finalize at the size of COCO train2017: time and peak memory of the whole command and of its stages.

    python tests/bench/bench_finalize.py [FOLDER] [--scale 1.0]

The set is made once, always the same, and used again where FOLDER has it: 118,287 images in chunks of 32, 8 asked
regions and 80 dropped candidates an image, and a base file of 665,387 annotations with outlines. FOLDER/run.yaml is a
complete run: `mill finalize FOLDER/run.yaml` works on it.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mill_jobs.recipes.cotpl.config import CotplConfig
from mill_jobs.recipes.cotpl.evidence import EVIDENCE
from mill_shared.keys import RunKeys
from mill_shared.plan import ImageRow, build_plan, write_plan
from mill_shared.presets import COCO_80, OV_COCO_48
from mill_shared.records import ChunkMeta, chunk_schema, encode_table
from mill_shared.storage import LocalStore

IMAGES, CHUNK = 118_287, 32
REGIONS, DROPPED = 8, 80
BASE_ANNOTATIONS = 665_387
WIDTH, HEIGHT = 640, 480
RLE_BYTES = 365
VOCABULARY = 20_000
RUN = "bench"


def _boxes(rng: np.random.Generator, count: int) -> dict[str, NDArray[np.float64]]:
    """Integer corners inside the image, at least 100 x 100 pixels."""
    x0, y0 = rng.integers(0, WIDTH - 100, count), rng.integers(0, HEIGHT - 100, count)
    x1, y1 = rng.integers(x0 + 100, WIDTH + 1), rng.integers(y0 + 100, HEIGHT + 1)
    return {name: value.astype(np.float64) for name, value in (("x0", x0), ("y0", y0), ("x1", x1), ("y1", y1))}


def _strings(values: Sequence[str | None], chosen: NDArray[np.int64]) -> Any:
    return pa.array(values, pa.string()).take(chosen)


def _struct(fields: dict[str, Any], dtype: pa.StructType) -> Any:
    return pa.StructArray.from_arrays([pa.array(fields[field.name], field.type) for field in dtype], fields=list(dtype))


def _lists(values: Any, sizes: NDArray[np.int64]) -> Any:
    offsets: Any = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, values)


FREQUENT = (*(name for name in COCO_80 if name not in OV_COCO_48), *(f"object {index}" for index in range(20)))
NAMES = (*OV_COCO_48, *FREQUENT, *(f"thing {index}" for index in range(VOCABULARY)))


def _labels(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Places in NAMES: a fifth base classes, two thirds frequent names, the rest a long tail."""
    group = rng.choice(3, count, p=(0.2, 0.67, 0.13))
    frequent = len(OV_COCO_48) + rng.integers(0, len(FREQUENT), count)
    tail = len(NAMES) - VOCABULARY + np.minimum(rng.zipf(1.35, count) - 1, VOCABULARY - 1)
    return np.choose(group, (rng.integers(0, len(OV_COCO_48), count), frequent, tail))


def make_chunk(rng: np.random.Generator, rows: NDArray[np.int64], names: Any) -> pa.Table:
    """Return the records of one chunk: half of the regions are foreground, their names as frequent as in speech."""
    schema = chunk_schema(EVIDENCE)
    images = len(rows)
    sizes = rng.poisson(REGIONS, images)
    count = int(sizes.sum())
    region_type = schema.field("regions").type.value_type
    fate = rng.choice(4, count, p=(0.55, 0.25, 0.15, 0.05))
    label = np.where(fate < 2, _labels(rng, count), len(NAMES))
    text = rng.integers(48, 112, count * RLE_BYTES, dtype=np.uint8).tobytes()
    counts = [text[start : start + RLE_BYTES] for start in range(0, len(text), RLE_BYTES)]
    answer_type = region_type.field("evidence").type.field("answers").type.value_type
    answers = _struct(
        {
            "question": _strings(["presence", "name", "layer"], np.tile(np.arange(3), count)),
            "attempt": np.zeros(3 * count, np.int32),
            "text": _strings(["Yes", "A dog.", "Foreground"], np.tile(np.arange(3), count)),
        },
        answer_type,
    )
    evidence = _struct(
        {
            "predicted_iou": rng.random(count),
            "stability": rng.random(count),
            "float_box": np.zeros(count, bool),
            "answers": _lists(answers, np.full(count, 3)),
        },
        EVIDENCE,
    )
    mask = _struct(
        {"height": np.full(count, HEIGHT), "width": np.full(count, WIDTH), "counts": counts},
        region_type.field("mask").type,
    )
    regions = _struct(
        {
            **_boxes(rng, count),
            "score": rng.random(count),
            "label": names.take(label),
            "fate": _strings(["foreground", "background", "absent", "undecided"], fate),
            "reason": _strings([None, None, "no", "parse_name"], fate),
            "text_id": pa.nulls(count, pa.int64()),
            "view": pa.nulls(count, pa.string()),
            "mask": mask,
            "evidence": evidence,
        },
        region_type,
    )
    lost = rng.poisson(DROPPED, images)
    dropped = _struct(
        {
            **_boxes(rng, int(lost.sum())),
            "score": rng.random(int(lost.sum())),
            "reason": _strings(["small", "duplicate", "inner", "low_score"], rng.integers(0, 4, int(lost.sum()))),
        },
        schema.field("dropped").type.value_type,
    )
    no_file = _struct({"name": [], "sha256": []}, schema.field("files").type.value_type)
    files = _lists(no_file, np.zeros(images, np.int64))
    return pa.table(
        [
            pa.array(rows), pa.array(rows + 1), pa.array([f"{row + 1:012d}.jpg" for row in rows]),
            pa.array(np.full(images, WIDTH, np.int32)), pa.array(np.full(images, HEIGHT, np.int32)),
            pa.array(["ok"] * images), pa.nulls(images, pa.string()), pa.nulls(images, pa.string()),
            files, _lists(regions, sizes), _lists(dropped, lost),
        ],
        schema=schema,
    )  # fmt: skip


def make_base(rng: np.random.Generator, path: Path, images: int, annotations: int) -> None:
    """Write a base file in COCO's layout, outlines included: about 666 bytes an annotation."""
    outlines = [
        json.dumps([[round(float(value), 2) for value in rng.random(2 * int(rng.integers(8, 60))) * 600]])
        for _ in range(2000)
    ]
    base = [COCO_80.index(name) + 1 for name in OV_COCO_48]
    with path.open("w") as stream:
        stream.write('{"info": {"description": "made"}, "licenses": [], "images": [')
        for start in range(1, images + 1, 10_000):
            rows = [
                f'{{"license": 3, "file_name": "{i:012d}.jpg", "coco_url": "http://images.example/2017/{i:012d}.jpg", '
                f'"height": {HEIGHT}, "width": {WIDTH}, "date_captured": "2013-11-14 16:28:13", '
                f'"flickr_url": "http://farm.example/{i}_e10a1c4e.jpg", "id": {i}}}'
                for i in range(start, min(start + 10_000, images + 1))
            ]
            stream.write((", " if start > 1 else "") + ", ".join(rows))
        stream.write('], "annotations": [')
        for start in range(0, annotations, 10_000):
            count = min(10_000, annotations - start)
            boxes = _boxes(rng, count)
            image, category = rng.integers(1, images + 1, count), rng.choice(base, count)
            outline = rng.integers(0, len(outlines), count)
            rows = [
                f'{{"segmentation": {outlines[o]}, "area": {(x1 - x0) * (y1 - y0) / 2}, "iscrowd": 0, "image_id": {i}, '
                f'"bbox": [{x0}, {y0}, {x1 - x0}, {y1 - y0}], "category_id": {c}, "id": {start + n}}}'
                for n, (i, c, o, x0, y0, x1, y1) in enumerate(
                    zip(
                        image.tolist(), category.tolist(), outline.tolist(),
                        *(boxes[name].tolist() for name in ("x0", "y0", "x1", "y1")), strict=True,
                    ),
                    1,
                )
            ]  # fmt: skip
            stream.write((", " if start else "") + ", ".join(rows))
        categories = [{"supercategory": "thing", "id": index + 1, "name": name} for index, name in enumerate(COCO_80)]
        stream.write('], "categories": ' + json.dumps(categories) + "}")


def make_run(folder: Path, scale: float) -> None:
    """Write a complete labelled run and its base file, unless the folder has them for this scale."""
    done = folder / "made.json"
    if done.is_file() and json.loads(done.read_text())["scale"] == scale:
        return
    folder.mkdir(parents=True, exist_ok=True)
    images = max(CHUNK, int(IMAGES * scale))
    rows = [ImageRow(index + 1, f"{index + 1:012d}.jpg", 1, "") for index in range(images)]
    settings = {
        "run": RUN,
        "store": str(folder / "store"),
        "dataset": {"images": "unused"},
        "recipe": {"name": "cotpl"},
        "finalize": {"base": str(folder / "base.json"), "base_classes": "ov-coco-48"},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    from mill_jobs.config import read_config

    config = read_config(folder / "run.yaml")
    plan = build_plan(run=RUN, recipe="cotpl", identity=config.identity(), content={}, chunk_size=CHUNK, images=rows)
    store = LocalStore(folder / "store")
    write_plan(store, plan, rows)
    names = pa.array([*NAMES, None], pa.string())
    for chunk in range(-(-images // CHUNK)):
        place = np.arange(chunk * CHUNK, min(images, (chunk + 1) * CHUNK), dtype=np.int64)
        data = encode_table(
            make_chunk(np.random.default_rng((7, chunk)), place, names),
            ChunkMeta(label_digest=plan.label_digest, pass_index=0, chunk=chunk),
        )
        path = store.path_of(RunKeys(RUN).chunk(0, chunk))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    make_base(np.random.default_rng(8), folder / "base.json", images, int(BASE_ANNOTATIONS * scale))
    done.write_text(json.dumps({"scale": scale}))


# Measuring


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def measured(name: str, work: Callable[[], object]) -> None:
    """Print what a stage took in this process, threads included."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    say(f"  {name:<10} {time.perf_counter() - wall:6.2f} s  {time.process_time() - cpu:6.2f} s CPU")


def run_stages(folder: Path) -> None:
    """Run the stages of finalize one after another, each on its own."""
    from mill_jobs.config import read_config
    from mill_jobs.finalize import ScratchWriter, count_outcomes, gather_chunks, record_table
    from mill_jobs.flat import FlatWriter
    from mill_jobs.recipes.cotpl.finalize import finalize
    from mill_jobs.run import open_run
    from mill_shared.coco import open_base

    config = read_config(folder / "run.yaml")
    store, plan = open_run(config)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        with FlatWriter(scratch / "flat") as flat:
            wall, cpu = time.perf_counter(), time.process_time()
            gathered = gather_chunks(store, plan, scratch, flat)
            say(f"  gather     {time.perf_counter() - wall:6.2f} s  {time.process_time() - cpu:6.2f} s CPU")
        base = open_base(folder / "base.json", None, config.finalize.base_classes)
        measured("base", lambda: open_base(folder / "base.json", None, config.finalize.base_classes))
        assert isinstance(config.recipe, CotplConfig)
        settings = config.recipe.finalize
        with record_table(gathered, plan, scratch, flat) as table:
            measured("outcomes", lambda: count_outcomes(table))
            writer = ScratchWriter(scratch / "final")
            measured("finalize", lambda: finalize(settings, table, base, writer))
    say(f"  peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def run_command(folder: Path, times: int) -> None:
    """Run `mill finalize` on the set, from nothing to a published final."""
    command = [sys.executable, "-m", "mill_jobs.cli", "finalize", str(folder / "run.yaml"), "--no-report"]
    for _ in range(times):
        shutil.rmtree(folder / "store" / RUN / "final", ignore_errors=True)
        wall = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - wall
        assert process.returncode == 0, "mill finalize failed"
        cpu = used.ru_utime + used.ru_stime
        say(f"  mill finalize {wall:6.2f} s  {cpu:6.2f} s CPU  peak memory {used.ru_maxrss / 1024:.0f} MiB")


def main() -> None:
    """Make the set, measure the stages and the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the set is, or is made (1 GB); default: temporary")
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 is the size of COCO train2017")
    parser.add_argument("--stage", choices=["stages"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is not None:
        run_stages(options.folder)
        return
    with tempfile.TemporaryDirectory(prefix="bench-finalize-") as scratch:
        folder = options.folder or Path(scratch)
        make_run(folder, options.scale)
        say(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, scale {options.scale:g}")
        say("each stage on its own:")
        subprocess.run([sys.executable, __file__, str(folder), "--stage", "stages"], check=True)
        say("the whole command, wanted: 6 s and 400 MiB on 2 idle CPUs (the original's scripts: 121 s, 2.6 GB):")
        run_command(folder, times=3)


if __name__ == "__main__":
    main()
