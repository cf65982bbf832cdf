"""What a large dataset means: the plan of ten million images, and ten thousand chunks through a real S3 server.

    python tests/bench/bench_scale.py [--images 10000000] [--chunks 10000]

Labelling is a stub: chunks of 32 images with eight asked regions and eighty dropped candidates each are made from one
and written as a worker writes them. The server is SeaweedFS on this machine and shares its CPUs.
"""

import argparse
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import yaml

from bench_finalize import CHUNK, NAMES, make_chunk, say
from mill_jobs.config import read_config
from mill_shared.keys import RunKeys
from mill_shared.plan import ImageRow, RunPlan, build_plan, read_images, write_plan
from mill_shared.records import ChunkMeta, encode_table
from mill_shared.storage import LocalStore, S3Store, Store, open_store

T = TypeVar("T")

WRITERS = 12


def timed(name: str, work: Callable[[], T]) -> tuple[T, float]:
    """Run a step and print what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say(f"  {name:<44} {wall:8.2f} s {cpu:8.2f} s CPU  peak so far {peak:6.0f} MiB")
    return result, wall


def rows(images: int) -> list[ImageRow]:
    """Return images as a listing of a bucket gives them."""
    etags = random.Random(7)
    return [
        ImageRow(i, f"part-{i // 10_000:05d}/{i:012d}.jpg", 150_000 + i % 7, f"{etags.getrandbits(128):032x}")
        for i in range(images)
    ]


def run_plan(folder: Path, images: int) -> None:
    """Plan a dataset and read a shard's rows of it."""
    store = LocalStore(folder / "plan")
    listed, _ = timed(f"{images:,} images as rows", lambda: rows(images))
    plan, _ = timed("digests and plan", lambda: build_plan(
        run="scale", recipe="cotpl", identity={}, content={}, chunk_size=CHUNK, images=listed
    ))  # fmt: skip
    timed("image table written", lambda: write_plan(store, plan, listed))
    size = store.size(RunKeys("scale").images(plan.images_digest))
    say(f"  image table {size / 1e6:,.0f} MB, {size / images:.1f} bytes an image")
    shard = {row for chunk in range(0, -(-images // CHUNK), 12) for row in range(chunk * CHUNK, (chunk + 1) * CHUNK)}
    timed("a shard of twelve reads its rows", lambda: sum(1 for _ in read_images(store, plan, shard)))


def write_chunks(store: Store, plan: RunPlan, chunks: int) -> None:
    """Commit chunks from several writers."""
    base = make_chunk(np.random.default_rng(7), np.arange(CHUNK, dtype=np.int64), pa.array([*NAMES, None], pa.string()))

    def commit(chunk: int) -> int:
        place = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
        columns: dict[str, Any] = {
            "row": place,
            "image_id": place,
            "key": [f"part-{i // 10_000:05d}/{i:012d}.jpg" for i in place],
        }
        table = base
        for name, values in columns.items():
            index = table.schema.get_field_index(name)
            table = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
        data = encode_table(table, ChunkMeta(label_digest=plan.label_digest, pass_index=0, chunk=chunk))
        store.put_new(RunKeys(plan.run).chunk(0, chunk), data)
        return len(data)

    with ThreadPoolExecutor(WRITERS) as pool:
        sizes, wall = timed(
            f"{chunks:,} chunks committed by {WRITERS} writers", lambda: list(pool.map(commit, range(chunks)))
        )
    say(f"  {chunks / wall:,.0f} commits a second, {sum(sizes) / chunks / 1e3:,.0f} kB a chunk")


def run_store(folder: Path, chunks: int) -> None:
    """Send chunks through the server, list them, gather and finalize them."""
    from mill_jobs.finalize import finalize_run
    from seaweed import BUCKET, CREDENTIALS, SeaweedFS  # tests/support, which `main` puts on the path

    os.environ.update(CREDENTIALS)
    server = SeaweedFS(folder / "weed")
    try:
        url = f"s3://{BUCKET}/runs"
        storage = {"endpoint": server.endpoint, "path_style": True, "region": "us-east-1"}
        tree = {
            "run": "scale",
            "store": url,
            "storage": storage,
            "dataset": {"images": "unused"},
            "recipe": {"name": "cotpl"},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
        config = read_config(folder / "run.yaml")
        store = open_store(url, config.storage)
        assert isinstance(store, S3Store)
        listed = rows(chunks * CHUNK)
        plan = build_plan(
            run="scale", recipe="cotpl", identity=config.identity(), content={}, chunk_size=CHUNK, images=listed
        )
        write_plan(store, plan, listed)
        write_chunks(store, plan, chunks)
        keys = RunKeys("scale")
        found, _ = timed("one listing of all chunks", lambda: sum(1 for _ in store.list(keys.chunks(0))))
        assert found == chunks
        beat = msgspec.json.encode({"state": "working", "chunk_in_hand": 1, "host": "worker", "images": 1})

        def beat_often() -> None:
            for number in range(1000):
                store.put(keys.heartbeat(0, number % 12, 12), beat)

        timed("1,000 heartbeats", beat_often)
        timed(f"finalize of {chunks * CHUNK:,} images", lambda: finalize_run(config, plan, store))
    finally:
        server.kill()


def main() -> None:
    """Measure, each part in a process of its own, so that peaks are its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--part", choices=["plan", "store"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is None:
        import subprocess

        for part in ("plan", "store"):
            say(f"{part}:")
            arguments = ["--part", part, "--images", str(options.images), "--chunks", str(options.chunks)]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "support")}
            subprocess.run([sys.executable, __file__, *arguments], check=True, env=environment)
        return
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as name:
        folder = Path(name)
        if options.part == "plan":
            run_plan(folder, options.images)
        else:
            (folder / "weed").mkdir()
            run_store(folder, options.chunks)


if __name__ == "__main__":
    main()
