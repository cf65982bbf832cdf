"""The two `match` statements that wire the recipes to the commands."""

from typing import assert_never

from mill_jobs.config import RunConfig
from mill_jobs.recipes.base import FinalWriter, Labeller, RecordTable, Summary
from mill_jobs.recipes.cotpl.config import CotplConfig
from mill_jobs.recipes.vlplm.config import VlplmConfig
from mill_shared.coco import CocoBase
from mill_shared.errors import ConfigError


def build_labeller(config: RunConfig) -> Labeller:
    """Load the models of the run's recipe.

    Raises:
        ConfigError: weights are missing or unusable, or the labels of this run were imported.
    """
    if config.recipe.label is None:
        raise ConfigError("recipe.label is not set: the labels of this run are imported, there is nothing to label")
    match config.recipe:
        case CotplConfig(label=label):
            from mill_jobs.recipes.cotpl.label import build_labeller as build

            assert label is not None, "tested above"
            return build(label)
        case VlplmConfig(label=scoring) as recipe:
            from mill_jobs.recipes.vlplm.label import build_labeller as build_scorer

            assert scoring is not None, "tested above"
            return build_scorer(scoring, recipe.target_names)
        case _:
            assert_never(config.recipe)


def finalize_recipe(config: RunConfig, table: RecordTable, base: CocoBase | None, out: FinalWriter) -> Summary:
    """Write the files of a final with the run's recipe."""
    match config.recipe:
        case CotplConfig(finalize=settings):
            from mill_jobs.recipes.cotpl.finalize import finalize

            return finalize(settings, table, base, out)
        case VlplmConfig() as recipe:
            from mill_jobs.recipes.vlplm.finalize import finalize as finalize_scores

            return finalize_scores(recipe, table, base, out)
        case _:
            assert_never(config.recipe)
