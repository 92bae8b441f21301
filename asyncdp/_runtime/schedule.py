"""The decisions of the scheduler, free of threads, clocks, I/O and torch.

Every method takes one thing that happened and returns what is to be done about it. The runtime
calls them under its lock and performs what they return.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field


class LaneState(enum.Enum):
    """Whether a lane takes work."""

    OPEN = "open"
    CLOSED = "closed"
    LOST = "lost"


_OPEN = LaneState.OPEN  # looked up once: an enumeration's members are slow to get at


@dataclass(slots=True)
class Admit:
    """Put this ticket's work on its lanes now."""

    ticket: Hashable


@dataclass(slots=True)
class Refuse:
    """This ticket will never run: `lane` is not open, or the whole schedule is closed if None."""

    ticket: Hashable
    lane: int | None


Action = Admit | Refuse


def split_sizes(num_rows: int, num_lanes: int) -> list[int]:
    """Balanced shard lengths: 9 rows on 4 lanes give 3, 2, 2, 2.

    With fewer rows than lanes, fewer lanes; with no rows, one lane runs the empty shard.
    """
    num_shards = max(1, min(num_rows, num_lanes))
    small, num_larger = divmod(num_rows, num_shards)
    return [small + 1] * num_larger + [small] * (num_shards - num_larger)


@dataclass(slots=True)
class _Lane:
    state: LaneState = LaneState.OPEN
    load: int = 0  # works admitted and not yet finished


@dataclass(slots=True)
class Schedule:
    """Which tickets may put work on which lanes.

    A ticket names the lanes it needs and is admitted only when all of them have room, so that two
    tickets can never hold half of each other's lanes. Tickets are admitted in order of arrival;
    one may overtake only such as share no lane with it. One that needs more places on a lane than it
    has is admitted once all its lanes are idle.

    Args:
        num_lanes: lanes, named 0 .. num_lanes - 1.
        max_queue: works that may be queued on a lane, the running one not counted.
    """

    num_lanes: int
    max_queue: int
    closed: bool = False
    _lanes: list[_Lane] = field(init=False)
    _waiting: dict[Hashable, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lanes = [_Lane() for _ in range(self.num_lanes)]

    @property
    def num_waiting(self) -> int:
        """Tickets that wait for room."""
        return len(self._waiting)

    def state(self, lane: int) -> LaneState:
        """The state of one lane."""
        return self._lanes[lane].state

    def load(self, lane: int) -> int:
        """Works admitted to one lane and not yet finished."""
        return self._lanes[lane].load

    def add_lane(self) -> int:
        """Add an open lane and return its number."""
        self._lanes.append(_Lane())
        self.num_lanes += 1
        return self.num_lanes - 1

    def pick(self, candidates: Iterable[int], count: int) -> list[int]:
        """The `count` least busy open lanes among `candidates`, in the candidates' order."""
        order = list(candidates)
        usable = [lane for lane in order if self._lanes[lane].state is _OPEN] or order
        if count == 1:
            return [min(usable, key=lambda lane: self._lanes[lane].load)]
        chosen = set(sorted(usable, key=lambda lane: self._lanes[lane].load)[:count])
        return [lane for lane in usable if lane in chosen]

    def submit(self, ticket: Hashable, lanes: Sequence[int]) -> Action | None:
        """A ticket arrives and needs one place on each of `lanes`; None means that it has to wait."""
        if self.closed:
            return Refuse(ticket, None)
        for lane in lanes:
            if self._lanes[lane].state is not _OPEN:
                return Refuse(ticket, lane)
        if (self._waiting and self._is_behind_waiting(lanes)) or not self._take_if_room(lanes):
            self._waiting[ticket] = lanes
            return None
        return Admit(ticket)

    def proceed(self, lanes: Sequence[int]) -> int | None:
        """An admitted ticket goes on to its next stage; it never waits for room a second time.

        Returns:
            None, or the first of `lanes` that is lost (then nothing was taken).
        """
        for lane in lanes:
            if self._lanes[lane].state is LaneState.LOST:
                return lane
        for lane in lanes:
            self._lanes[lane].load += 1
        return None

    def finish(self, lane: int) -> Sequence[Action]:
        """One work of `lane` has ended, or was dropped."""
        assert self._lanes[lane].load > 0
        self._lanes[lane].load -= 1
        return self._admit_waiting() if self._waiting else ()

    def withdraw(self, ticket: Hashable) -> Sequence[Action] | None:
        """A ticket is cancelled; None means that it does not wait for room any more."""
        if self._waiting.pop(ticket, None) is None:
            return None
        return self._admit_waiting()  # those behind it on lanes that have room

    def lose(self, lane: int) -> list[Action]:
        """The device under `lane` is lost: refuse everyone who waits for it."""
        self._lanes[lane].state = LaneState.LOST
        refused = [ticket for ticket, lanes in self._waiting.items() if lane in lanes]
        for ticket in refused:
            del self._waiting[ticket]
        return [*(Refuse(ticket, lane) for ticket in refused), *self._admit_waiting()]

    def close(self) -> list[Action]:
        """Take nothing more; what was admitted goes on, what waits is refused."""
        self.closed = True
        for lane in self._lanes:
            if lane.state is LaneState.OPEN:
                lane.state = LaneState.CLOSED
        refused = [Refuse(ticket, None) for ticket in self._waiting]
        self._waiting.clear()
        return list(refused)

    def _is_behind_waiting(self, lanes: Sequence[int]) -> bool:
        return any(not set(lanes).isdisjoint(needed) for needed in self._waiting.values())

    def _take_if_room(self, lanes: Sequence[int]) -> bool:
        """Take a place on each lane, or on none; a lane may be named more than once."""
        limit = self.max_queue + 1
        for position, lane in enumerate(lanes):
            if self._lanes[lane].load >= limit:
                for taken in lanes[:position]:
                    self._lanes[taken].load -= 1
                return self._take_if_idle(lanes)
            self._lanes[lane].load += 1
        return True

    def _take_if_idle(self, lanes: Sequence[int]) -> bool:
        """Take the places if no lane has anything to do: however many they are, more room never comes."""
        if any(self._lanes[lane].load for lane in lanes):
            return False
        for lane in lanes:
            self._lanes[lane].load += 1
        return True

    def _admit_waiting(self) -> list[Action]:
        actions: list[Action] = []
        passed_over: set[int] = set()
        for ticket, lanes in list(self._waiting.items()):
            if passed_over.isdisjoint(lanes) and self._take_if_room(lanes):
                del self._waiting[ticket]
                actions.append(Admit(ticket))
            else:
                passed_over.update(lanes)
                if len(passed_over) == self.num_lanes:
                    break
        return actions
