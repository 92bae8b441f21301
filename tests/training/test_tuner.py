"""The tuner's decisions, without threads, clocks or torch."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdp._engine.tuner import MAX_TURNS, MIN_TURNS, TURN, Tuner


def learn(tuner: Tuner, key: str, costs: dict[int, float], size: int = 1) -> list[int]:
    """Call until the tuner has chosen; return the numbers of lanes it tried."""
    tried = []
    while tuner.workload(key).is_learning:
        count = tuner.workload(key).choose()
        tried.append(count)
        tuner.workload(key).record(count, costs[count], size)
    return tried


@settings(max_examples=50, deadline=None)
@given(num_lanes=st.integers(2, 16), data=st.data())
def test_it_finds_the_quickest_in_few_calls(num_lanes: int, data: st.DataObject) -> None:
    """Whatever calls cost, a bounded number of trials finds a number of lanes within 3 % of the best."""
    candidates = {num_lanes, *(2**k for k in range(5) if 2**k < num_lanes)}
    costs = {count: data.draw(st.floats(1e-4, 1e-1)) for count in candidates}
    tuner = Tuner(num_lanes)
    tried = learn(tuner, "a", costs)
    assert tried[0] == num_lanes
    assert TURN * MIN_TURNS * len(candidates) <= len(tried) <= TURN * MAX_TURNS * len(candidates)
    assert costs[tuner.workload("a").choose()] <= min(costs.values()) * 1.03
    choice = tuner.choices()[0]
    assert choice.costs == costs
    assert choice.num_probes == choice.num_calls == len(tried)


def test_workloads_are_learned_apart() -> None:
    """What pays for one kind of call says nothing about another."""
    tuner = Tuner(2)
    learn(tuner, "small", {1: 1.0, 2: 3.0})
    learn(tuner, "large", {1: 9.0, 2: 5.0})
    assert (tuner.workload("small").choose(), tuner.workload("large").choose()) == (1, 2)


def test_the_first_trial_of_each_turn_only_warms_up() -> None:
    """A slow first call, which makes threads and caches, decides nothing."""
    tuner = Tuner(2)
    for count, seconds in [*[(2, 2.0)] * 3, (1, 99.0), (1, 1.0), (1, 1.0)] * MIN_TURNS:
        assert tuner.workload("a").choose() == count
        tuner.workload("a").record(count, seconds)
    assert not tuner.workload("a").is_learning
    assert tuner.workload("a").choose() == 1


def test_what_is_close_is_told_apart_by_more_turns() -> None:
    """A number of lanes that is far behind gets the least of turns; two that are close get the most."""
    tuner = Tuner(4)
    tried = learn(tuner, "a", {4: 1.0, 2: 1.1, 1: 3.0})
    assert [tried.count(count) for count in (4, 2, 1)] == [
        TURN * MAX_TURNS,
        TURN * MAX_TURNS,
        TURN * MIN_TURNS,
    ]


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 24), length=st.integers(0, 5), factor=st.floats(1.0, 20.0))
def test_a_busy_moment_does_not_decide(start: int, length: int, factor: float) -> None:
    """Other work on the machine for a few calls, whenever it comes, does not make the slower one win."""
    tuner = Tuner(2)
    call = 0
    while tuner.workload("a").is_learning:
        count = tuner.workload("a").choose()
        busy = start <= call < start + length
        tuner.workload("a").record(count, {1: 1.0, 2: 1.1}[count] * (factor if busy else 1.0))
        call += 1
    assert tuner.workload("a").choose() == 1


def test_an_unlucky_choice_is_put_right() -> None:
    """A choice made while the machine was busy is tried again after some hundred calls, ever more rarely."""
    tuner = Tuner(2)
    learn(tuner, "a", {1: 2.0, 2: 1.4})
    assert tuner.workload("a").choose() == 2
    times = {1: 1.0, 2: 1.4}
    relearned = []
    for call in range(6000):
        count = tuner.workload("a").choose()
        tuner.workload("a").record(count, times[count])
        if tuner.workload("a").is_learning and (not relearned or call > relearned[-1] + 50):
            relearned.append(call)
            assert "to make sure" in tuner.choices()[0].reason
    assert tuner.workload("a").choose() == 1
    assert relearned[0] < 300
    assert len(relearned) <= 3


def test_calls_of_one_workload_may_differ_in_size() -> None:
    """A number of lanes does not win by having got the smaller batches."""
    tuner = Tuner(2)
    while tuner.workload("a").is_learning:
        count = tuner.workload("a").choose()
        tuner.workload("a").record(count, *((1.0, 100) if count == 2 else (0.9, 60)))
    assert tuner.workload("a").choose() == 2


def test_a_tie_goes_to_fewer_lanes() -> None:
    """Where it makes no difference, other work gets the room."""
    tuner = Tuner(4)
    learn(tuner, "a", {4: 1.00, 2: 1.02, 1: 1.5})
    assert tuner.workload("a").choose() == 2
    assert "fewer lanes" in tuner.choices()[0].reason


def test_a_change_is_noticed_and_a_hiccup_is_not() -> None:
    """When calls take another time for long enough everything is tried again; one slow call is nothing."""
    tuner = Tuner(2)
    learn(tuner, "a", {1: 1.0, 2: 2.0})
    for call in range(200):
        tuner.workload("a").record(1, 5.0 if call % 10 == 0 else 1.0)
        assert tuner.workload("a").choose() == 1
    for _ in range(20):
        if not tuner.workload("a").is_learning:
            tuner.workload("a").record(1, 3.0)
    assert tuner.workload("a").is_learning
    assert "again" in tuner.choices()[0].reason
    learn(tuner, "a", {1: 3.0, 2: 2.0})
    assert tuner.workload("a").choose() == 2


def test_a_workload_that_never_settles_is_probed_ever_less() -> None:
    """Times that go up and down for ever cost a share of probes that shrinks."""
    tuner = Tuner(2)
    seconds = 1.0
    for call in range(6000):
        if call % 40 == 0:
            seconds = 3.0 if seconds == 1.0 else 1.0
        tuner.workload("a").record(tuner.workload("a").choose(), seconds)
    assert tuner.choices()[0].num_probes < 200


def test_a_fixed_workload_stays_on_all_lanes() -> None:
    """What is fixed is never tried on fewer lanes, and says why."""
    tuner = Tuner(3)
    tuner.workload("a").fix("a reason")
    for _ in range(20):
        assert tuner.workload("a").choose() == 3
        tuner.workload("a").record(3, 1.0)
    assert tuner.choices()[0].reason == "a reason"
    assert not tuner.choices()[0].num_probes


def test_the_number_of_workloads_is_bounded() -> None:
    """Old workloads are forgotten."""
    tuner = Tuner(2)
    for key in range(1000):
        tuner.workload(key).record(tuner.workload(key).choose(), 1.0)
    assert len(tuner.choices()) == 128
