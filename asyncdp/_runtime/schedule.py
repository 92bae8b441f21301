"""The whole life of passes as a pure state machine, free of threads, clocks, I/O and torch.

Each method takes one event and returns the actions that follow from it. The scheduler calls them under
its lock, in the order of the events, and performs the actions in theirs.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field


class LaneState(enum.Enum):
    """Whether a lane takes tasks."""

    OPEN = "open"
    SUSPECT = "suspect"
    """A task has run for too long; others use it only if they must."""
    CLOSED = "closed"
    LOST = "lost"


class PassState(enum.Enum):
    """How far a pass has come."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Progress:
    """What the schedule knows of one pass; it alone changes all of it.

    Attributes:
        lanes: the lane of each task of the current stage.
        num_stages_left: stages that follow the current one.
        num_tasks_left: tasks of the current stage that have not ended.
        on_cancel: called when it is cancelled, for tasks that wait for something.
    """

    lanes: Sequence[int]
    num_stages_left: int = 0
    num_tasks_left: int = field(default=0, init=False)
    state: PassState = field(default=PassState.NEW, init=False)
    has_failed: bool = field(default=False, init=False)
    is_cancelled: bool = field(default=False, init=False)
    on_cancel: Callable[[], object] | None = field(default=None, init=False)

    @property
    def is_ended(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state.value in ("done", "failed", "cancelled")


@dataclass(slots=True)
class Enqueue:
    """Put the tasks of the pass's stage on their lanes; `first`, ahead of what is queued there."""

    pass_: Progress
    first: bool = False


@dataclass(slots=True)
class Advance:
    """Make the next stage, and answer by `on_stage_made` or `on_stage_failed`; `lane` ended last."""

    pass_: Progress
    lane: int


@dataclass(slots=True)
class Discard:
    """Take the pass's tasks that have not begun off their lanes; answer each by `on_task_done`."""

    pass_: Progress


@dataclass(slots=True)
class Reject:
    """The pass has ended: `lane` is not open, or if None nothing is taken any more."""

    pass_: Progress
    lane: int | None


@dataclass(slots=True)
class Complete:
    """The pass has ended, and nothing of it runs."""

    pass_: Progress


@dataclass(slots=True)
class Clear:
    """Take everything off a lost lane's queue; answer each task by `on_task_done`, as failed."""

    lane: int


@dataclass(slots=True)
class Stop:
    """End all lanes: nothing runs, and nothing more will come."""


Action = Enqueue | Advance | Discard | Reject | Complete | Clear | Stop


def split_sizes(num_rows: int, num_lanes: int) -> list[int]:
    """Return balanced shard lengths: 9 rows on 4 lanes give 3, 2, 2, 2.

    With fewer rows than lanes, fewer lanes; with no rows, one lane runs the empty shard.
    """
    num_shards = max(1, min(num_rows, num_lanes))
    small, num_larger = divmod(num_rows, num_shards)
    return [small + 1] * num_larger + [small] * (num_shards - num_larger)


class Schedule:
    """Which passes may put tasks on which lanes, and what becomes of each.

    A pass is admitted only when all lanes of its first stage have room, so that two passes can never
    hold half of each other's lanes. Passes are admitted in order of arrival; one may overtake only such
    as share no lane with it. One that needs more places on a lane than there are is admitted once all
    its lanes are idle. Later stages never wait.

    Args:
        max_queue: tasks that may be queued on a lane, the running one not counted.

    Attributes:
        is_closed: whether new passes are rejected.
        num_running: passes admitted and not yet ended.
        counts: passes ended, by their last state.
        suspects: the lanes that hang.
        states: the state of each lane.
        loads: how many tasks are admitted to each lane and have not ended.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.is_closed = False
        self.num_running = 0
        self.counts: Counter[PassState] = Counter()
        self.suspects: set[int] = set()
        self.states: list[LaneState] = []
        self.loads: list[int] = []
        self._waiting: dict[Progress, None] = {}

    @property
    def num_waiting(self) -> int:
        """Passes that wait for room."""
        return len(self._waiting)

    def add_lane(self) -> int:
        """Add an open lane and return its number."""
        self.states.append(LaneState.OPEN)
        self.loads.append(0)
        return len(self.states) - 1

    def pick(self, candidates: Iterable[int], count: int) -> list[int]:
        """Return the `count` least busy open lanes among `candidates`, in the candidates' order.

        Of any lanes if too few are open.
        """
        order = list(candidates)
        usable = [lane for lane in order if self.states[lane] is LaneState.OPEN]
        if len(usable) < count:
            usable = order
        if count == 1:
            return [min(usable, key=self.loads.__getitem__)]
        chosen = set(sorted(usable, key=self.loads.__getitem__)[:count])
        return [lane for lane in usable if lane in chosen]

    def submit(self, pass_: Progress) -> list[Action]:
        """Take note of a new pass: it is admitted, waits for room (no action), or is rejected."""
        if self.is_closed:
            return self._reject(pass_, None)
        for lane in pass_.lanes:
            if self.states[lane] in (LaneState.CLOSED, LaneState.LOST):
                return self._reject(pass_, lane)
        if (self._waiting and self._is_behind_waiting(pass_)) or not self._take_if_room(pass_.lanes):
            pass_.state = PassState.WAITING
            self._waiting[pass_] = None
            return []
        return self._begin_stage(pass_, first=False)

    def on_task_done(self, pass_: Progress, lane: int, *, failed: bool) -> list[Action]:
        """Take note of a task that has ended, or was discarded."""
        assert self.loads[lane] > 0
        self.loads[lane] -= 1
        pass_.num_tasks_left -= 1
        pass_.has_failed |= failed
        actions = self._admit_waiting() if self._waiting else []
        if pass_.num_tasks_left == 0:
            actions += self._end_stage(pass_, lane)
        return actions

    def on_stage_made(self, pass_: Progress, lanes: Sequence[int]) -> list[Action]:
        """Begin the next stage of a pass: it takes places however long the queues are."""
        pass_.lanes = lanes
        pass_.num_stages_left -= 1
        for lane in lanes:
            if self.states[lane] is LaneState.LOST:
                return self._end(pass_, PassState.FAILED, Reject(pass_, lane))
        for lane in lanes:
            self.loads[lane] += 1
        return self._begin_stage(pass_, first=True)

    def on_stage_failed(self, pass_: Progress) -> list[Action]:
        """Take note that the next stage could not be made."""
        return self._end(pass_, PassState.FAILED, Complete(pass_))

    def cancel(self, pass_: Progress) -> list[Action]:
        """Give a pass up: it ends once what runs of it has ended."""
        if pass_.is_ended:
            return []
        pass_.is_cancelled = True
        if pass_.state is not PassState.WAITING:
            return [Discard(pass_)]
        del self._waiting[pass_]
        pass_.state = PassState.CANCELLED
        self.counts[pass_.state] += 1
        return [*self._admit_waiting(), Complete(pass_)]  # those behind it on lanes that have room

    def mark_lost(self, lane: int) -> list[Action]:
        """Take note that the device under `lane` is lost: nothing runs there any more."""
        if self.states[lane] is LaneState.LOST:
            return []
        self.states[lane] = LaneState.LOST
        self.suspects.discard(lane)
        actions = [
            action
            for pass_ in list(self._waiting)
            if lane in pass_.lanes
            for action in self._reject(pass_, lane)
        ]
        return [*actions, *self._admit_waiting(), Clear(lane)]

    def mark_suspect(self, lane: int, *, suspect: bool) -> bool:
        """Take note that a lane hangs, or that it has answered; return whether that is news."""
        before, after = LaneState.OPEN, LaneState.SUSPECT
        if not suspect:
            before, after = after, before
        if self.states[lane] is not before:
            return False
        self.states[lane] = after
        self.suspects ^= {lane}
        return True

    def close(self) -> list[Action]:
        """Take nothing more; what was admitted goes on, what waits is rejected."""
        if self.is_closed:
            return []
        self.is_closed = True
        self.suspects.clear()
        self.states = [state if state is LaneState.LOST else LaneState.CLOSED for state in self.states]
        actions = [action for pass_ in list(self._waiting) for action in self._reject(pass_, None)]
        return actions if self.num_running else [*actions, Stop()]

    def _begin_stage(self, pass_: Progress, *, first: bool) -> list[Action]:
        """Begin the first or a later stage of a pass whose tasks have their places."""
        if pass_.state is not PassState.RUNNING:
            pass_.state = PassState.RUNNING
            self.num_running += 1
        pass_.num_tasks_left = len(pass_.lanes)
        return [Enqueue(pass_, first)] if pass_.lanes else self._end_stage(pass_, 0)

    def _end_stage(self, pass_: Progress, lane: int) -> list[Action]:
        if pass_.is_cancelled:  # then nothing else that happened to it counts
            return self._end(pass_, PassState.CANCELLED, Complete(pass_))
        if pass_.has_failed:
            return self._end(pass_, PassState.FAILED, Complete(pass_))
        if pass_.num_stages_left:
            return [Advance(pass_, lane)]
        return self._end(pass_, PassState.DONE, Complete(pass_))

    def _end(self, pass_: Progress, state: PassState, action: Action) -> list[Action]:
        """End an admitted pass."""
        pass_.state = state
        self.counts[state] += 1
        self.num_running -= 1
        return [action, Stop()] if self.is_closed and self.num_running == 0 else [action]

    def _reject(self, pass_: Progress, lane: int | None) -> list[Action]:
        """End a pass that was never admitted."""
        self._waiting.pop(pass_, None)
        pass_.state = PassState.FAILED
        self.counts[pass_.state] += 1
        return [Reject(pass_, lane)]

    def _is_behind_waiting(self, pass_: Progress) -> bool:
        return any(not set(pass_.lanes).isdisjoint(other.lanes) for other in self._waiting)

    def _take_if_room(self, lanes: Sequence[int]) -> bool:
        """Take a place on each lane, or on none; a lane may be named more than once."""
        limit = self.max_queue + 1
        for position, lane in enumerate(lanes):
            if self.loads[lane] >= limit:
                for taken in lanes[:position]:
                    self.loads[taken] -= 1
                return self._take_if_idle(lanes)
            self.loads[lane] += 1
        return True

    def _take_if_idle(self, lanes: Sequence[int]) -> bool:
        """Take the places if no lane has anything to do: however many they are, more room never comes."""
        if any(self.loads[lane] for lane in lanes):
            return False
        for lane in lanes:
            self.loads[lane] += 1
        return True

    def _admit_waiting(self) -> list[Action]:
        actions: list[Action] = []
        passed_over: set[int] = set()
        for pass_ in list(self._waiting):
            if passed_over.isdisjoint(pass_.lanes) and self._take_if_room(pass_.lanes):
                del self._waiting[pass_]
                actions += self._begin_stage(pass_, first=False)
            else:
                passed_over.update(pass_.lanes)
                if len(passed_over) == len(self.states):
                    break
        return actions
