"""The label loop: one shard's chunks, each fetched, labelled and committed once.

What lies in an image becomes a `failed` record. What lies outside never becomes a record: it is waited out, then the
process ends for a retry and loses the chunk in hand at most.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, TypeVar

import structlog

from mill_jobs.config import RunConfig
from mill_jobs.progress import HeartbeatWriter, new_heartbeat
from mill_jobs.recipes.base import Labeller, Outcome, Sample
from mill_shared.errors import (
    AlreadyExists,
    ConfigError,
    CorruptError,
    CoverageError,
    DeviceMemoryError,
    ImageError,
    KeyMissing,
    MillError,
    OutsideError,
)
from mill_shared.heartbeat import WAITING, WORKING, read_heartbeat
from mill_shared.keys import RunKeys
from mill_shared.patience import wait_out
from mill_shared.pictures import Picture, decode_picture
from mill_shared.plan import ImageRow, LabelPass, RunPlan, check_chunk_of, read_images
from mill_shared.records import ChunkMeta, ImageRecord, encode_chunk
from mill_shared.storage import Store

log = structlog.get_logger()
T = TypeVar("T")

FETCHES_IN_FLIGHT = 16
FAILED_BEFORE_STOP = 100
"""Fewer failed images than this never stop a worker early, whatever share they are."""
DEATHS_BEFORE_BLAME = 2
"""One death may be a lost node."""
MODEL_FAILURE = "model_error"
NOT_IN_THE_BYTES = frozenset({MODEL_FAILURE, "missing", "out_of_memory"})
"""Reasons that the image's bytes do not prove; many in a row point to a cause outside the images."""


@dataclass(frozen=True)
class Shard:
    """Shard s of S works on the chunks k with k mod S = s."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `s/S`, e.g. `3/12`.

        Raises:
            ValueError: not of that form, or s is not below S.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(f"shard {text}: expected s/S with 0 <= s < S, e.g. 3/12")
        return cls(int(found[1]), int(found[2]))

    def chunks(self, total: int) -> list[int]:
        """Return the chunks of this shard, ascending."""
        return list(range(self.index, total, self.count))


@dataclass(frozen=True)
class LabelResult:
    """What one worker did."""

    committed: int
    """Chunks that this worker committed."""
    images: int
    """Images in them."""


@dataclass
class _Batch:
    """A chunk on its way: its rows and, image by image, the picture or why there is none."""

    chunk: int
    images: list[tuple[int, ImageRow]]
    pictures: "list[Future[Picture | ImageError]]"


def map_to_original(record: ImageRecord, sample: Sample) -> ImageRecord:
    """Return the record with boxes in pixels of the upright original, clipped to it. Masks keep the labelled frame."""
    height, width = sample.image_rgb.shape[:2]
    if (width, height) == (sample.width, sample.height):
        return record
    fx, fy = sample.width / width, sample.height / height

    def scale(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        x0, y0, x1, y1 = box
        return (x0 * fx, y0 * fy, min(x1 * fx, sample.width), min(y1 * fy, sample.height))

    return replace(
        record,
        regions=tuple(replace(region, box_xyxy=scale(region.box_xyxy)) for region in record.regions),
        dropped=tuple(replace(item, box_xyxy=scale(item.box_xyxy)) for item in record.dropped),
    )


def failed_record(row: int, image: ImageRow, error: ImageError, picture: Picture | None = None) -> ImageRecord:
    """Return the record of an image that cannot be labelled."""
    return ImageRecord(
        row=row,
        image_id=image.image_id,
        key=image.key,
        status="failed",
        width=picture.width if picture else None,
        height=picture.height if picture else None,
        reason=error.reason,
        detail=" ".join(str(error).split())[:500],
    )


class LabelWorker:
    """Works off one shard of one pass."""

    def __init__(
        self, config: RunConfig, plan: RunPlan, label_pass: LabelPass, shard: Shard, *, store: Store, images: Store,
        make_labeller: Callable[[], Labeller], one_by_one: bool = False, repair: bool = False,
        parent: int | None = None, first: int | None = None,
    ) -> None:  # fmt: skip
        self._config, self._plan, self._pass, self._shard = config, plan, label_pass, shard
        self._store, self._images, self._make_labeller = store, images, make_labeller
        self._one_by_one, self._repair, self._parent = one_by_one, repair, parent
        self._first = first
        self._keys = RunKeys(plan.run)
        self._failures_in_a_row = 0
        self._halvings = 0
        self._heart: HeartbeatWriter | None = None
        self._committed = 0
        self._has_chunks = label_pass.index > 0
        self._failed: dict[str, int] = {}

    def run(self) -> LabelResult:
        """Label what is missing and commit it.

        Raises:
            OutsideError: something outside stayed unavailable, or too many images failed in a row.
            CoverageError: more images failed than the run may lose.
            ConfigError: wrong for every worker, while nothing is committed.
        """
        mine = self._shard.chunks(self._pass.chunks)
        if self._first is not None:
            mine = [chunk for chunk in mine if chunk * self._plan.chunk_size < self._first]
        done = self._done(mine)
        overwrite = self._damaged(done) if self._repair else frozenset()
        todo = [chunk for chunk in mine if chunk not in done or chunk in overwrite]
        sizes = {chunk: len(self._pass.chunk_rows(chunk)) for chunk in mine}
        log.info("shard", chunks=len(mine), done=len(mine) - len(todo), todo=len(todo), damaged=len(overwrite))
        if not todo:
            return LabelResult(0, 0)
        last = read_heartbeat(self._store, self._keys, self._pass.index, self._shard.index, self._shard.count)
        suspects: dict[int, int] = {}
        if last is not None:
            suspects = dict(last.suspects)
            if last.state == WORKING and last.row_in_hand is not None:
                suspects[last.row_in_hand] = suspects.get(last.row_in_hand, 0) + 1
            if last.chunk_in_hand in todo and last.state != "done":
                log.warning("an earlier worker ended with this chunk in hand; it comes last", chunk=last.chunk_in_hand)
                todo.sort(key=lambda chunk: chunk == last.chunk_in_hand)
        deadly = frozenset(row for row, deaths in suspects.items() if deaths >= DEATHS_BEFORE_BLAME)
        first = new_heartbeat(
            pass_index=self._pass.index, shard=self._shard.index, shards=self._shard.count, chunks=len(mine),
            images=sum(sizes.values()),
        )  # fmt: skip
        limits = self._config.limits
        labelled = 0
        with HeartbeatWriter(
            self._store, self._keys, first, interval_s=limits.heartbeat_s, stalled_after_s=limits.stalled_after_s,
            parent=self._parent,
        ) as heart:  # fmt: skip
            self._heart = heart
            chunks_done = len(mine) - len(todo)
            images_done = sum(sizes.values()) - sum(sizes[chunk] for chunk in todo)
            heart.update(chunks_done=chunks_done, images_done=images_done, suspects=suspects, write=True)
            try:
                labeller = self._wait_out(self._make_labeller, "the models")
                heart.update(progressed=True)
                for batch in self._fetched(todo, overwrite):
                    if batch is not None:
                        records = self._label(labeller, batch, deadly)
                        labelled += len(records)
                        self._commit(batch.chunk, records, labeller, overwrite=batch.chunk in overwrite)
                        images_done += len(records)
                        self._check_failed(records)
                    chunks_done += 1
                    heart.update(
                        progressed=True, chunks_done=chunks_done, images_done=images_done, images_labelled=labelled,
                        failed=dict(self._failed), chunk_in_hand=None, row_in_hand=None,
                    )  # fmt: skip
            except ConfigError as error:
                if self._committed or self._has_chunks:
                    raise OutsideError(f"worked before in this run: {error}") from error
                raise
        return LabelResult(self._committed, labelled)

    def _done(self, mine: Sequence[int]) -> frozenset[int]:
        listed = self._wait_out(lambda: list(self._store.list(self._keys.chunks(self._pass.index))), "the store")
        present = {entry.key for entry in listed}
        self._has_chunks = self._has_chunks or bool(present)
        return frozenset(chunk for chunk in mine if self._keys.chunk(self._pass.index, chunk) in present)

    def _damaged(self, done: frozenset[int]) -> frozenset[int]:
        found = set()
        for chunk in sorted(done):
            key = self._keys.chunk(self._pass.index, chunk)
            try:
                check_chunk_of(self._store.get(key), self._plan, self._pass.index, chunk)
            except (CorruptError, KeyMissing) as error:
                log.warning("damaged chunk, labelling it again", chunk=chunk, key=key, error=str(error))
                found.add(chunk)
        return frozenset(found)

    def _fetched(self, todo: Sequence[int], overwrite: frozenset[int]) -> "Iterator[_Batch | None]":
        """Yield each chunk with its pictures on the way, one ahead; None for one that another worker committed."""
        rows = {row for chunk in todo for row in self._pass.chunk_rows(chunk)}
        table = dict(read_images(self._store, self._plan, rows))
        with ThreadPoolExecutor(FETCHES_IN_FLIGHT, thread_name_prefix="fetch") as pool:
            ahead: _Batch | None = None
            try:
                for position, chunk in enumerate(todo):
                    batch = ahead or self._start_fetch(pool, chunk, table)
                    ahead = None
                    self._beat(chunk_in_hand=chunk, write=True)
                    key = self._keys.chunk(self._pass.index, chunk)
                    if chunk not in overwrite and self._wait_out(partial(self._store.exists, key), "the store"):
                        log.info("chunk committed by another worker", chunk=chunk)
                        _cancel(batch)
                        yield None
                        continue
                    if position + 1 < len(todo):
                        ahead = self._start_fetch(pool, todo[position + 1], table)
                    yield batch
            finally:
                if ahead is not None:
                    _cancel(ahead)

    def _start_fetch(self, pool: ThreadPoolExecutor, chunk: int, table: dict[int, ImageRow]) -> _Batch:
        images = [(row, table[row]) for row in self._pass.chunk_rows(chunk)]
        return _Batch(chunk, images, [pool.submit(self._fetch, image) for _, image in images])

    def _fetch(self, image: ImageRow) -> Picture | ImageError:
        dataset = self._config.dataset
        try:
            data = self._images.get(image.key)
            return decode_picture(data, max_side=dataset.max_side, max_pixels=dataset.max_pixels)
        except KeyMissing:
            return ImageError("missing", f"{image.key} is not in {self._images.url}")
        except ImageError as error:
            return error

    def _picture(self, future: "Future[Picture | ImageError]", image: ImageRow) -> Picture | ImageError:
        try:
            return future.result()
        except OutsideError:
            return self._wait_out(lambda: self._fetch(image), f"the images in {self._images.url}")

    def _label(self, labeller: Labeller, batch: _Batch, deadly: frozenset[int]) -> list[ImageRecord]:
        records: list[ImageRecord] = []
        samples: list[Sample] = []
        for (row, image), future in zip(batch.images, batch.pictures, strict=True):
            picture = self._picture(future, image)
            if isinstance(picture, ImageError):
                records.append(self._failed_image(failed_record(row, image, picture)))
            elif self._one_by_one and row in deadly:
                error = ImageError(
                    "killed_the_process", f"{DEATHS_BEFORE_BLAME} workers died with this image alone in hand"
                )
                records.append(failed_record(row, image, error, picture))
            else:
                samples.append(
                    Sample(
                        row, image.image_id, image.key, picture.image_rgb, picture.width, picture.height, picture.scale
                    )
                )
        if self._one_by_one:
            for sample in samples:
                self._beat(row_in_hand=sample.row, write=True)
                records += self._label_samples(labeller, [sample])
            self._beat(row_in_hand=None)
        elif samples:
            records += self._label_samples(labeller, samples)
        return records

    def _label_samples(self, labeller: Labeller, samples: Sequence[Sample]) -> list[ImageRecord]:
        try:
            outcomes = self._wait_out(lambda: labeller.label(samples), "the models")
            assert len(outcomes) == len(samples), "a labeller returns one outcome a sample"
        except DeviceMemoryError as error:
            if labeller.halve_batch():
                self._halvings += 1
                log.warning("out of device memory; the chunk starts again with half the batch", error=str(error))
                return self._label_samples(labeller, samples)
            fault = ImageError("out_of_memory", f"does not fit into device memory even alone: {error}")
        except ImageError as error:
            fault = error
        except MillError:
            raise
        except Exception as error:
            if len(samples) == 1:
                log.exception("labelling failed", row=samples[0].row, image=samples[0].key)
            fault = ImageError(MODEL_FAILURE, f"{type(error).__name__}: {error}")
        else:
            self._failures_in_a_row = 0
            self._beat(progressed=True)
            return [self._stored(outcome, sample) for outcome, sample in zip(outcomes, samples, strict=True)]
        if len(samples) > 1:
            log.warning("a batch failed; working image by image", images=len(samples), error=str(fault))
            return [record for sample in samples for record in self._label_samples(labeller, [sample])]
        return [self._failed_image(_failed_sample(samples[0], fault))]

    def _failed_image(self, record: ImageRecord) -> ImageRecord:
        log.warning("image failed", row=record.row, image=record.key, reason=record.reason, detail=record.detail)
        self._failures_in_a_row = self._failures_in_a_row + 1 if record.reason in NOT_IN_THE_BYTES else 0
        if self._failures_in_a_row >= self._config.limits.failures_in_a_row:
            raise OutsideError(
                f"{self._failures_in_a_row} images in a row failed, the last {record.key}: {record.detail}; "
                "nothing of this chunk is committed"
            )
        return record

    def _stored(self, outcome: Outcome, sample: Sample) -> ImageRecord:
        files = dict(outcome.record.files)
        for name, data in outcome.files.items():
            files[name] = hashlib.sha256(data).hexdigest()
            self._wait_out(partial(self._store.put_new, self._keys.blob(files[name]), data), "the store")
        return replace(map_to_original(outcome.record, sample), files=files)

    def _commit(self, chunk: int, records: Sequence[ImageRecord], labeller: Labeller, *, overwrite: bool) -> None:
        meta = ChunkMeta(
            label_digest=self._plan.label_digest,
            pass_index=self._pass.index,
            chunk=chunk,
            batch_halvings=self._halvings,
        )
        data = encode_chunk(records, meta, labeller.evidence)
        key = self._keys.chunk(self._pass.index, chunk)
        write = self._store.put if overwrite else self._store.put_new
        try:
            self._wait_out(partial(write, key, data), "the store")
        except AlreadyExists:
            log.info("chunk committed by another worker", chunk=chunk)
            return
        self._committed += 1
        regions = sum(len(record.regions) for record in records)
        log.info("chunk committed", chunk=chunk, images=len(records), regions=regions, size_bytes=len(data))

    def _check_failed(self, records: Sequence[ImageRecord]) -> None:
        for record in records:
            if record.reason is not None:
                self._failed[record.reason] = self._failed.get(record.reason, 0) + 1
        failed, limit = sum(self._failed.values()), self._config.limits.max_failed
        if failed > max(limit * self._plan.images, FAILED_BEFORE_STOP):
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self._failed.items()))
            raise CoverageError(
                f"{failed} of this shard's images failed ({reasons}), more than max_failed {limit:g} allows the whole "
                "run; mend the cause or raise limits.max_failed, then label again"
            )

    def _wait_out(self, action: Callable[[], T], what: str) -> T:
        """Call until it no longer says that something outside is unavailable, for at most `limits.outside_wait_s`."""

        found = wait_out(
            action, what, limit_s=self._config.limits.outside_wait_s, on_wait=lambda: self._beat(state=WAITING)
        )
        if self._heart is not None and self._heart.beat.state == WAITING:
            self._beat(state=WORKING)
        return found

    def _beat(self, *, progressed: bool = False, write: bool = False, **changes: object) -> None:
        if self._heart is not None:
            self._heart.update(progressed=progressed, write=write, **changes)


def _cancel(batch: _Batch) -> None:
    for future in batch.pictures:
        future.cancel()


def _failed_sample(sample: Sample, error: ImageError) -> ImageRecord:
    image = ImageRow(sample.image_id, sample.key, 0, "")
    return replace(failed_record(sample.row, image, error), width=sample.width, height=sample.height)
