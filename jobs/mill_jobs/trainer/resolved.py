"""What a trainer's configs come to, as mmengine reads them, and whether that is what the class list says.

A config that looks right can still come to something else: mmengine drops or adds keys without a word. So the faults
are sought in what it returns.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mill_jobs.trainer.classes import ClassList
from mill_jobs.trainer.config import TargetTable
from mill_jobs.trainer.overlay import EMBEDDING_FILES, INSTANCES, make_edits
from mill_shared.errors import ConfigError

LEAST_WEIGHT = 1e-5
"""A weight below it makes the logit -inf, and a label of that class NaN. Source: specs/cotpl.md 5.3."""
SHARED_SECTIONS = (
    "model",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "val_evaluator",
    "test_evaluator",
)
"""What overlay and patched config must have in common. Top-level variables that they were made from may differ."""
NAMED = 5
"""How many differences are named."""


def load_resolved(path: Path) -> Mapping[str, Any]:
    """Return what a config comes to, bases included, as plain containers. It runs the config's own code.

    Raises:
        ConfigError: mmengine is not installed, or cannot read the config.
    """
    try:
        from mmengine.config import Config  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"{path}: reading it needs mmengine; install labelmill[mmdet]") from error
    # What a config may raise is whatever its own code raises.
    faults = (OSError, ImportError, SyntaxError, LookupError, TypeError, ValueError, AttributeError, NameError)
    try:
        resolved: Mapping[str, Any] = Config.fromfile(path, import_custom_modules=False).to_dict()
    except (*faults, RuntimeError) as error:
        raise ConfigError(f"{path}: mmengine cannot read it: {' '.join(str(error).split())}") from error
    return resolved


def find_values(node: Any, path: str) -> list[Any]:
    """Return the values at a target path; see `TargetTable`."""
    return list(_walk(node, path.split(".")))


def _walk(node: Any, steps: Sequence[str]) -> Iterator[Any]:
    if not steps:
        yield node
    elif isinstance(node, list | tuple):
        for item in node:
            yield from _walk(item, steps)
    elif isinstance(node, Mapping):
        if steps[0] == "**":
            yield from _walk(node, steps[1:])
            for item in node.values():
                yield from _walk(item, steps)
        elif steps[0] in node:
            yield from _walk(node[steps[0]], steps[1:])


def _datasets(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        if "ann_file" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for item in node:
            yield from _datasets(item)


def agreement(
    overlay: Mapping[str, Any] | None, patched: Mapping[str, Any] | None, classes: ClassList, targets: TargetTable, *,
    files: Collection[str] = (), annotation_file: str = INSTANCES, classes_in_code: bool = False,
) -> list[str]:  # fmt: skip
    """Return every difference between resolved configs and the class list, and between the configs.

    Args:
        overlay: what the overlay comes to; None where there is none.
        patched: what the patched config comes to; None where there is none.
        classes: of the bundle.
        targets: where the values stand.
        files: embedding files that the bundle holds.
        annotation_file: name of the bundle's COCO file.
        classes_in_code: the patched config takes its class names from a patched `coco.py`.
    """
    faults = list[str]()
    for name, config, in_code in (("overlay", overlay, False), ("patched config", patched, classes_in_code)):
        if config is not None:
            found = (
                *_dataset_faults(config, classes, annotation_file, in_code),
                *_value_faults(config, classes, targets, files, annotation_file),
            )
            faults += [f"{name}: {fault}" for fault in found]
    if overlay is not None and patched is not None:
        names = {annotation_file, *EMBEDDING_FILES.values()}
        differing = [
            place
            for section in SHARED_SECTIONS
            for place in _differences(overlay.get(section), patched.get(section), section, names, classes_in_code)
        ]
        more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        if differing:
            faults.append(f"overlay and patched config differ in {', '.join(differing[:NAMED])}{more}")
    return faults


def _dataset_faults(
    config: Mapping[str, Any], classes: ClassList, annotation_file: str, in_code: bool
) -> Iterator[str]:
    names = tuple(entry.name for entry in classes.classes)
    datasets = list(_datasets(config.get("train_dataloader")))
    if not datasets:
        yield "no training dataset with an ann_file"
    for number, dataset in enumerate(datasets):
        place = f"training dataset {number} of {len(datasets)}"
        if _name(dataset["ann_file"]) != annotation_file:
            yield f"{place}: ann_file is {dataset['ann_file']!r}, not the bundle's {annotation_file}"
        metainfo = dataset.get("metainfo")
        if metainfo is None:
            if not in_code:
                yield f"{place}: has no metainfo, so it silently takes the classes of its own code"
            continue
        found = metainfo.get("classes") if isinstance(metainfo, Mapping) else None
        if not isinstance(found, tuple):
            yield f"{place}: metainfo.classes is no tuple, but {type(found).__name__}"
        elif found != names:
            pairs = enumerate(zip(found, names, strict=False))
            at = next((index for index, (mine, wanted) in pairs if mine != wanted), min(len(found), len(names)))
            yield (
                f"{place}: metainfo.classes has {len(found)} names for {len(names)} classes and differs from number "
                f"{at} on ({_at(found, at)} for {_at(names, at)})"
            )
        elif len(metainfo.get("palette", ())) != len(names):
            yield f"{place}: metainfo.palette has {len(metainfo.get('palette', ()))} colours for {len(names)} classes"
    if any(dataset.get("metainfo") != datasets[0].get("metainfo") for dataset in datasets[1:]):
        yield "the training datasets have different metainfo"


def _at(names: Sequence[str], index: int) -> str:
    return repr(names[index]) if index < len(names) else "nothing"


def _value_faults(
    config: Mapping[str, Any], classes: ClassList, targets: TargetTable, files: Collection[str], annotation_file: str
) -> Iterator[str]:
    for edit in make_edits(classes, targets, files, annotation_file=annotation_file, metainfo=False):
        if edit.what == "annotations":
            continue
        found = [(path, value) for path in edit.paths for value in find_values(config, path)]
        if not found:
            yield f"none of {', '.join(edit.paths)} is there"
        for path, value in found:
            if edit.what == "class_weight":
                yield from _weight_faults(path, value, classes)
            elif isinstance(edit.value, str):
                if _name(value) != _name(edit.value):
                    yield f"{path} is {value!r}, not the bundle's {_name(edit.value)}"
            elif value != edit.value:
                yield f"{path} is {value!r}, not {edit.value!r}"


def _weight_faults(path: str, weights: Any, classes: ClassList) -> Iterator[str]:
    wanted = classes.class_weight
    if not isinstance(weights, list | tuple) or len(weights) != len(wanted):
        length = len(weights) if isinstance(weights, list | tuple) else repr(weights)
        yield f"{path}: {length} weights for {len(wanted) - 1} classes and the background"
        return
    for entry, weight in zip(classes.classes, weights, strict=False):
        if entry.boxes and weight < LEAST_WEIGHT:
            yield f"{path}: {entry.name} has {entry.boxes} boxes, but weight {weight}: its loss becomes NaN"
    names = [*(entry.name for entry in classes.classes), "the background"]
    differing = [name for name, weight, right in zip(names, weights, wanted, strict=True) if weight != right]
    if differing:
        more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        yield f"{path}: wrong for {', '.join(differing[:NAMED])}{more}"


def _name(path: Any) -> str | None:
    return PurePosixPath(path.replace("\\", "/")).name if isinstance(path, str) else None


def _differences(a: Any, b: Any, place: str, files: Collection[str], no_metainfo: bool) -> Iterator[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys((*a, *b)):
            if key == "metainfo" and no_metainfo and place.startswith("train_dataloader"):
                continue
            yield from _differences(a.get(key), b.get(key), f"{place}.{key}", files, no_metainfo)
    elif isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        for number, (mine, other) in enumerate(zip(a, b, strict=True)):
            yield from _differences(mine, other, f"{place}[{number}]", files, no_metainfo)
    elif a != b and not (_name(a) in files and _name(a) == _name(b)):
        yield place
