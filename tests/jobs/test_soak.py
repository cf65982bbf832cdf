"""Fifty random kills: workers of any shard count, ended by SIGKILL or SIGTERM at any moment. `make test-soak`."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from mill_jobs.config import read_config
from runs import Running, final_files, finalize, label_all, mill, start_mill, write_run

KILLS = 50


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_fifty_random_kills_lose_nothing_double_nothing_and_change_no_byte(tmp_path: Path) -> None:
    calm = label_all(write_run(tmp_path / "calm", images=45, sharding={"chunk_size": 1}))
    path = write_run(tmp_path / "killed", images=45, sharding={"chunk_size": 1})
    seed = int(os.environ.get("SOAK_SEED", "1"))
    rng = random.Random(seed)
    chunks = tmp_path / "killed" / "store" / "run" / "pass-0" / "chunks"
    killed = 0
    running: list[Running] = []
    deadline = time.monotonic() + 900
    while killed < KILLS and time.monotonic() < deadline:
        while len(running) < 2:
            shards = rng.choice([1, 2, 3, 5])
            running.append(start_mill("label", path, "--shard", f"{rng.randrange(shards)}/{shards}"))
        # Mostly inside the start-up and the first chunks, where there is most to go wrong.
        time.sleep(rng.uniform(0.2, 2.5))
        victim = running.pop(rng.randrange(len(running)))
        if victim.poll() is None:
            victim.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
            killed += 1
        victim.wait_for(30)
        if len(list(chunks.glob("*.parquet"))) > 35:
            for chunk in rng.sample(sorted(chunks.glob("*.parquet")), 20):
                chunk.unlink()  # so that there is something left to kill
    for worker in running:
        worker.kill()
        worker.wait_for(30)
    assert killed == KILLS, f"seed {seed}"
    assert mill("label", path).returncode == 0
    verified = mill("verify", path)
    assert verified.returncode == 0, verified.stderr
    assert "45 of 45 images recorded in 45 chunks" in verified.stdout
    config = read_config(path)
    assert final_files(config, finalize(config)) == final_files(calm, finalize(calm)), f"seed {seed}"
