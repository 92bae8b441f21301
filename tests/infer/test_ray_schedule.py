"""Which actor of a cluster runs which block: every block is done once, whatever dies."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdp.infer.cluster.schedule import (
    MAX_FAILED_STARTS,
    PER_ACTOR,
    Assign,
    Finish,
    GiveUp,
    Retire,
    Schedule,
    Start,
)
from asyncdp.infer.cluster.suspect import MAX_DEATHS


class Cluster:
    """Actors that do what they are told, and die over some records or at the word of the dice."""

    def __init__(self, seed, num_blocks, size, deadly=(), batch_size=4, kill=0.0, together=None):
        self.dice, self.kill = random.Random(seed), kill
        self.schedule = Schedule(batch_size)
        self.batch_size, self.together = batch_size, together
        self.blocks, self.size = iter(range(num_blocks)), size
        self.deadly = set(deadly)
        self.starting, self.running = [], {}
        self.finished, self.refused, self.retired, self.given_up = [], {}, [], []
        self.most_in_flight = self.num_deaths = 0

    def do(self, actions):
        for action in actions:
            if isinstance(action, Start):
                self.starting.append(action.actor)
            elif isinstance(action, Assign):
                works = self.running.setdefault(action.actor, [])
                assert not any(work.alone for work in works)
                assert not (action.work.alone and works)
                works.append(action.work)
                assert len(works) <= PER_ACTOR
            elif isinstance(action, Finish):
                self.finished.append(action.block)
            elif isinstance(action, Retire):
                self.retired.append(action.slot)
            else:
                assert isinstance(action, GiveUp)
                self.given_up.append(action.block)

    def kills(self, work):
        start, stop = work.probed or (0, self.size)
        left = [place for place in range(start, stop) if place not in work.refused]
        if self.together and len(left) > 1 and (work.batch_size or self.batch_size) >= self.together:
            return True
        return any((work.block, place) in self.deadly for place in left)

    def step(self):
        """Let one thing happen; return whether there is any."""
        while self.schedule.num_wanted and (block := next(self.blocks, None)) is not None:
            self.do(self.schedule.plan(block, self.size))
        self.most_in_flight = max(self.most_in_flight, self.schedule.num_in_flight)
        if self.starting and (self.dice.random() < 0.5 or not any(self.running.values())):
            actor = self.starting.pop(self.dice.randrange(len(self.starting)))
            self.running[actor] = []
            self.do(self.schedule.on_ready(actor))
            return True
        busy = [actor for actor, works in self.running.items() if works]
        if not busy:
            return False
        actor = self.dice.choice(busy)
        work = self.running[actor][0]
        if self.kills(work) or self.dice.random() < self.kill:
            del self.running[actor]
            self.num_deaths += 1
            self.do(self.schedule.on_died(actor))
        else:
            self.running[actor].pop(0)
            if work.probed is None:
                self.refused[work.block] = work.refused
            self.do(self.schedule.on_done(actor, work.block))
        return True

    def run(self, num_actors, most=100_000):
        for slot in range(num_actors):
            self.do(self.schedule.add_slot(slot))
        while not self.given_up and self.step():
            most -= 1
            assert most, "it goes on for ever"
        return self


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.integers(0, 25),
    st.integers(1, 9),
    st.floats(0, 0.3),
    st.data(),
)
def test_every_block_is_done_once(seed, num_actors, num_blocks, size, kill, data):
    """Whatever dies, every block is finished once, and every record that ends its process is refused."""
    places = st.tuples(st.integers(0, max(num_blocks - 1, 0)), st.integers(0, size - 1))
    deadly = data.draw(st.sets(places, max_size=4)) if num_blocks else set()
    cluster = Cluster(seed, num_blocks, size, deadly, kill=kill).run(num_actors)
    assert cluster.given_up or sorted(cluster.finished) == list(range(num_blocks))
    assert not cluster.given_up or kill
    found = {(block, place) for block, refused in cluster.refused.items() for place in refused}
    assert found >= {pair for pair in deadly if pair[0] in cluster.finished}
    if not kill:
        assert found == deadly
    assert cluster.schedule.num_in_flight == num_blocks - len(cluster.finished) or cluster.given_up
    assert cluster.most_in_flight <= 3 * PER_ACTOR * num_actors


def test_one_deadly_record_costs_few_deaths():
    """Of 4,096 records the one at fault is found by three deaths, one for each halving, and three alone."""
    cluster = Cluster(0, 3, 4096, {(1, 1234)}, batch_size=32).run(2)
    assert cluster.refused == {0: (), 1: (1234,), 2: ()}
    assert cluster.num_deaths <= 2 * MAX_DEATHS + 12


def test_records_that_kill_only_together_get_smaller_batches():
    """A block that no single record is to blame for runs in smaller batches; none becomes bad."""
    cluster = Cluster(0, 2, 64, batch_size=32, together=9).run(1)
    assert cluster.refused == {0: (), 1: ()}
    assert cluster.finished in ([0, 1], [1, 0])


def test_a_block_that_always_kills_ends_the_job():
    """Where not even batches of one help, the job ends instead of trying for ever."""
    assert Cluster(0, 1, 8, batch_size=4, together=1).run(1).given_up == [0]


def test_a_slot_whose_actors_do_not_start_is_left():
    """After some failed starts without a good one the slot is given up."""
    schedule = Schedule(4)
    (start,) = schedule.add_slot(7)
    for _ in range(MAX_FAILED_STARTS - 1):
        (start,) = schedule.on_died(start.actor)
    assert schedule.on_died(start.actor) == [Retire(7)]
    assert schedule.num_slots == 0


def test_a_lost_slot_is_not_started_again():
    """The work of a node that is gone goes to others, and no actor is started there."""
    schedule = Schedule(4)
    (start,) = schedule.add_slot(0)
    schedule.on_ready(start.actor)
    schedule.plan(0, 4)
    assert schedule.lose_slot(0) == []
    (start,) = schedule.add_slot(1)
    (assign,) = schedule.on_ready(start.actor)
    assert (assign.actor, assign.work.block) == (start.actor, 0)


@pytest.mark.parametrize("late", ["done", "died", "ready"])
def test_news_of_an_actor_that_is_gone_counts_for_nothing(late):
    """What a dead actor still sends changes nothing, so no block is finished twice."""
    schedule = Schedule(4)
    (start,) = schedule.add_slot(0)
    schedule.on_ready(start.actor)
    schedule.plan(0, 4)
    schedule.on_died(start.actor)
    news = {
        "done": lambda: schedule.on_done(start.actor, 0),
        "died": lambda: schedule.on_died(start.actor),
        "ready": lambda: schedule.on_ready(start.actor),
    }
    assert news[late]() == []
    assert schedule.num_in_flight == 1
