"""A labelled and finalized run of real photographs, with ground truth as its models."""

import json
from dataclasses import dataclass
from pathlib import Path

from mill_jobs.config import RunConfig
from mill_jobs.finalize import finalize_run
from mill_jobs.label import Shard
from mill_jobs.run import label_shard, plan_run
from mill_shared.plan import RunPlan
from mill_shared.presets import OV_COCO_48
from mill_shared.storage import Store

SAMPLE = Path(__file__).parent.parent / "data" / "coco-sample"
IMAGE_IDS = (790, 159269, 196610, 252639, 491525, 516008)
"""Six photographs with things of novel classes."""


@dataclass(frozen=True)
class OracleRun:
    """The run and its files."""

    config: RunConfig
    plan: RunPlan
    store: Store
    final: str
    truth: Path
    """All annotations of the images."""
    base: Path
    """Those of base classes."""


def make_oracle_run(folder: Path) -> OracleRun:
    """Label and finalize; masks and answers are the truth's."""
    whole = json.loads((SAMPLE / "instances.json").read_bytes())
    names = {category["id"]: category["name"] for category in whole["categories"]}
    truth = {
        "images": [image for image in whole["images"] if image["id"] in IMAGE_IDS],
        "annotations": [item for item in whole["annotations"] if item["image_id"] in IMAGE_IDS],
        "categories": whole["categories"],
    }
    base = {**truth, "annotations": [a for a in truth["annotations"] if names[a["category_id"]] in OV_COCO_48]}
    for name, content in (("truth.json", truth), ("base.json", base)):
        (folder / name).write_text(json.dumps(content))
    oracle = {"kind": "oracle", "truth": str(folder / "truth.json")}
    config = RunConfig.model_validate(
        {
            "run": "oracle",
            "store": str(folder / "store"),
            "dataset": {"images": str(SAMPLE / "images"), "coco": str(folder / "truth.json")},
            "sharding": {"chunk_size": 2},
            "recipe": {
                "name": "cotpl",
                "label": {"masks": oracle, "chat": oracle},
                "finalize": {"selection": {"by": "count", "count": 1}},
            },
            "finalize": {"base": str(folder / "base.json"), "base_classes": "ov-coco-48"},
        }
    )
    store, plan = plan_run(config)
    label_shard(config, Shard(0, 1))
    final = finalize_run(config, plan, store).digest
    return OracleRun(config, plan, store, final, folder / "truth.json", folder / "base.json")
