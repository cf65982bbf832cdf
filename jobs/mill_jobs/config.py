"""One YAML file, one frozen model: everything that a run is."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from mill_jobs.recipes.cotpl.config import CotplConfig
from mill_jobs.recipes.vlplm.config import VlplmConfig
from mill_jobs.trainer.config import NoTrainer, TrainerConfig
from mill_shared.config import DatasetConfig, LimitsConfig, Role, Section, ShardingConfig, StorageConfig
from mill_shared.errors import ConfigError

RUN_ID_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
"""A run's id becomes a key, a label and part of Job names."""


class FinalizeConfig(Section):
    """The truth that is kept, and the known classes."""

    base: str | None = None
    """COCO file whose content the final keeps; path or `s3://`. Without one, ids start at 1 and every weight is 1."""
    taxonomy: tuple[str, ...] | Literal["coco-80"] | None = None
    """Ordered known classes; default: the base file's categories by id."""
    base_classes: tuple[str, ...] | Literal["ov-coco-48"] | None = None
    """Classes whose annotations in the base file are kept; required with a base file, never inferred."""
    trainer: TrainerConfig = NoTrainer()
    """What the bundle is made for."""


class RunConfig(Section):
    """A run: one labelling of one dataset with one config."""

    run: Annotated[str | None, Role.PLACEMENT] = Field(None, pattern=RUN_ID_PATTERN)
    """Id of the run; default: the recipe's name and 8 digits of the label digest."""
    store: Annotated[str, Role.PLACEMENT]
    """Where results go: a path or `s3://bucket/prefix`."""
    storage: Annotated[StorageConfig, Role.PLACEMENT] = StorageConfig()
    """How S3 is reached."""
    dataset: DatasetConfig
    """Which images."""
    sharding: ShardingConfig = ShardingConfig()
    """How they are cut."""
    limits: Annotated[LimitsConfig, Role.PLACEMENT] = LimitsConfig()
    """When to wait and when to give up."""
    recipe: Annotated[CotplConfig | VlplmConfig, Field(discriminator="name")]
    """The method."""
    finalize: Annotated[FinalizeConfig, Role.FINALIZE] = FinalizeConfig()
    """What is kept beside the labels."""


def _set(tree: dict[str, Any], assignment: str) -> None:
    path, sep, text = assignment.partition("=")
    if not sep:
        raise ConfigError(f"--set {assignment}: expected path=value, e.g. --set recipe.finalize.masks=true")
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {assignment}: {parent} is not a section")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: the value is no YAML: {error}") from error


def _path(parts: tuple[int | str, ...]) -> str:
    """Return a field's path as the user wrote it: without the recipe's name, which pydantic puts behind `recipe`."""
    written = (*parts[:1], *parts[2:]) if parts[:1] == ("recipe",) else parts
    return ".".join(str(part) for part in written)


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{_path(item['loc']) or '(file)'}: {item['msg']}"
        + ("" if isinstance(item["input"], dict) else f" (got {item['input']!r})")
        for item in error.errors(include_url=False)
    )


def read_config(path: Path, assignments: tuple[str, ...] = ()) -> RunConfig:
    """Read a run file.

    Args:
        path: YAML. Relative paths in it count from the working directory.
        assignments: `path=value` one-off changes, values as YAML.

    Raises:
        ConfigError: unreadable, not YAML, or a field is missing, unknown or out of range; all faults in one line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run file {path}: {' '.join(str(error).split())}") from error
    return parse_config(text, f"run file {path}", assignments)


def parse_config(text: str, where: str, assignments: tuple[str, ...] = ()) -> RunConfig:
    """Read the text of a run file.

    Args:
        text: YAML.
        where: it comes from, for messages.
        assignments: `path=value` one-off changes, values as YAML.

    Raises:
        ConfigError: not YAML, or a field is missing, unknown or out of range; all faults in one line.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected a mapping of sections, got {type(tree).__name__}")
    for assignment in assignments:
        _set(tree, assignment)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error
