"""What decides for a batcher, pure: its queue against a simple model, and the search for bad samples."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from asyncdp import Batcher, Runtime
from asyncdp._serving.call import CallState
from asyncdp._serving.health import Health, make_plan
from asyncdp._serving.queue import BatchQueue
from asyncdp._serving.search import Search, start_search

MAX_AGE = 10.0


@dataclass(eq=False)
class Item:
    """A sample in the queue."""

    size: float
    priority: int
    arrived: float
    ordinal: int = field(default=-1, init=False)


class QueueMachine(RuleBasedStateMachine):
    """Drives a queue with arrivals, removals, time and free places; the model is one list."""

    items = Bundle("items")

    @initialize(
        max_batch_size=st.integers(1, 5),
        max_queue=st.integers(1, 6),
        max_wait=st.sampled_from([0.0, 3.0]),
        max_cost=st.sampled_from([None, 8.0]),
        max_padding=st.sampled_from([1.0, 0.25, 0.0]),
        sized=st.booleans(),
    )
    def start(
        self,
        max_batch_size: int,
        max_queue: int,
        max_wait: float,
        max_cost: float | None,
        max_padding: float,
        sized: bool,
    ) -> None:
        self.queue: BatchQueue[Item] = BatchQueue(
            max_batch_size, max_queue, max_wait, MAX_AGE, max_cost if sized else None, max_padding, sized
        )
        self.now = 0.0
        self.waiting: list[Item] = []  # in order of arrival
        self.inside: set[Item] = set()

    @rule(target=items, size=st.integers(1, 12), priority=st.integers(0, 2))
    def add(self, size: int, priority: int) -> Item:
        item = Item(float(size), priority, self.now)
        self.queue.add(item)
        self.waiting.append(item)
        self.let_in()
        return item

    @rule(seconds=st.sampled_from([0.5, 3.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(item=consumes(items))
    def remove(self, item: Item) -> None:
        was_waiting = item in self.waiting
        assert self.queue.remove(item, self.now) is was_waiting
        assert self.queue.remove(item, self.now) is False
        if was_waiting:
            self.leave([item])

    @rule(num_free=st.integers(1, 3))
    def take(self, num_free: int) -> None:
        queued = self.queued()
        ready_at = self.queue.ready_at()
        batch = self.queue.take(self.now, num_free)
        assert bool(batch) == (ready_at is not None and ready_at <= self.now)
        if batch:
            self.check(batch, queued, num_free)
            self.leave(batch)

    @rule(target=items)
    def clear(self) -> object:
        taken = self.queue.clear()
        assert sorted(map(id, taken)) == sorted(map(id, self.waiting))
        self.waiting, self.inside = [], set()
        return multiple()

    def leave(self, items: list[Item]) -> None:
        """The model's departure: others come in for those who leave the queue."""
        self.waiting = [item for item in self.waiting if item not in items]
        self.inside -= set(items)
        self.let_in()

    def let_in(self) -> None:
        """The model's admission: one by one, the most urgent of those outside."""
        while len(self.inside) < min(self.queue.max_queue, len(self.waiting)):
            self.inside.add(self.by_urgency([item for item in self.waiting if item not in self.inside])[0])

    def by_urgency(self, items: list[Item]) -> list[Item]:
        """Those past the age cap by age, then the others by priority and age."""
        overdue = [item for item in items if item.arrived + MAX_AGE <= self.now]
        others = [item for item in items if item not in overdue]
        return overdue + sorted(others, key=lambda item: -item.priority)

    def check(self, batch: list[Item], queued: list[Item], num_free: int) -> None:
        """The batch is led by the most urgent item and is as full as limits allow."""
        queue = self.queue
        assert len(set(batch)) == len(batch)
        assert set(batch) <= set(queued)
        # Who asked for full batches gets them; else all free places get some.
        most = len(queued) if queue.max_wait else -(-len(queued) // num_free)
        limit = min(queue.max_batch_size, most)
        urgent = self.by_urgency(queued)
        assert batch[0] is urgent[0]
        if not queue.sized:
            assert batch == urgent[:limit]
            return
        assert len(batch) <= limit
        assert len(batch) == 1 or self.is_within_limits(batch)
        # A sample that padding excluded may fit again once the batch has grown; cost only rises.
        if len(batch) < limit and queue.max_padding == 1.0:
            left = [item for item in queued if item not in batch]
            assert not any(self.is_within_limits([*batch, item]) for item in left)
        if queue.max_cost is None and queue.max_padding == 1.0:
            self.check_nearest(batch, queued)

    def is_within_limits(self, batch: list[Item]) -> bool:
        """Whether cost and padding of a batch are what the queue allows."""
        total = sum(item.size for item in batch)
        padded = len(batch) * max(item.size for item in batch)
        cost = self.queue.max_cost
        return (cost is None or padded <= cost) and total >= padded * (1 - self.queue.max_padding)

    def check_nearest(self, batch: list[Item], queued: list[Item]) -> None:
        """No item was passed over for one of its own priority that is less like the leader."""
        size = batch[0].size
        for priority in {item.priority for item in queued}:
            peers = [item for item in queued if item.priority == priority]
            taken = [abs(item.size - size) for item in peers if item in batch and item is not batch[0]]
            left = [abs(item.size - size) for item in peers if item not in batch]
            assert not taken or not left or max(taken) <= min(left)

    def queued(self) -> list[Item]:
        """The model's queue, in order of arrival."""
        return [item for item in self.waiting if item in self.inside]

    @invariant()
    def counts_agree(self) -> None:
        queue = self.queue
        assert queue.num_queued + queue.num_outside == len(self.waiting)
        assert queue.num_queued == min(queue.max_queue, len(self.waiting))
        assert queue.is_full == (len(self.waiting) >= queue.max_queue)

    @invariant()
    def something_is_due(self) -> None:
        ready_at = self.queue.ready_at()
        assert (ready_at is None) == (not self.waiting)
        if ready_at is not None:
            assert ready_at <= min(item.arrived for item in self.queued()) + self.queue.max_wait


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class TestAgainstModel(QueueMachine.TestCase):  # type: ignore[name-defined, misc]
    """Whatever comes in whatever order, every item leaves once, in a batch that keeps all limits."""


def make(sizes: list[float], **options: object) -> tuple[BatchQueue[Item], list[Item]]:
    queue: BatchQueue[Item] = BatchQueue(4, 100, **options)  # type: ignore[arg-type]
    items = [Item(size, 0, 0.0) for size in sizes]
    for item in items:
        queue.add(item)
    return queue, items


def test_like_lengths_go_together() -> None:
    """The oldest sample takes along those nearest to it in length."""
    queue, items = make([10, 90, 11, 95, 9, 12], sized=True)
    assert {item.size for item in queue.take(0.0)} == {10, 11, 9, 12}
    assert queue.take(0.0) == [items[1], items[3]]


def test_cost_limits_a_batch() -> None:
    """Samples times longest stays within `max_cost`; a longer sample goes alone."""
    queue, items = make([5, 5, 5, 50], sized=True, max_cost=12.0)
    assert queue.take(0.0) == items[:2]
    assert queue.take(0.0) == [items[2]]
    assert queue.take(0.0) == [items[3]]


def test_padding_limits_a_batch() -> None:
    """Samples too unlike each other wait for another batch, even if this one is not full."""
    queue, items = make([10, 30, 9, 29], sized=True, max_padding=0.1)
    assert queue.take(0.0) == [items[0], items[2]]
    assert queue.take(0.0) == [items[1], items[3]]


def test_what_waits_is_shared_out() -> None:
    """With two places free each gets half of what waits."""
    queue, items = make([0.0] * 4)
    assert queue.take(0.0, num_free=2) == items[:2]
    assert queue.take(0.0, num_free=1) == items[2:]


def test_a_batch_that_waited_to_fill_is_not_shared_out() -> None:
    """With `max_wait`, however many places are free, a batch takes all that it has waited for."""
    queue, items = make([0.0] * 4, max_wait=2.0)
    assert queue.take(0.0, num_free=2) == items
    queue, items = make([0.0] * 2, max_wait=2.0)
    assert queue.take(2.0, num_free=2) == items


@pytest.mark.parametrize("sized", [False, True])
def test_what_is_put_back_goes_first(sized: bool) -> None:
    """Items put back lead again those of their priority, and may be removed, even if the queue is full."""
    queue, items = make([1.0] * 4, sized=sized)
    taken = queue.take(0.0)
    later = Item(1.0, 0, 1.0)
    queue.add(later)
    queue.put_back(taken[1:])
    assert queue.remove(items[2], 1.0)
    assert queue.take(1.0) == [items[1], items[3], later]
    assert queue.num_queued == 0


@pytest.mark.parametrize("sized", [False, True])
def test_age_goes_before_priority(sized: bool) -> None:
    """An item past the age cap leads the next batch, however urgent the others are."""
    queue: BatchQueue[Item] = BatchQueue(1, 100, max_age=5.0, sized=sized)
    old, urgent = Item(1.0, 0, 0.0), Item(1.0, 9, 1.0)
    queue.add(old)
    queue.add(urgent)
    assert queue.take(6.0) == [old]
    queue.add(Item(1.0, 0, 6.0))
    assert queue.take(6.0) == [urgent]


def test_batch_waits_to_fill_only_when_asked() -> None:
    """`max_wait` holds a batch back until it is full or the oldest item's time has come."""
    queue, items = make([0.0] * 3, max_wait=2.0)
    assert queue.take(1.9) == []
    assert queue.ready_at() == 2.0
    queue.add(Item(0.0, 0, 1.9))
    assert queue.take(1.9)[:3] == items


def test_room_goes_by_priority() -> None:
    """Of those who wait for room the most urgent is let in first."""
    queue: BatchQueue[Item] = BatchQueue(1, 1)
    first, low, high = Item(0.0, 0, 0.0), Item(0.0, 0, 0.0), Item(0.0, 5, 0.0)
    for item in (first, low, high):
        queue.add(item)
    assert queue.num_outside == 2
    assert [queue.take(0.0) for _ in range(3)] == [[first], [high], [low]]


def test_room_goes_by_age_in_the_end() -> None:
    """An item that has waited for room beyond the age cap is let in before every priority."""
    for leave in ("take", "remove"):
        queue: BatchQueue[Item] = BatchQueue(1, 1, max_age=5.0)
        first, low, high = Item(0.0, 0, 0.0), Item(0.0, 0, 1.0), Item(0.0, 9, 6.0)
        for item in (first, low, high):
            queue.add(item)
        if leave == "take":
            assert queue.take(6.0) == [first]
        else:
            assert queue.remove(first, 6.0)
        assert [queue.take(6.0) for _ in range(2)] == [[low], [high]]


def test_leaving_the_wait_for_room_is_quick_and_complete() -> None:
    """However many wait for room, one is removed quickly, and no reference to it remains."""
    queue: BatchQueue[Item] = BatchQueue(1, 1)
    items = [Item(0.0, n % 7, 0.0) for n in range(20_000)]
    for item in items:
        queue.add(item)
    alive = weakref.WeakSet(items)
    started = time.perf_counter()
    while len(items) > 2:
        assert queue.remove(items.pop(), 0.0)
    del item
    # Looking through those who wait took half a minute.
    assert time.perf_counter() - started < 2
    assert set(alive) == set(items)
    assert len(queue._outside_ranks) < 100
    assert [queue.take(0.0) for _ in range(3)] == [items[:1], items[1:], []]


def test_a_lasting_overload_leaves_nothing_behind() -> None:
    """Where all items wait beyond the age cap, nothing grows with the number of those that have left."""
    queue: BatchQueue[Item] = BatchQueue(1, 1, max_age=1.0)
    for n in range(50):
        queue.add(Item(0.0, n % 3, float(n)))
    for n in range(50, 2_000):
        queue.add(Item(0.0, n % 3, float(n)))
        assert queue.take(float(n))[0].arrived == n - 50
    assert len(queue._outside_ranks) < 200


def health_after(raised_seconds: float, num_raised: int = 40) -> Health:
    """What is known of a model that takes 10 ms, and another time for runs that raise."""
    health = Health()
    health.on_success(1)
    for _ in range(num_raised):
        health.on_run(32, 0.01, raised=False)
        health.on_run(2, raised_seconds, raised=True)
    return health


def runs_of(health: Health, place: int, num_calls: int = 32) -> tuple[int, int]:
    """How many runs raise and how many succeed until the one bad call is found; put back ones not counted."""
    calls: list[Any] = [SimpleNamespace(state=CallState.PENDING, number=n) for n in range(num_calls)]
    error = ValueError("bad")
    search = start_search(calls, error, health)
    search.on_success()  # of another batch
    num_raised = num_succeeded = 0
    while search.num_left:
        if any(call.number == place for call in search.take()):
            num_raised += 1
            search.on_error(error)
        else:
            num_succeeded += 1
            search.on_success()
    return num_raised, num_succeeded


def succeeding(health: Health) -> float:
    return sum(runs_of(health, place)[1] for place in range(32)) / 32


@pytest.mark.parametrize("health", [Health(), health_after(0.01), health_after(0.0003, num_raised=8)])
def test_parts_are_halves_unless_runs_that_raise_are_known_to_be_quick(health: Health) -> None:
    """If runs that raise take as long as others, or little is known, a part is about half of the calls."""
    assert [health.part_size(count) for count in (0, 1, 2, 8, 32)] == [0, 1, 1, 4, 16]
    for place in range(32):
        assert sum(runs_of(health, place)) <= 6


def test_quick_failures_make_larger_parts() -> None:
    """Where runs that raise take little, fewer runs that take their time find a bad sample."""
    quick, slow = health_after(0.0003), health_after(0.01)
    assert quick.part_size(32) > 26
    assert quick.part_size(2) == 1
    assert quick.raised_cost < 0.1
    assert succeeding(quick) < 0.7 * succeeding(slow)


def test_many_bad_samples_make_smaller_parts() -> None:
    """A part shall not raise for certain: the more samples are bad, the smaller it is."""
    health = health_after(0.01)
    sizes = []
    for _ in range(4):
        sizes.append(health.part_size(32))
        for _ in range(32):
            health.on_run(1, 0.01, raised=True)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 5
    health.on_down(ValueError("down"))  # which says nothing of samples
    assert health.part_size(32) == 16


def test_samples_run_alone_late_where_runs_that_raise_are_quick() -> None:
    """A batch is not known to have good samples; whether the model is down is asked once that costs less."""
    error = ValueError("bad")

    def sizes(health: Health) -> list[int]:
        calls: list[Any] = [SimpleNamespace(state=CallState.PENDING) for _ in range(32)]
        search, found = Search(calls, error, health, num_probes=4), []
        while not search.is_model_down:
            found.append(len(search.take()))
            search.on_error(error)
        return found

    assert sizes(health_after(0.01)) == [16, 1, 1, 1, 1]
    assert len(sizes(health_after(0.0003))) <= 11


def test_the_error_of_a_known_culprit_is_followed_as_long_as_that_costs_little() -> None:
    """For an error that no lone sample has raised, samples run alone early: it may be the model's."""
    calls: list[Any] = [SimpleNamespace(state=CallState.PENDING) for _ in range(32)]

    def num_parts_before_probes(health: Health, error: Exception) -> int:
        search, parts = start_search(calls, error, health), 0
        while len(search.take()) > 1:
            search.on_error(error)
            parts += 1
        return parts

    health = health_after(0.0003)
    runs_of(health, 20)
    assert num_parts_before_probes(health, ConnectionError("down")) == 7
    assert num_parts_before_probes(health, ValueError("bad")) > 12


def health_by_size(seconds: float, each: float, share: float) -> Health:
    """What is known of a model whose runs take some time, and some for each call."""
    health = Health()
    health.on_success(1)
    num_bad = 0
    for turn in range(400):
        for size in (4, 8, 32):
            health.on_run(size, seconds + each * size, raised=False)
        health.on_run(2, seconds + each * 2, raised=True)
        while num_bad < share * 44 * (turn + 1):
            health.on_run(1, seconds + each, raised=True)
            num_bad += 1
    return health


def test_batches_are_smaller_where_bad_samples_abound_and_small_batches_are_quick() -> None:
    """A batch that raises wastes the time it took, so it is as large as pays for the share of bad samples."""
    sizes = [health_by_size(0.0003, 0.0003, share).batch_size(32) for share in (0.0, 0.02, 0.05, 0.2)]
    assert sizes[0] == 32
    assert sizes == sorted(sizes, reverse=True)
    assert 3 <= sizes[1] <= 12
    assert sizes[2] <= 6
    # Where a small batch takes as long as a large one, nothing is gained by it.
    assert health_by_size(0.01, 0.0, 0.01).batch_size(32) == 32
    assert health_by_size(0.01, 0.0, 0.05).batch_size(512) == 512


def test_parts_are_smaller_where_small_ones_are_quick() -> None:
    """Of calls that cost their time each, a few at a time are run; else about half of them."""
    assert health_by_size(0.0003, 0.0003, 0.05).part_size(32) <= 6
    assert health_by_size(0.01, 0.0, 0.01).part_size(32) >= 14
    assert health_by_size(0.01, 0.0, 0.01).part_size(320) >= 140


@pytest.mark.parametrize("each", [0.0, 1.0])
@pytest.mark.parametrize("raises", [0.01, 1.0])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
def test_a_plan_names_parts_that_can_be_run(each: float, raises: float, share: float) -> None:
    """A part has at least one of the calls, and of several not all of them."""
    plan = make_plan((1.0, each), (raises, raises * each), share)
    assert plan.part_sizes[:2] == [0, 1]
    assert all(1 <= size < count for count, size in enumerate(plan.part_sizes) if count > 1)
    assert plan.batch_size is None or 1 <= plan.batch_size < 32


def test_a_plan_takes_the_time_that_the_best_one_takes() -> None:
    """For three calls whose runs cost the same, the sizes are those that hand calculation finds."""
    # Of two of which not both are fine, one runs; of three, one or two, by what runs that raise cost.
    assert make_plan((1.0, 0.0), (1.0, 0.0), 0.01).part_sizes[2:4] == [1, 1]
    assert make_plan((1.0, 0.0), (0.01, 0.0), 0.01).part_sizes[2:4] == [1, 2]


@pytest.mark.anyio
async def test_smaller_batches_do_not_wait_to_be_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where batches are made smaller for the sake of bad samples, `max_wait` fills no more than those."""
    monkeypatch.setattr(Health, "batch_size", lambda self, num_calls: 2)
    sizes = []

    def engine(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x

    async with (
        Runtime("cpu") as runtime,
        Batcher(engine, max_batch_size=4, max_wait=600.0, runtime=runtime) as batcher,
    ):
        with anyio.fail_after(10):
            for count in (4, 4, 2):  # of the first nothing is known yet
                for call in [batcher.call_nowait(torch.ones(1)) for _ in range(count)]:
                    await call
    assert sizes == [4, 2, 2, 2]
