"""The pure schedule: what it admits, what it makes wait, what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncdp._runtime.schedule import Admit, LaneState, Refuse, Schedule, split_sizes


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


def test_room_is_all_or_nothing() -> None:
    """A ticket that lacks room on one lane takes no room on the others."""
    schedule = Schedule(2, max_queue=0)
    assert schedule.submit("a", [0]) == Admit("a")
    assert schedule.submit("both", [0, 1]) is None
    assert schedule.load(1) == 0
    assert list(schedule.finish(0)) == [Admit("both")]
    assert (schedule.load(0), schedule.load(1)) == (1, 1)


def test_a_repeated_lane_needs_a_place_for_each_work() -> None:
    """Two works on one lane need two places there."""
    schedule = Schedule(1, max_queue=1)
    assert schedule.submit("twice", [0, 0]) == Admit("twice")
    assert schedule.submit("once", [0]) is None
    assert schedule.load(0) == 2


def test_a_ticket_larger_than_a_lane_is_admitted_to_idle_lanes() -> None:
    """What no lane could ever have room for runs as soon as its lanes are idle, ahead of later tickets."""
    schedule = Schedule(2, max_queue=0)
    assert schedule.submit("running", [1]) == Admit("running")
    assert schedule.submit("large", [0, 0, 1]) is None
    assert schedule.submit("late", [0]) is None
    assert list(schedule.finish(1)) == [Admit("large")]
    assert (schedule.load(0), schedule.load(1)) == (2, 1)
    assert list(schedule.finish(0)) == []
    assert list(schedule.finish(0)) == [Admit("late")]
    assert Schedule(1, max_queue=0).submit("at once", [0, 0]) == Admit("at once")


def test_no_overtaking_on_shared_lanes() -> None:
    """A later ticket does not pass one that waits for any of its lanes, but others may go ahead."""
    schedule = Schedule(3, max_queue=0)
    schedule.submit("running", [0])
    assert schedule.submit("wide", [0, 1]) is None
    assert schedule.submit("narrow", [1]) is None, "lane 1 is free, but the wide one came first"
    assert schedule.submit("apart", [2]) == Admit("apart")
    assert list(schedule.finish(0)) == [Admit("wide")]
    assert list(schedule.finish(1)) == [Admit("narrow")]


def test_withdrawn_tickets_never_run() -> None:
    """A ticket cancelled while it waits is forgotten and makes way."""
    schedule = Schedule(1, max_queue=0)
    schedule.submit("running", [0])
    schedule.submit("gone", [0])
    schedule.submit("next", [0])
    assert schedule.withdraw("gone") == []
    assert schedule.withdraw("running") is None
    assert list(schedule.finish(0)) == [Admit("next")]


def test_a_lost_lane_refuses_and_frees_those_behind() -> None:
    """Losing a lane refuses who waits for it and admits who waited behind them on other lanes."""
    schedule = Schedule(2, max_queue=0)
    schedule.submit("running", [0])
    schedule.submit("wide", [0, 1])
    schedule.submit("behind", [1])
    assert schedule.lose(0) == [Refuse("wide", 0), Admit("behind")]
    assert schedule.state(0) is LaneState.LOST
    assert schedule.submit("late", [1, 0]) == Refuse("late", 0)
    assert schedule.proceed([1, 0]) == 0


def test_closing_refuses_waiting_and_keeps_running() -> None:
    """After closing nothing is admitted, but admitted tickets may go on to their next stage."""
    schedule = Schedule(1, max_queue=0)
    schedule.submit("running", [0])
    schedule.submit("waiting", [0])
    assert schedule.close() == [Refuse("waiting", None)]
    assert schedule.submit("late", [0]) == Refuse("late", None)
    schedule.finish(0)
    assert schedule.proceed([0]) is None


def test_pick_prefers_idle_open_lanes_in_order() -> None:
    """Of equally busy lanes the first are picked; lost ones only if there is nothing else."""
    schedule = Schedule(3, max_queue=8)
    schedule.submit("a", [0])
    assert schedule.pick([0, 1, 2], 2) == [1, 2]
    schedule.lose(1)
    assert schedule.pick([0, 1, 2], 1) == [2]
    schedule.lose(0)
    schedule.lose(2)
    assert schedule.pick([0, 1, 2], 1) != []


def test_withdrawing_lets_those_behind_go() -> None:
    """Who waited only behind the withdrawn ticket is admitted at once."""
    schedule = Schedule(2, max_queue=0)
    schedule.submit("running", [0])
    schedule.submit("wide", [0, 1])
    schedule.submit("behind", [1])
    assert schedule.withdraw("wide") == [Admit("behind")]


class ScheduleMachine(RuleBasedStateMachine):
    """Drives the schedule with random events beside a model that only counts."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Schedule(3, max_queue=1)
        self.running: dict[int, list[int]] = {}
        self.waiting: dict[int, list[int]] = {}
        self.next = 0

    def take(self, actions: Sequence[Admit | Refuse]) -> None:
        for action in actions:
            assert isinstance(action.ticket, int)
            lanes = self.waiting.pop(action.ticket)
            if isinstance(action, Admit):
                self.running[action.ticket] = lanes

    @rule(lanes=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def submit(self, lanes: list[int]) -> None:
        ticket, self.next = self.next, self.next + 1
        self.waiting[ticket] = list(lanes)
        action = self.schedule.submit(ticket, lanes)
        self.take([] if action is None else [action])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.running)))
        lane = self.running[ticket].pop()
        if not self.running[ticket]:
            del self.running[ticket]
        self.take(self.schedule.finish(lane))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        actions = self.schedule.withdraw(ticket)
        del self.waiting[ticket]
        assert actions is not None
        self.take(actions)

    @rule(lane=st.integers(0, 2))
    def lose(self, lane: int) -> None:
        self.take(self.schedule.lose(lane))

    @invariant()
    def loads_are_what_runs(self) -> None:
        for lane in range(3):
            loads = [lanes.count(lane) for lanes in self.running.values() if lane in lanes]
            assert self.schedule.load(lane) == sum(loads)
            assert sum(loads) <= 2 or len(loads) == 1, "only one that is larger than a lane fills it further"

    @invariant()
    def whoever_waits_is_known(self) -> None:
        assert self.schedule.num_waiting == len(self.waiting)

    @invariant()
    def nobody_waits_without_a_reason(self) -> None:
        ahead: set[int] = set()
        for lanes in self.waiting.values():
            fits = all(self.schedule.load(lane) + lanes.count(lane) <= 2 for lane in lanes)
            idle = all(self.schedule.load(lane) == 0 for lane in lanes)
            assert not (fits or idle) or not ahead.isdisjoint(lanes)
            ahead.update(lanes)


ScheduleMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSchedule = ScheduleMachine.TestCase
TestSchedule.__doc__ = (
    "Loads are exactly what runs, and a ticket waits only for a full lane or an earlier ticket."
)
