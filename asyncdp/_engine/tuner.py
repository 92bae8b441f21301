"""How many lanes pay, learned from the durations of calls.

Splitting a small batch costs more than it saves. For every workload the tuner tries each number of lanes
in turns, so that other load on the machine affects all of them alike, and stays with the quickest. From
time to time it learns again. It decides and counts; it reads no clock and runs nothing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

TURN = 3
"""Calls in a row on one number of lanes; the first of them only warms up caches and threads."""

MIN_TURNS = 2
MAX_TURNS = 4
"""Turns of each number of lanes: more than `MIN_TURNS` only while several are close."""

# A number of lanes that is slower than the best by this factor gets no further turns.
_CLOSE = 1.2
_MAX_WORKLOADS = 128
# Batches that a number of lanes runs as well as all lanes do: one alone may hide a difference.
_MIN_COMPARED = 2
# Fewer lanes leave room for other passes and use less memory: a tie goes to them.
_TIE = 1.03
# Learned again after this many calls in a row that took longer or shorter by this factor,
_WINDOW = 16
_DRIFT = 1.6
# and after so many calls in any case: the first trials may have met a busy moment. After each of the
# two, this times as many calls have to pass before the next.
_RECHECK = 256
_RARER = 4


@dataclass(frozen=True)
class LaneChoice:
    """What the engine does with one kind of call, and why."""

    workload: str
    """The kind of call, its mode and its shapes."""
    num_lanes: int
    """Lanes it takes now."""
    reason: str
    costs: dict[int, float]
    """Seconds of a call for each number of lanes tried: the lower quartile of the trials."""
    num_probes: int
    """Calls used for learning."""
    num_calls: int


@dataclass
class Workload:
    """What is known of one kind of call.

    Args:
        name: its name in statistics.
        candidates: numbers of lanes to choose from, the most first.
    """

    name: str
    candidates: list[int]
    trials: dict[int, list[float]] = field(default_factory=dict)
    num_turns: int = 0
    chosen: int | None = None
    expected: float = 0.0  # seconds of a call on that many, by the trials
    reason: str = "still learning"
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    num_probes: int = 0
    num_calls: int = 0
    patience: int = _WINDOW
    recheck: int = _RECHECK
    calls_since_choice: int = 0
    size: int | None = None
    shape: Hashable = None
    num_compared: Counter[int] = field(default_factory=Counter)  # batches that gave the same on all lanes

    @property
    def is_learning(self) -> bool:
        """Whether the next call is a trial."""
        return self.chosen is None

    def choose(self) -> int:
        """Return the number of lanes for the next call."""
        if self.chosen is not None:
            return self.chosen
        return next(count for count in self._in_the_running() if self._is_due(count))

    def costs(self) -> dict[int, float]:
        """Return the seconds of a call on each number of lanes tried."""
        counted = {
            count: sorted(time for place, time in enumerate(times) if place % TURN)
            for count, times in self.trials.items()
        }
        return {count: times[(len(times) - 1) // 4] for count, times in counted.items() if times}

    def fix(self, reason: str) -> None:
        """Stay on all lanes from now on."""
        self.chosen = self.candidates[0]
        self.reason = reason
        self.trials = {}

    def agrees(self, shape: Hashable) -> bool:
        """Return whether a result has the shape of the first call's."""
        if self.shape is None:
            self.shape = shape
        return self.shape == shape

    def is_compared(self, num_lanes: int) -> bool:
        """Return whether a number of lanes is known to give what all lanes give."""
        return self.num_compared[num_lanes] >= _MIN_COMPARED

    def record(self, num_lanes: int, seconds: float, size: int = 1) -> None:
        """Record the duration of a call of `size` elements."""
        self.num_calls += 1
        # Calls of one workload differ a little in size: durations are scaled to the size of the first.
        self.size = self.size or size
        seconds *= self.size / max(1, size)
        if self.chosen is None:
            self._record_trial(num_lanes, seconds)
        elif num_lanes == self.chosen and self.trials:
            self._watch(seconds)

    def _is_due(self, count: int) -> bool:
        return len(self.trials.get(count, ())) < TURN * (self.num_turns + 1)

    def _in_the_running(self) -> list[int]:
        """Return the numbers of lanes that get further turns."""
        if self.num_turns < MIN_TURNS:
            return self.candidates
        costs = self.costs()
        limit = min(costs.values()) * _CLOSE
        return [count for count in self.candidates if costs[count] <= limit]

    def _record_trial(self, num_lanes: int, seconds: float) -> None:
        self.num_probes += 1
        self.trials.setdefault(num_lanes, []).append(seconds)
        if any(self._is_due(count) for count in self._in_the_running()):
            return
        self.num_turns += 1
        if self.num_turns == MAX_TURNS or len(self._in_the_running()) == 1:
            self._choose()

    def _choose(self) -> None:
        costs = self.costs()
        best = min(costs.values())
        self.chosen = min(count for count, cost in costs.items() if cost <= best * _TIE)
        self.expected = costs[self.chosen]
        self.reason = "least time" if costs[self.chosen] == best else "fewer lanes in about the least time"
        self.recent.clear()
        self.calls_since_choice = 0

    def _watch(self, seconds: float) -> None:
        """Learn again if calls have become slower or quicker than in the trials, or many have passed."""
        assert self.chosen is not None
        self.recent.append(seconds)
        self.calls_since_choice += 1
        if self.calls_since_choice >= self.recheck:
            self.recheck *= _RARER
            self._learn_again("to make sure")
        elif len(self.recent) == _WINDOW and self.calls_since_choice >= self.patience:
            expected = self.expected
            if min(self.recent) > expected * _DRIFT or max(self.recent) < expected / _DRIFT:
                # Rarer each time, so that a workload that never settles costs fewer and fewer probes.
                self.patience = min(self.patience * _RARER, 4096)
                self._learn_again("calls take another time than before")

    def _learn_again(self, reason: str) -> None:
        self.chosen, self.trials, self.num_turns = None, {}, 0
        self.reason = f"learning again: {reason}"


class Tuner:
    """Chooses how many lanes each workload takes.

    Args:
        num_lanes: the most there are.
    """

    def __init__(self, num_lanes: int) -> None:
        # The most first: the first call has to show the shape of its results when split.
        powers = [2**exponent for exponent in range(num_lanes.bit_length()) if 2**exponent < num_lanes]
        self._candidates = [num_lanes, *powers]
        self._workloads: OrderedDict[Hashable, Workload] = OrderedDict()

    def choices(self) -> tuple[LaneChoice, ...]:
        """Return what was chosen so far, the latest workload last."""
        return tuple(
            LaneChoice(each.name, each.choose(), each.reason, each.costs(), each.num_probes, each.num_calls)
            for each in self._workloads.values()
        )

    def workload(self, key: Hashable) -> Workload:
        """Return what is known of one kind of call; the least recently used kinds are dropped."""
        found = self._workloads.get(key)
        if found is None:
            found = self._workloads[key] = Workload(str(key), self._candidates)
            if len(self._workloads) > _MAX_WORKLOADS:
                self._workloads.popitem(last=False)
        self._workloads.move_to_end(key)
        return found
