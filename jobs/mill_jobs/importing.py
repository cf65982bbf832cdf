"""Labels that were made elsewhere, as the records of a run: from there on everything works as if labelled here."""

from pathlib import Path

import structlog

from mill_jobs.config import RunConfig
from mill_jobs.final import file_sha256
from mill_jobs.recipes.cotpl.evidence import EVIDENCE
from mill_jobs.recipes.cotpl.legacy import LegacyImage, open_shards, read_shards, shard_files
from mill_jobs.run import read_dataset
from mill_shared.errors import ConfigError
from mill_shared.keys import RunKeys
from mill_shared.plan import ImageRow, LabelPass, build_plan, compare_identity, digest_of, read_images, write_plan
from mill_shared.records import ChunkMeta, ImageRecord, encode_chunk
from mill_shared.storage import open_store

log = structlog.get_logger()

NAMED_IN_ERRORS = 5


def import_cotpl(config: RunConfig, folder: Path, *, skip_broken: bool = False) -> tuple[int, int]:
    """Make a run of the shard JSONs of the original CoT-PL scripts.

    Args:
        config: the run file, without recipe.label. Its dataset names the images.
        folder: the shard files; they are merged in the order of the numbers in their names.
        skip_broken: leave out files that cannot be read.

    Returns:
        Images imported; images of the dataset that the shards lack, which become `failed` records.

    Raises:
        ConfigError: recipe.label is set, a file is no shard, or it has images that the dataset lacks.
    """
    if config.recipe.label is not None:
        raise ConfigError("recipe.label is set, but the labels are imported; leave it out of the run file")
    shards = open_shards(shard_files(folder), skip_broken=skip_broken)
    for path, why in shards.broken:
        log.warning("shard left out", file=str(path), why=why)
    for image_id, before, after in shards.replaced:
        log.warning("image is in two shards; the later one counts", image=image_id, first=str(before), later=str(after))
    images = read_dataset(config)
    unknown = sorted(set(shards.image_ids) - {image.image_id for image in images})
    if unknown:
        named = ", ".join(str(image_id) for image_id in unknown[:NAMED_IN_ERRORS])
        raise ConfigError(f"{folder}: {len(unknown)} images are not in the dataset, e.g. {named}; correct dataset")
    content = {"import": digest_of([[path.name, file_sha256(path)] for path in shards.files])}
    identity = config.identity()
    store = open_store(config.store, config.storage)
    plan = build_plan(
        run=config.run, recipe=config.recipe.name, identity=identity, content=content,
        chunk_size=config.sharding.chunk_size, images=images,
    )  # fmt: skip
    plan = write_plan(store, plan, images)
    compare_identity(plan, identity, content)
    found = {image.image_id: image for image in read_shards(shards)}
    table = dict(read_images(store, plan))
    rows = LabelPass(0, range(plan.images), plan.chunk_size)
    for chunk in range(rows.chunks):
        records = [_record(row, table[row], found.get(table[row].image_id)) for row in rows.chunk_rows(chunk)]
        meta = ChunkMeta(label_digest=plan.label_digest, pass_index=0, chunk=chunk)
        store.put_new(RunKeys(plan.run).chunk(0, chunk), encode_chunk(records, meta, EVIDENCE))
    return len(found), plan.images - len(found)


def _record(row: int, image: ImageRow, labels: LegacyImage | None) -> ImageRecord:
    if labels is None:
        return ImageRecord(
            row=row, image_id=image.image_id, key=image.key, status="failed", reason="not_in_shards",
            detail="no shard file has an entry of this image",
        )  # fmt: skip
    return ImageRecord(
        row=row, image_id=image.image_id, key=image.key, status="ok" if labels.regions else "empty",
        regions=labels.regions,
    )  # fmt: skip
