"""The chunk protocol as a model: workers on one simulated store, crashing and interleaving wherever hypothesis likes.

At every operation of a worker on the store one of these may happen: the process dies before or after the operation
took effect, the answer is lost, or another worker runs (itself interrupted in the same ways) in between. Whatever
happened, once a last worker has run in peace every image has exactly one record and the chunks have the same bytes.
"""

from typing import Literal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mill_jobs.label import LabelWorker, Shard
from mill_shared.errors import MillError, OutsideError
from mill_shared.keys import RunKeys
from mill_shared.plan import LabelPass, RunPlan
from mill_shared.records import decode_chunk
from simulation import Crash, MemoryStore, StubLabeller, image_store, make_plan, run_config

IMAGES = image_store(11)
Event = Literal["crash_before", "crash_after", "lost_answer", "outage", "other_worker"]
SCHEDULES = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.sampled_from(["crash_before", "crash_after", "lost_answer", "outage", "other_worker"]),
        st.tuples(st.integers(0, 3), st.integers(1, 4)),
    ),
    max_size=12,
)


class Simulation:
    """Runs workers under a schedule: after `gap` operations comes the next event."""

    def __init__(self, schedule: list[tuple[int, Event, tuple[int, int]]]) -> None:
        self.store = MemoryStore()
        self.plan: RunPlan = make_plan(self.store, IMAGES, chunk_size=2)
        self.schedule = list(schedule)
        self.depth = 0
        self.gap = self.schedule[0][0] if self.schedule else -1
        self.store.hook = self.hook

    def hook(self, operation: str, key: str, phase: str) -> None:
        if not self.schedule:
            return
        self.gap -= 1
        if self.gap >= 0:
            return
        _, event, (shard, more) = self.schedule.pop(0)
        self.gap = self.schedule[0][0] if self.schedule else -1
        if event == "crash_before" and phase == "before":
            raise Crash
        if event == "crash_after" and phase == "after":
            raise Crash
        if event == "lost_answer" and phase == "after":
            raise OutsideError("the answer was lost")
        if event == "outage" and phase == "before":
            raise OutsideError("connection refused")
        if event == "other_worker" and self.depth < 3:
            self.work(Shard(shard % more, more))

    def work(self, shard: Shard) -> None:
        self.depth += 1
        try:
            LabelWorker(
                run_config(), self.plan, LabelPass(0, range(self.plan.images), 2), shard, store=self.store,
                images=IMAGES, make_labeller=StubLabeller,
            ).run()  # fmt: skip
        except (Crash, MillError):
            pass
        finally:
            self.depth -= 1


def expected() -> dict[str, bytes]:
    calm = Simulation([])
    calm.work(Shard(0, 1))
    return chunks(calm.store)


def chunks(store: MemoryStore) -> dict[str, bytes]:
    return {key: data for key, data in store.objects.items() if key.startswith(RunKeys("sim").chunks(0))}


EXPECTED = expected()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=SCHEDULES, starts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=5))
def test_any_interleaving_of_commit_crash_and_retry_ends_in_the_same_bytes(
    schedule: list[tuple[int, Event, tuple[int, int]]], starts: list[tuple[int, int]]
) -> None:
    simulation = Simulation(schedule)
    for shard, more in starts:
        simulation.work(Shard(shard % more, more))
        assert chunks(simulation.store).items() <= EXPECTED.items(), (
            "a committed chunk is whole and right at any moment"
        )
    simulation.schedule = []
    simulation.work(Shard(0, 1))
    assert chunks(simulation.store) == EXPECTED
    rows = [record.row for data in chunks(simulation.store).values() for record in decode_chunk(data)]
    assert sorted(rows) == list(range(11))
