"""mmdetection's own dataset and mmengine's own wrappers, without mmcv and its compiled parts.

`mmdet` and `mmdet.datasets` stand in `sys.modules` as empty packages with the real search path, so that their heavy
`__init__` files, which need mmcv, are skipped. The modules themselves are the real ones.
"""

import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Loaded:
    """What a trainer gets out of one dataset."""

    classes: tuple[str, ...]
    labels: tuple[tuple[int, str, tuple[float, ...]], ...]
    """(image id, class name by label index, box xyxy) of every instance."""


def mmdet_file(path: str) -> Path:
    """Return a file of the installed mmdet."""
    spec = importlib.util.find_spec("mmdet") if "mmdet" not in sys.modules else None
    if spec is not None:
        assert spec.origin is not None
        return Path(spec.origin).parent / path
    return Path(sys.modules["mmdet"].__path__[0]) / path


def coco_dataset() -> Any:
    """Return the class CocoDataset of mmdetection."""
    root = mmdet_file("")
    for name, folder in (("mmdet", root), ("mmdet.datasets", root / "datasets")):
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__path__ = [str(folder)]
            sys.modules[name] = module
    from mmdet.datasets.coco import CocoDataset  # type: ignore[import-untyped]

    return CocoDataset


def build(dataset: Mapping[str, Any]) -> Any:
    """Build a training dataset of a resolved config, wrappers included, with empty pipelines."""
    from mmengine.dataset import ConcatDataset, RepeatDataset  # type: ignore[import-untyped]

    match dataset["type"]:
        case "CocoDataset":
            arguments = {key: value for key, value in dataset.items() if key not in ("type", "pipeline")}
            return coco_dataset()(**arguments, pipeline=[])
        case "ConcatDataset":
            return ConcatDataset([build(member) for member in dataset["datasets"]])
        case "RepeatDataset":
            return RepeatDataset(build(dataset["dataset"]), times=dataset["times"])
        case kind:
            raise ValueError(f"{kind}: unknown wrapper")


def read(dataset: Any) -> Loaded:
    """Return what a built dataset holds, class names as the trainer's visualiser would print them."""
    classes = dataset.metainfo["classes"]
    found = []
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        found += [
            (info["img_id"], classes[item["bbox_label"]], tuple(float(side) for side in item["bbox"]))
            for item in info["instances"]
        ]
    return Loaded(tuple(classes), tuple(sorted(found)))


# A config in the manner of CoT-PL's over BARON: what spec 5.1 lists, and enough around it that a patch could harm.

BARON_MODEL = """\
# number of pseudo classes
num_pls = {num_pls}
class_weight = [
    {weights}  # COCO's order
] + [1] * num_pls + [0.7]   # the background is last
cache = {cache!r}

model = dict(
    type='OpenVocabularyRCNN',
    backbone=dict(type='ResNet', depth=50, norm_cfg=dict(type='SyncBN')),
    roi_head=dict(
        ovd_cfg=dict(kd=dict(
            type='BaronKD',
            boxes_cache=dict(json_path=cache, start_iter=20000),
            bg_cls_embeddings_path="data/metadata/background_attn12.npy",
            num_words=6)),
        bbox_head=dict(
            type='BaronBBoxHead',
            num_classes=80 + num_pls,
            bg_cls_embeddings_path = 'data/metadata/background_attn12.npy',
            cls_embeddings_path='data/metadata/classes_attn12.npy',  # one row a class
            loss_cls=dict(type='CustomCrossEntropyLoss', use_sigmoid=False, class_weight=class_weight)),
    ),
    rpn_head=dict(type='CustomRPNHead', num_classes=1),
)
"""
BARON_DATA = """\
data_root = 'data/coco/'
det_dataset = dict(
    type='CocoDataset',
    data_root=data_root,
    ann_file='hchoi/{annotations}',
    data_prefix=dict(img='train2017/'),
    filter_cfg=dict(filter_empty_gt=False),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])
ovd_dataset = {{
    'type': 'CocoDataset', 'data_root': data_root,
    'ann_file': 'hchoi/{annotations}',
    'data_prefix': dict(img='train2017/'), 'pipeline': [],
}}
train_dataloader = dict(
    batch_size=8,
    dataset=dict(type='ConcatDataset', datasets=[det_dataset, ovd_dataset]))
val_dataloader = dict(
    batch_size=1,
    dataset=dict(type='CocoDataset', data_root=data_root, ann_file='hchoi/val_base.json', pipeline=[]))
val_evaluator = [dict(type='CocoMetric', ann_file='data/coco/hchoi/val_base.json', metric='bbox')]
"""
ANNOTATIONS = "instances_train2017_pseudo_v0_new.json"


def baron_files(
    num_pls: int = 44, weights: Sequence[int] = (1,) * 80, annotations: str = ANNOTATIONS
) -> tuple[str, str]:
    """Return the text of the model's and of the data's half of a config."""
    rows = "\n    ".join(
        " ".join(f"{weight}," for weight in weights[start : start + 20]) for start in range(0, len(weights), 20)
    )
    model = BARON_MODEL.format(num_pls=num_pls, weights=rows, cache=f"data/coco/hchoi/{annotations}")
    return model, BARON_DATA.format(annotations=annotations)
