"""The pure schedule: the whole life of passes, from events to actions."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncdp._runtime.schedule import (
    Action,
    Advance,
    Clear,
    Complete,
    Discard,
    Enqueue,
    LaneState,
    PassState,
    Progress,
    Reject,
    Schedule,
    Stop,
    split_sizes,
)


@pytest.mark.parametrize(
    ("num_rows", "num_lanes", "sizes"),
    [
        (9, 4, [3, 2, 2, 2]),
        (8, 4, [2, 2, 2, 2]),
        (3, 4, [1, 1, 1]),
        (0, 4, [0]),
        (1, 1, [1]),
        (5, 1, [5]),
    ],
)
def test_split_is_balanced(num_rows: int, num_lanes: int, sizes: list[int]) -> None:
    """Shards differ by one row at most; there are never more shards than rows, but always one."""
    assert split_sizes(num_rows, num_lanes) == sizes


def make(num_lanes: int, max_queue: int) -> Schedule:
    """Make a schedule with some lanes."""
    schedule = Schedule(max_queue)
    for _ in range(num_lanes):
        schedule.add_lane()
    return schedule


def admitted(schedule: Schedule, lanes: list[int], num_stages_left: int = 0) -> Progress:
    """Submit a pass that finds room."""
    pass_ = Progress(lanes, num_stages_left)
    assert schedule.submit(pass_) == [Enqueue(pass_)]
    return pass_


def waiting(schedule: Schedule, lanes: list[int]) -> Progress:
    """Submit a pass that has to wait."""
    pass_ = Progress(lanes)
    assert schedule.submit(pass_) == []
    assert pass_.state is PassState.WAITING
    return pass_


def end_task(schedule: Schedule, pass_: Progress, lane: int, *, failed: bool = False) -> list[Action]:
    """End one task of a pass."""
    return schedule.on_task_done(pass_, lane, failed=failed)


def test_room_is_all_or_nothing() -> None:
    """A pass that lacks room on one lane takes no room on the others."""
    schedule = make(2, max_queue=0)
    first = admitted(schedule, [0])
    both = waiting(schedule, [0, 1])
    assert schedule.loads[1] == 0
    assert end_task(schedule, first, 0) == [Enqueue(both), Complete(first)]
    assert (schedule.loads[0], schedule.loads[1]) == (1, 1)


def test_a_repeated_lane_needs_a_place_for_each_task() -> None:
    """Two tasks on one lane need two places there."""
    schedule = make(1, max_queue=1)
    admitted(schedule, [0, 0])
    waiting(schedule, [0])
    assert schedule.loads[0] == 2


def test_a_pass_larger_than_a_lane_is_admitted_to_idle_lanes() -> None:
    """What no lane could ever have room for runs as soon as its lanes are idle, ahead of later passes."""
    schedule = make(2, max_queue=0)
    running = admitted(schedule, [1])
    large = waiting(schedule, [0, 0, 1])
    late = waiting(schedule, [0])
    assert end_task(schedule, running, 1) == [Enqueue(large), Complete(running)]
    assert (schedule.loads[0], schedule.loads[1]) == (2, 1)
    assert end_task(schedule, large, 0) == []
    assert end_task(schedule, large, 0) == [Enqueue(late)]
    admitted(make(1, max_queue=0), [0, 0])


def test_no_overtaking_on_shared_lanes() -> None:
    """A later pass does not overtake one that waits for any of its lanes, but others may go ahead."""
    schedule = make(3, max_queue=0)
    running = admitted(schedule, [0])
    wide = waiting(schedule, [0, 1])
    narrow = waiting(schedule, [1])  # lane 1 is free, but the wide one came first
    admitted(schedule, [2])
    assert end_task(schedule, running, 0) == [Enqueue(wide), Complete(running)]
    assert end_task(schedule, wide, 1) == [Enqueue(narrow)]


def test_stages_follow_until_the_last() -> None:
    """Each stage begins when all tasks of the one before have ended, ahead of what is queued."""
    schedule = make(2, max_queue=0)
    pass_ = admitted(schedule, [0, 1], num_stages_left=2)
    assert end_task(schedule, pass_, 1) == []
    assert end_task(schedule, pass_, 0) == [Advance(pass_, 0)]
    assert schedule.on_stage_made(pass_, [1]) == [Enqueue(pass_, first=True)]
    assert end_task(schedule, pass_, 1) == [Advance(pass_, 1)]
    assert schedule.on_stage_made(pass_, []) == [Complete(pass_)], "an empty stage ends at once"
    assert pass_.state is PassState.DONE


@pytest.mark.parametrize("event", ["failed", "cancelled", "not made"])
def test_nothing_follows_a_failure_or_a_cancellation(event: str) -> None:
    """The pass ends when what runs has ended, and no further stage begins."""
    schedule = make(2, max_queue=0)
    pass_ = admitted(schedule, [0, 1], num_stages_left=1)
    if event == "cancelled":
        assert schedule.cancel(pass_) == [Discard(pass_)]
    assert end_task(schedule, pass_, 0, failed=event == "failed") == []
    ended = end_task(schedule, pass_, 1)
    if event == "not made":
        assert ended == [Advance(pass_, 1)]
        ended = schedule.on_stage_failed(pass_)
    assert ended == [Complete(pass_)]
    assert pass_.state is (PassState.CANCELLED if event == "cancelled" else PassState.FAILED)
    assert schedule.cancel(pass_) == [], "too late"


def test_a_cancelled_pass_that_waits_makes_way() -> None:
    """It ends at once, and those that waited only behind it are admitted."""
    schedule = make(2, max_queue=0)
    admitted(schedule, [0])
    wide = waiting(schedule, [0, 1])
    behind = waiting(schedule, [1])
    assert schedule.cancel(wide) == [Enqueue(behind), Complete(wide)]
    assert wide.state is PassState.CANCELLED


def test_a_lost_lane_rejects_and_frees_those_behind() -> None:
    """Losing a lane rejects passes that wait for it and admits those behind them on other lanes."""
    schedule = make(2, max_queue=0)
    running = admitted(schedule, [0], num_stages_left=1)
    wide = waiting(schedule, [0, 1])
    behind = waiting(schedule, [1])
    assert schedule.mark_lost(0) == [Reject(wide, 0), Enqueue(behind), Clear(0)]
    assert schedule.mark_lost(0) == []
    assert schedule.states[0] is LaneState.LOST
    late = Progress([1, 0])
    assert schedule.submit(late) == [Reject(late, 0)]
    assert end_task(schedule, running, 0) == [Advance(running, 0)]
    assert schedule.on_stage_made(running, [1, 0]) == [Reject(running, 0)]
    assert schedule.loads[1] == 1, "a rejected stage takes no places"


def test_closing_rejects_what_waits_and_keeps_what_runs() -> None:
    """After closing nothing is admitted, but admitted passes go on; then the lanes stop."""
    schedule = make(1, max_queue=0)
    running = admitted(schedule, [0], num_stages_left=1)
    late = waiting(schedule, [0])
    assert schedule.close() == [Reject(late, None)]
    assert schedule.close() == []
    too_late = Progress([0])
    assert schedule.submit(too_late) == [Reject(too_late, None)]
    assert end_task(schedule, running, 0) == [Advance(running, 0)]
    assert schedule.on_stage_made(running, [0]) == [Enqueue(running, first=True)]
    assert end_task(schedule, running, 0) == [Complete(running), Stop()]
    assert make(1, max_queue=0).close() == [Stop()]


def test_pick_prefers_idle_open_lanes_in_order() -> None:
    """Of equally busy lanes the first are picked; lost ones only if there is nothing else."""
    schedule = make(3, max_queue=8)
    admitted(schedule, [0])
    assert schedule.pick([0, 1, 2], 2) == [1, 2]
    schedule.mark_lost(1)
    assert schedule.pick([0, 1, 2], 1) == [2]
    schedule.mark_lost(0)
    schedule.mark_lost(2)
    assert schedule.pick([0, 1, 2], 1) != []


LANES = st.lists(st.integers(0, 2), max_size=5)


class ScheduleMachine(RuleBasedStateMachine):
    """Drives the schedule with random events, and performs its actions on a model of queues."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = make(3, max_queue=1)
        self.submitted: list[Progress] = []
        self.queued: list[list[Progress]] = [[], [], []]
        self.running: list[Progress | None] = [None, None, None]
        self.ended: set[Progress] = set()
        self.to_advance: list[Progress] = []
        self.is_stopped = False

    def perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Enqueue(pass_, first):
                    assert pass_ not in self.ended
                    for lane in pass_.lanes:
                        assert self.schedule.states[lane] is not LaneState.LOST
                        self.queued[lane].insert(0 if first else len(self.queued[lane]), pass_)
                case Advance(pass_, _):
                    assert not pass_.has_failed
                    assert not pass_.is_cancelled
                    self.to_advance.append(pass_)
                case Discard(pass_):
                    for lane in pass_.lanes:
                        if pass_ in self.queued[lane]:
                            self.queued[lane].remove(pass_)
                            self.perform(self.schedule.on_task_done(pass_, lane, failed=False))
                case Clear(lane):
                    passes, self.queued[lane] = self.queued[lane], []
                    for pass_ in passes:
                        self.perform(self.schedule.on_task_done(pass_, lane, failed=True))
                case Reject(pass_, _) | Complete(pass_):
                    assert pass_ not in self.ended, "a pass ends once"
                    assert pass_ not in self.running
                    assert not any(pass_ in queue for queue in self.queued)
                    self.ended.add(pass_)
                case Stop():
                    assert self.schedule.is_closed
                    assert not any(self.queued)
                    assert not any(self.running)
                    self.is_stopped = True

    @rule(lanes=LANES, num_stages_left=st.integers(0, 2))
    def submit(self, lanes: list[int], num_stages_left: int) -> None:
        pass_ = Progress(lanes, num_stages_left)
        self.submitted.append(pass_)
        self.perform(self.schedule.submit(pass_))

    @rule(lane=st.integers(0, 2), failed=st.booleans())
    def run_a_task(self, lane: int, failed: bool) -> None:
        """A lane begins its next task, or ends the one it runs."""
        pass_ = self.running[lane]
        if pass_ is not None:
            self.running[lane] = None
            self.perform(self.schedule.on_task_done(pass_, lane, failed=failed))
        elif self.queued[lane]:
            self.running[lane] = self.queued[lane].pop(0)

    @precondition(lambda self: self.to_advance)
    @rule(lanes=LANES, fails=st.booleans())
    def advance(self, lanes: list[int], fails: bool) -> None:
        pass_ = self.to_advance.pop(0)
        if fails:
            self.perform(self.schedule.on_stage_failed(pass_))
        else:
            self.perform(self.schedule.on_stage_made(pass_, lanes))

    @precondition(lambda self: self.submitted and not self.to_advance)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.perform(self.schedule.cancel(data.draw(st.sampled_from(self.submitted))))

    @rule(lane=st.integers(0, 2))
    def mark_lost(self, lane: int) -> None:
        self.perform(self.schedule.mark_lost(lane))

    @rule()
    def close(self) -> None:
        self.perform(self.schedule.close())

    @invariant()
    def loads_are_what_is_queued_and_runs(self) -> None:
        for lane in range(3):
            passes = [*self.queued[lane], *([self.running[lane]] if self.running[lane] else [])]
            assert self.schedule.loads[lane] == len(passes)

    @invariant()
    def every_pass_is_somewhere(self) -> None:
        alive = [pass_ for pass_ in self.submitted if pass_ not in self.ended]
        num_waiting = sum(pass_.state is PassState.WAITING for pass_ in alive)
        assert self.schedule.num_waiting == num_waiting
        assert self.schedule.num_running == len(alive) - num_waiting
        assert all(pass_.is_ended for pass_ in self.ended)
        assert sum(self.schedule.counts.values()) == len(self.ended)
        assert self.is_stopped == (self.schedule.is_closed and not alive)

    @invariant()
    def nothing_waits_without_a_reason(self) -> None:
        ahead: set[int] = set()
        for pass_ in self.submitted:
            if pass_.state is PassState.WAITING:
                loads = {lane: self.schedule.loads[lane] for lane in pass_.lanes}
                fits = all(load + list(pass_.lanes).count(lane) <= 2 for lane, load in loads.items())
                assert not (fits or not any(loads.values())) or not ahead.isdisjoint(pass_.lanes)
                ahead.update(pass_.lanes)


ScheduleMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSchedule = ScheduleMachine.TestCase
TestSchedule.__doc__ = (
    "Every pass ends once, with nothing of it on any lane, and waits only for a full lane or an earlier pass."
)
