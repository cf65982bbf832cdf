"""Labels that were made elsewhere, as the records of a run: from there on everything works as if labelled here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import pyarrow as pa
import structlog

from mill_jobs.config import RunConfig
from mill_jobs.final import file_sha256
from mill_jobs.recipes.cotpl.config import CotplConfig
from mill_jobs.recipes.cotpl.evidence import EVIDENCE as COTPL_EVIDENCE
from mill_jobs.recipes.cotpl.legacy import open_shards, read_shards, shard_files
from mill_jobs.recipes.vlplm.config import VlplmConfig
from mill_jobs.recipes.vlplm.evidence import EVIDENCE as VLPLM_EVIDENCE
from mill_jobs.recipes.vlplm.legacy import read_scores, score_files
from mill_jobs.run import read_dataset
from mill_shared.errors import ConfigError
from mill_shared.keys import RunKeys
from mill_shared.plan import ImageRow, LabelPass, build_plan, compare_identity, digest_of, read_images, write_plan
from mill_shared.records import ChunkMeta, ImageRecord, Region, encode_chunk
from mill_shared.storage import open_store

log = structlog.get_logger()

NAMED_IN_ERRORS = 5


def import_labels(config: RunConfig, folder: Path, *, skip_broken: bool = False) -> tuple[int, int]:
    """Make a run of the files of a method's original scripts.

    Args:
        config: the run file, without recipe.label. Its recipe says which files, its dataset names the images.
        folder: the files: shard JSONs of CoT-PL, merged in the order of the numbers in their names, or stage-1 scores
            of VL-PLM.
        skip_broken: leave out files that cannot be read.

    Returns:
        Images imported; images of the dataset that the files lack, which become `failed` records.

    Raises:
        ConfigError: recipe.label is set, a file is none of the method's, or it has images that the dataset lacks.
    """
    if config.recipe.label is not None:
        raise ConfigError("recipe.label is set, but the labels are imported; leave it out of the run file")
    match config.recipe:
        case CotplConfig():
            return _import(config, folder, _cotpl_files(folder, skip_broken), COTPL_EVIDENCE)
        case VlplmConfig():
            return _import(config, folder, _vlplm_files(folder, skip_broken), VLPLM_EVIDENCE)
        case _:
            assert_never(config.recipe)


@dataclass(frozen=True)
class _Imported:
    """What is imported."""

    files: tuple[Path, ...]
    """Those that were read."""
    image_ids: frozenset[int]
    regions: Callable[[int], tuple[Region, ...] | None]
    """The regions of an image; None where the files lack it."""


def _cotpl_files(folder: Path, skip_broken: bool) -> _Imported:
    shards = open_shards(shard_files(folder), skip_broken=skip_broken)
    for path, why in shards.broken:
        log.warning("shard left out", file=str(path), why=why)
    for image_id, before, after in shards.replaced:
        log.warning("image is in two shards; the later one counts", image=image_id, first=str(before), later=str(after))
    regions = {image.image_id: image.regions for image in read_shards(shards)}
    return _Imported(shards.files, frozenset(regions), regions.get)


def _vlplm_files(folder: Path, skip_broken: bool) -> _Imported:
    scores = read_scores(score_files(folder), skip_broken=skip_broken)
    for path, why in scores.broken:
        log.warning("score file left out", file=str(path), why=why)
    return _Imported(scores.files, frozenset(scores.places), scores.regions)


def _import(config: RunConfig, folder: Path, found: _Imported, evidence: pa.StructType) -> tuple[int, int]:
    images = read_dataset(config)
    unknown = sorted(found.image_ids - {image.image_id for image in images})
    if unknown:
        named = ", ".join(str(image_id) for image_id in unknown[:NAMED_IN_ERRORS])
        raise ConfigError(f"{folder}: {len(unknown)} images are not in the dataset, e.g. {named}; correct dataset")
    content = {"import": digest_of([[path.name, file_sha256(path)] for path in found.files])}
    identity = config.identity()
    store = open_store(config.store, config.storage)
    plan = build_plan(
        run=config.run, recipe=config.recipe.name, identity=identity, content=content,
        chunk_size=config.sharding.chunk_size, images=images,
    )  # fmt: skip
    plan = write_plan(store, plan, images)
    compare_identity(plan, identity, content)
    table = dict(read_images(store, plan))
    rows = LabelPass(0, range(plan.images), plan.chunk_size)
    for chunk in range(rows.chunks):
        records = [_record(row, table[row], found.regions(table[row].image_id)) for row in rows.chunk_rows(chunk)]
        meta = ChunkMeta(label_digest=plan.label_digest, pass_index=0, chunk=chunk)
        store.put_new(RunKeys(plan.run).chunk(0, chunk), encode_chunk(records, meta, evidence))
    return len(found.image_ids), plan.images - len(found.image_ids)


def _record(row: int, image: ImageRow, regions: tuple[Region, ...] | None) -> ImageRecord:
    if regions is None:
        return ImageRecord(
            row=row, image_id=image.image_id, key=image.key, status="failed", reason="not_in_shards",
            detail="no shard file has an entry of this image",
        )  # fmt: skip
    return ImageRecord(
        row=row, image_id=image.image_id, key=image.key, status="ok" if regions else "empty", regions=regions
    )
