"""Which actor runs which block: events in, actions out. No processes, no clock, no files.

The shell calls one method per event and does what the returned actions say. Memory is that of the actors and
of what they run; blocks that nobody has asked for yet, and blocks that are done, are not here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict, deque

from .suspect import Suspect, Work

PER_ACTOR = 2
"""Blocks in flight per actor: one runs while the next one is being read."""

MAX_FAILED_STARTS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """Start an actor in a slot: a place for one, on some node."""

    slot: int
    actor: int


@dataclasses.dataclass(frozen=True, slots=True)
class Assign:
    """Hand some work to an actor."""

    actor: int
    work: Work


@dataclasses.dataclass(frozen=True, slots=True)
class Finish:
    """Write a block into the journal: it is done, for the first and only time."""

    block: int


@dataclasses.dataclass(frozen=True, slots=True)
class Retire:
    """Leave a slot: its actors do not even start."""

    slot: int


@dataclasses.dataclass(frozen=True, slots=True)
class GiveUp:
    """End the job: a block ends every process, whatever is tried."""

    block: int


Action = Start | Assign | Finish | Retire | GiveUp


@dataclasses.dataclass(slots=True)
class _Actor:
    slot: int
    is_ready: bool = False
    is_full: bool = False
    works: dict[int, Work] = dataclasses.field(default_factory=dict)


class Schedule:
    """The state of a job over many actors.

    Args:
        batch_size: most records per batch of the job.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._actors: dict[int, _Actor] = {}
        self._slots: dict[int, int] = {}
        self._numbers = itertools.count()
        self._fresh: deque[int] = deque()
        self._sizes: dict[int, int] = {}
        self._waiting: deque[Suspect] = deque()
        self._suspects: dict[int, Suspect] = {}
        # Ready actors by what they run, those that are full left out: a choice takes no search.
        self._free: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(PER_ACTOR)]
        # Actors that get nothing more until they have nothing else, for a suspect that waits.
        self._reserved: set[int] = set()

    @property
    def num_wanted(self) -> int:
        """How many more blocks could be handed out at once."""
        places = sum((PER_ACTOR - load) * len(actors) for load, actors in enumerate(self._free))
        return max(0, places - len(self._fresh))

    @property
    def num_in_flight(self) -> int:
        """Blocks that were planned and are not done."""
        return len(self._sizes)

    @property
    def num_slots(self) -> int:
        """Slots that have an actor, or will."""
        return len(self._slots)

    def add_slot(self, slot: int) -> list[Action]:
        """Note that a node has a place for an actor."""
        self._slots[slot] = 0
        return [self._start(slot)]

    def lose_slot(self, slot: int) -> list[Action]:
        """Note that the node of a slot is gone, and its actor with it."""
        self._slots.pop(slot, None)
        gone = [actor for actor, state in self._actors.items() if state.slot == slot]
        return [action for actor in gone for action in self.on_died(actor)]

    def plan(self, block: int, size: int) -> list[Action]:
        """Take a block of so many records that is to be done."""
        self._sizes[block] = size
        self._fresh.append(block)
        return self._assign()

    def on_ready(self, actor: int) -> list[Action]:
        """Note that an actor has loaded the model."""
        state = self._actors.get(actor)
        if state is None or state.is_ready:
            return []
        state.is_ready = True
        self._slots[state.slot] = 0
        self._file(actor, state)
        return self._assign()

    def on_done(self, actor: int, block: int) -> list[Action]:
        """Note that an actor has done its work on a block."""
        state = self._actors.get(actor)
        if state is None or block not in state.works:
            return []
        work = state.works.pop(block)
        actions: list[Action] = []
        if work.alone:
            state.is_full = False
            suspect = self._suspects[block]
            if suspect.survived():
                del self._suspects[block]
            else:
                actions += self._put_back(suspect)
        if block not in self._suspects:
            del self._sizes[block]
            actions.append(Finish(block))
        self._file(actor, state)
        return actions + self._assign()

    def on_died(self, actor: int) -> list[Action]:
        """Note that an actor has ended of itself, or was lost."""
        state = self._actors.pop(actor, None)
        if state is None:
            return []
        self._unfile(actor)
        actions: list[Action] = []
        for work in state.works.values():
            suspect = self._suspects.get(work.block)
            if suspect is None:
                suspect = Suspect(work.block, self._sizes[work.block], self._batch_size)
                self._suspects[work.block] = suspect
            else:
                suspect.died()
            actions += self._put_back(suspect)
        return actions + self._restart(state) + self._assign()

    def _put_back(self, suspect: Suspect) -> list[Action]:
        self._waiting.append(suspect)
        return [GiveUp(suspect.block)] if suspect.is_hopeless else []

    def _restart(self, state: _Actor) -> list[Action]:
        if state.slot not in self._slots:
            return []
        self._slots[state.slot] += not state.is_ready
        if self._slots[state.slot] < MAX_FAILED_STARTS:
            return [self._start(state.slot)]
        del self._slots[state.slot]
        return [Retire(state.slot)]

    def _start(self, slot: int) -> Start:
        actor = next(self._numbers)
        self._actors[actor] = _Actor(slot)
        return Start(slot, actor)

    def _assign(self) -> list[Action]:
        """Hand out what can be: a suspect to an actor with nothing else, all else by turns."""
        actions: list[Action] = []
        while self._waiting and self._free[0]:
            suspect = self._waiting.popleft()
            actions.append(self._hand(self._pick(0), suspect.next()))
        while len(self._reserved) > len(self._waiting):
            actor = self._reserved.pop()
            self._file(actor, self._actors[actor])
        load = 0
        while self._fresh and load < PER_ACTOR:
            if self._free[load]:
                actions.append(self._hand(self._pick(load), Work(self._fresh.popleft())))
            else:
                load += 1
        return actions

    def _pick(self, load: int) -> int:
        actor, _ = self._free[load].popitem(last=False)
        return actor

    def _hand(self, actor: int, work: Work) -> Assign:
        state = self._actors[actor]
        state.works[work.block] = work
        state.is_full = work.alone
        self._file(actor, state)
        return Assign(actor, work)

    def _file(self, actor: int, state: _Actor) -> None:
        self._unfile(actor)
        load = len(state.works)
        if state.is_full or load >= PER_ACTOR:
            return
        if load and len(self._reserved) < len(self._waiting):
            self._reserved.add(actor)
        else:
            self._free[load][actor] = None

    def _unfile(self, actor: int) -> None:
        self._reserved.discard(actor)
        for actors in self._free:
            actors.pop(actor, None)
