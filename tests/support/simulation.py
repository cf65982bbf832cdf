"""A store in memory that can fail, crash or let another worker run at any of its operations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from mill_jobs.config import RunConfig
from mill_jobs.recipes.base import Outcome, Sample
from mill_shared.errors import AlreadyExists, KeyMissing
from mill_shared.plan import RunPlan, build_plan, list_images, write_plan
from mill_shared.records import ImageRecord, Region
from mill_shared.storage import Entry

EVIDENCE = pa.struct([("seen", pa.int64())])


class Crash(BaseException):
    """The process is gone; nothing catches this."""


def no_hook(operation: str, key: str, phase: str) -> None:
    """Let every operation pass."""


@dataclass
class MemoryStore:
    """The Store contract on a dictionary.

    `hook(operation, key, "before" | "after")` may raise or let another worker run.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    hook: Callable[[str, str, str], None] = no_hook
    url: str = "memory"

    def get(self, key: str) -> bytes:
        """Return an object."""
        self.hook("get", key, "before")
        if key not in self.objects:
            raise KeyMissing(key)
        return self.objects[key]

    def put(self, key: str, data: bytes) -> None:
        """Write an object."""
        self.hook("put", key, "before")
        self.objects[key] = data
        self.hook("put", key, "after")

    def put_new(self, key: str, data: bytes) -> None:
        """Write an object that is not there yet."""
        self.hook("put_new", key, "before")
        if self.objects.setdefault(key, data) != data:
            raise AlreadyExists(key)
        self.hook("put_new", key, "after")

    def get_file(self, key: str, path: Path) -> None:
        """Write an object to a file."""
        path.write_bytes(self.get(key))

    def put_file(self, key: str, path: Path) -> None:
        """Write a file's content."""
        self.put(key, path.read_bytes())

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        self.hook("exists", key, "before")
        return key in self.objects

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield what lies below a prefix."""
        self.hook("list", prefix, "before")
        yield from [Entry(key, len(data), "") for key, data in sorted(self.objects.items()) if key.startswith(prefix)]

    def size(self, key: str) -> int:
        """Return an object's size."""
        return len(self.get(key))


class StubLabeller:
    """Labels every image with one region made from its id; `before(samples)` may raise."""

    evidence = EVIDENCE

    def __init__(self, before: Callable[[Sequence[Sample]], None] = lambda samples: None) -> None:
        self.before = before
        self.batches: list[list[str]] = []
        self.halvings_left = 0

    def label(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Return one region an image."""
        self.before(samples)
        self.batches.append([sample.key for sample in samples])
        return [Outcome(stub_record(sample)) for sample in samples]

    def halve_batch(self) -> bool:
        """Halve as often as the test allows."""
        self.halvings_left -= 1
        return self.halvings_left >= 0


def stub_record(sample: Sample) -> ImageRecord:
    """Return the record that StubLabeller makes."""
    height, width = sample.image_rgb.shape[:2]
    region = Region(
        (0.0, 0.0, float(width), float(height)), "foreground", label=f"thing{sample.image_id % 3}", score=0.5,
        evidence={"seen": sample.image_id},
    )  # fmt: skip
    return ImageRecord(
        row=sample.row, image_id=sample.image_id, key=sample.key, status="ok", width=sample.width, height=sample.height,
        regions=(region,),
    )  # fmt: skip


def png(width: int = 8, height: int = 6, shade: int = 90) -> bytes:
    """Return a small picture."""
    found, data = cv2.imencode(".png", np.full((height, width, 3), shade, np.uint8))
    assert found
    return data.tobytes()


def image_store(count: int) -> MemoryStore:
    """Return a dataset of small pictures 0.png, 1.png, ..."""
    return MemoryStore({f"{index:03d}.png": png(shade=index % 256) for index in range(count)})


def run_config(**changes: object) -> RunConfig:
    """Return a run file for simulated stores; waits are short."""
    tree: dict[str, object] = {
        "run": "sim",
        "store": "unused",
        "dataset": {"images": "unused"},
        "sharding": {"chunk_size": 4},
        "limits": {"outside_wait_s": 0, "heartbeat_s": 1000.0, "max_failed": 1.0},
        "recipe": {"name": "cotpl"},
    }
    return RunConfig.model_validate({**tree, **changes})


def make_plan(store: MemoryStore, images: MemoryStore, chunk_size: int = 4) -> RunPlan:
    """Plan a simulated run."""
    rows = list_images(images, {".png", ".jpg"}, "auto")
    plan = build_plan(run="sim", recipe="cotpl", identity={}, content={}, chunk_size=chunk_size, images=rows)
    return write_plan(store, plan, rows)
