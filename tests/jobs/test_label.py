"""The label loop against simulated stores: what ends up committed, what is tried again, what stops the process."""

from collections.abc import Sequence

import pytest

from mill_jobs.config import RunConfig
from mill_jobs.label import LabelResult, LabelWorker, Shard, map_to_original
from mill_jobs.recipes.base import Sample
from mill_shared.errors import ConfigError, CoverageError, DeviceMemoryError, ImageError, OutsideError
from mill_shared.heartbeat import Heartbeat, read_heartbeat
from mill_shared.keys import RunKeys
from mill_shared.plan import LabelPass, RunPlan
from mill_shared.records import ImageRecord, decode_chunk
from simulation import MemoryStore, StubLabeller, image_store, make_plan, png, run_config, stub_record

KEYS = RunKeys("sim")


def label(
    store: MemoryStore, images: MemoryStore, plan: RunPlan, labeller: StubLabeller | None = None, *,
    shard: str = "0/1", config: RunConfig | None = None, one_by_one: bool = False, repair: bool = False,
) -> LabelResult:  # fmt: skip
    return LabelWorker(
        config or run_config(), plan, LabelPass(0, range(plan.images), plan.chunk_size), Shard.parse(shard),
        store=store, images=images, make_labeller=lambda: labeller or StubLabeller(), one_by_one=one_by_one,
        repair=repair,
    ).run()  # fmt: skip


def records(store: MemoryStore) -> list[ImageRecord]:
    return [
        record
        for key in sorted(store.objects)
        if key.startswith(KEYS.chunks(0))
        for record in decode_chunk(store.objects[key])
    ]


def chunk_bytes(store: MemoryStore) -> dict[str, bytes]:
    return {key: data for key, data in store.objects.items() if key.startswith(KEYS.chunks(0))}


def test_every_image_gets_one_record_and_a_second_start_does_nothing() -> None:
    store, images = MemoryStore(), image_store(10)
    plan = make_plan(store, images)
    assert label(store, images, plan) == LabelResult(committed=3, images=10)
    assert [record.row for record in records(store)] == list(range(10))
    models = StubLabeller()
    assert label(store, images, plan, models) == LabelResult(0, 0)
    assert models.batches == [], "nothing left means that no model works"


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_any_number_of_shards_commits_the_same_bytes(shards: int) -> None:
    images = image_store(30)
    one, many = MemoryStore(), MemoryStore()
    label(one, images, make_plan(one, images))
    plan = make_plan(many, images)
    for shard in reversed(range(shards)):
        label(many, images, plan, shard=f"{shard}/{shards}")
    assert chunk_bytes(one) == chunk_bytes(many)


def test_images_that_cannot_be_read_become_failed_records_with_a_reason() -> None:
    images = image_store(6)
    images.objects |= {"001.png": b"", "002.png": b"hello, I am text", "004.png": png()[:60]}
    store = MemoryStore()
    plan = make_plan(store, images)
    del images.objects["003.png"]
    label(store, images, plan)
    assert [(r.key, r.status, r.reason) for r in records(store)] == [
        ("000.png", "ok", None),
        ("001.png", "failed", "empty_file"),
        ("002.png", "failed", "not_an_image"),
        ("003.png", "failed", "missing"),
        ("004.png", "failed", "truncated"),
        ("005.png", "ok", None),
    ]


def test_a_labeller_that_fails_on_one_image_loses_that_image_alone() -> None:
    def refuse_2(samples: Sequence[Sample]) -> None:
        if any(sample.key == "002.png" for sample in samples):
            raise ValueError("boom")

    store, images = MemoryStore(), image_store(4)
    label(store, images, make_plan(store, images), StubLabeller(refuse_2))
    assert [(r.status, r.reason) for r in records(store)] == [
        ("ok", None), ("ok", None), ("failed", "model_error"), ("ok", None)
    ]  # fmt: skip
    assert records(store)[2].detail == "ValueError: boom"


def test_an_image_error_of_the_recipe_keeps_its_reason() -> None:
    def refuse_1(samples: Sequence[Sample]) -> None:
        if any(sample.key == "001.png" for sample in samples):
            raise ImageError("answer", "unusable after 2 tries")

    store, images = MemoryStore(), image_store(3)
    label(store, images, make_plan(store, images), StubLabeller(refuse_1))
    assert [r.reason for r in records(store)] == [None, "answer", None]


def test_what_lies_outside_never_becomes_a_record() -> None:
    def lost(samples: Sequence[Sample]) -> None:
        raise OutsideError("the model server is gone")

    store, images = MemoryStore(), image_store(4)
    with pytest.raises(OutsideError, match="the model server is gone"):
        label(store, images, make_plan(store, images), StubLabeller(lost))
    assert chunk_bytes(store) == {}


def test_what_lies_outside_is_waited_out() -> None:
    tries = []

    def back_at_third(samples: Sequence[Sample]) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OutsideError("connection refused")

    store, images = MemoryStore(), image_store(2)
    label(
        store,
        images,
        make_plan(store, images),
        StubLabeller(back_at_third),
        config=run_config(limits={"outside_wait_s": 60}),
    )
    assert [r.status for r in records(store)] == ["ok", "ok"]


def test_failures_in_a_row_end_the_process_without_a_commit() -> None:
    def broken(samples: Sequence[Sample]) -> None:
        raise RuntimeError("unspecified launch failure")

    store, images = MemoryStore(), image_store(8)
    with pytest.raises(OutsideError, match=r"3 images in a row failed, the last 002\.png"):
        label(
            store, images, make_plan(store, images), StubLabeller(broken),
            config=run_config(limits={"failures_in_a_row": 3, "outside_wait_s": 0, "max_failed": 1.0}),
        )  # fmt: skip
    assert chunk_bytes(store) == {}


def test_unreadable_images_in_a_row_are_the_images_fault() -> None:
    images = MemoryStore({f"{index}.png": b"" for index in range(40)})
    store = MemoryStore()
    label(
        store, images, make_plan(store, images), config=run_config(limits={"failures_in_a_row": 3, "max_failed": 1.0})
    )
    assert {r.reason for r in records(store)} == {"empty_file"}


def test_labelling_stops_when_more_failed_than_the_run_may_lose() -> None:
    images = MemoryStore({f"{index}.png": b"" for index in range(300)})
    store = MemoryStore()
    with pytest.raises(CoverageError, match=r"104 of this shard's images failed \(104 empty_file\).*max_failed 0\.01"):
        label(store, images, make_plan(store, images, chunk_size=8), config=run_config(limits={"max_failed": 0.01}))
    assert len(records(store)) == 104, "what was found out is kept"


def test_out_of_memory_starts_the_chunk_again_with_half_the_batch() -> None:
    labeller = StubLabeller()
    full = True

    def once(samples: Sequence[Sample]) -> None:
        nonlocal full
        if full:
            full = False
            raise DeviceMemoryError("CUDA out of memory")

    labeller.before, labeller.halvings_left = once, 3
    store, images = MemoryStore(), image_store(4)
    label(store, images, make_plan(store, images), labeller)
    assert [r.status for r in records(store)] == ["ok"] * 4
    assert b'"batch_halvings":1' in store.objects[KEYS.chunk(0, 0)], "what happened is recorded"


def test_an_image_that_fits_nowhere_fails_alone() -> None:
    def too_big(samples: Sequence[Sample]) -> None:
        if any(sample.key == "001.png" for sample in samples):
            raise DeviceMemoryError("CUDA out of memory")

    store, images = MemoryStore(), image_store(3)
    label(store, images, make_plan(store, images), StubLabeller(too_big))
    assert [r.reason for r in records(store)] == [None, "out_of_memory", None]


def dead_worker(store: MemoryStore, plan: RunPlan, **changes: object) -> None:
    import msgspec

    beat = Heartbeat(
        pass_index=0, shard=0, shards=1, state="working", host="h", pid=1, started_at=0, updated_at=0, chunks=3,
        chunks_done=0, images=plan.images, images_done=0, images_labelled=0, failed={},
    )  # fmt: skip
    store.put(KEYS.heartbeat(0, 0, 1), msgspec.json.encode(msgspec.structs.replace(beat, **changes)))


def test_the_chunk_that_was_in_hand_when_a_worker_died_comes_last() -> None:
    store, images = MemoryStore(), image_store(12)
    plan = make_plan(store, images)
    dead_worker(store, plan, chunk_in_hand=0)
    labeller = StubLabeller()
    label(store, images, plan, labeller)
    assert [batch[0] for batch in labeller.batches] == ["004.png", "008.png", "000.png"]


def test_one_by_one_isolates_the_image_that_kills_the_process() -> None:
    store, images = MemoryStore(), image_store(4)
    plan = make_plan(store, images)
    dead_worker(store, plan, chunk_in_hand=0, row_in_hand=2, suspects={2: 1})
    labeller = StubLabeller()
    label(store, images, plan, labeller, one_by_one=True)
    assert [(r.row, r.reason) for r in records(store)] == [(0, None), (1, None), (2, "killed_the_process"), (3, None)]
    assert all(len(batch) == 1 for batch in labeller.batches)


def test_one_death_alone_blames_no_image() -> None:
    store, images = MemoryStore(), image_store(4)
    plan = make_plan(store, images)
    dead_worker(store, plan, chunk_in_hand=0, row_in_hand=2)
    label(store, images, plan, one_by_one=True)
    assert [r.status for r in records(store)] == ["ok"] * 4


def test_without_one_by_one_no_image_is_blamed_for_a_death() -> None:
    store, images = MemoryStore(), image_store(4)
    plan = make_plan(store, images)
    dead_worker(store, plan, chunk_in_hand=0, row_in_hand=2, suspects={2: 1})
    label(store, images, plan)
    assert [r.status for r in records(store)] == ["ok"] * 4


def test_repair_overwrites_exactly_the_damaged_chunks() -> None:
    store, images = MemoryStore(), image_store(12)
    plan = make_plan(store, images)
    label(store, images, plan)
    whole = chunk_bytes(store)
    damaged = bytearray(whole[KEYS.chunk(0, 1)])
    damaged[len(damaged) // 2] ^= 1
    store.objects[KEYS.chunk(0, 1)] = bytes(damaged)
    labeller = StubLabeller()
    assert label(store, images, plan, labeller) == LabelResult(0, 0), "without --repair it counts as done"
    assert label(store, images, plan, labeller, repair=True) == LabelResult(1, 4)
    assert chunk_bytes(store) == whole
    assert labeller.batches == [["004.png", "005.png", "006.png", "007.png"]]


def test_the_heartbeat_says_how_far_the_worker_is_and_how_it_ended() -> None:
    store, images = MemoryStore(), image_store(10)
    images.objects["003.png"] = b""
    plan = make_plan(store, images)
    label(store, images, plan)
    beat = read_heartbeat(store, KEYS, 0, 0, 1)
    assert beat is not None
    assert (beat.state, beat.chunks_done, beat.images_done, beat.images_labelled) == ("done", 3, 10, 10)
    assert beat.failed == {"empty_file": 1}
    assert beat.chunk_in_hand is None


def test_a_config_error_stops_at_once_only_while_the_run_has_no_chunk() -> None:
    def forbidden(samples: Sequence[Sample]) -> None:
        raise ConfigError("403 on bucket b")

    store, images = MemoryStore(), image_store(8)
    plan = make_plan(store, images)
    with pytest.raises(ConfigError, match="403"):
        label(store, images, plan, StubLabeller(forbidden))
    label(store, images, plan, shard="0/2")
    with pytest.raises(OutsideError, match="worked before in this run: 403"):
        label(store, images, plan, StubLabeller(forbidden), shard="1/2")


def test_boxes_are_mapped_back_to_the_original_picture() -> None:
    import numpy as np

    sample = Sample(0, 1, "a.png", np.zeros((50, 100, 3), np.uint8), width=1001, height=500, scale=0.1)
    region = map_to_original(stub_record(sample), sample).regions[0]
    assert region.box_xyxy == (0.0, 0.0, 1001.0, 500.0)


@pytest.mark.parametrize("text", ["3", "3/3", "-1/2", "a/b", "1/2/3", "0/0"])
def test_a_shard_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected s/S"):
        Shard.parse(text)


def test_shards_share_the_chunks() -> None:
    found = sorted(chunk for shard in range(5) for chunk in Shard(shard, 5).chunks(23))
    assert found == list(range(23))
