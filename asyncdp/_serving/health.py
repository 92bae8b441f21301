"""What earlier runs say of a model: whether it works, what runs cost, and how many to run at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MAX_COMPARED = 500  # characters of what an error says
_WITH_DIGITS = re.compile(r"\S*\d\S*")

Signature = tuple[type[BaseException], str]

_MIN_RAISED = 16  # runs that raised, before their cost counts: fewer may be chance
_KEPT_RUNS = 0.98  # of what is known of runs, at each new one
_KEPT_SAMPLES = 1 - 1 / 256  # of what is known of samples, at each new one
_MIN_VARIANCE = 0.5  # of the numbers of calls of runs, for their time by these to be known
_MIN_SHARE = 0.001  # of samples that are bad, as far as plans are concerned
_LIMITING_SHARE = 0.002  # below it batches are as large as may be, without a look at plans
_MAX_PLANNED = 32  # calls; sizes of larger parts are in proportion
_RUNS_OF_PLAN = 64  # for which a plan is used: it takes some 0.3 ms of the event loop
_MIN_GAIN = 0.05  # of the time of a sample, for which a batch is made smaller


class Health:
    """What earlier batches say of the model.

    Attributes:
        is_up: whether a batch has succeeded since the model was last found to be down.
        down: what the error says by which it was found to be down, if it still is.
        mixed: what the error says of batches that raised although each of their samples ran alone.
        culprit: what the error of the last sample says that raised alone.
    """

    def __init__(self) -> None:
        self.is_up = False
        self.down: Signature | None = None
        self.mixed: Signature | None = None
        self.culprit: Signature | None = None
        self._share = 0.0  # of samples that are bad
        self._num_raised = 0
        self._seconds = {False: _Line(), True: _Line()}  # that a run takes, by whether it raises
        self._plan: Plan | None = None
        self._num_runs = 0  # since the plan was made

    def on_run(self, num_calls: int, seconds: float, *, raised: bool) -> None:
        """Take note of how long a run took."""
        self._num_raised += raised
        self._num_runs += 1
        self._seconds[raised].add(num_calls, seconds)
        if not raised:
            self._share *= _KEPT_SAMPLES**num_calls
        elif num_calls == 1:
            self._share = 1 + _KEPT_SAMPLES * (self._share - 1)

    @property
    def raised_cost(self) -> float:
        """The time of a run that raises, of that of one that succeeds; at most 1."""
        if self._num_raised < _MIN_RAISED or not self._seconds[False].mean:
            return 1.0
        return min(1.0, max(0.01, self._seconds[True].mean / self._seconds[False].mean))

    def part_size(self, num_suspects: int) -> int:
        """Return how many of some calls, of which not all are fine, to run next."""
        if num_suspects <= _MAX_PLANNED:
            return self._current_plan().part_sizes[num_suspects]
        return num_suspects * self._current_plan().part_sizes[_MAX_PLANNED] // _MAX_PLANNED

    def batch_size(self, num_calls: int) -> int:
        """Return how many of some calls that have not run yet to run together.

        Fewer than all if bad samples are so frequent, and small batches so quick, that this takes less time.
        """
        if self._share < _LIMITING_SHARE:
            return num_calls
        return min(num_calls, self._current_plan().batch_size or num_calls)

    def on_success(self, num_calls: int) -> None:
        """Take note of a batch that succeeded."""
        self.is_up, self.down = True, None
        if num_calls > 1:
            self.mixed = None

    def on_down(self, error: BaseException) -> None:
        """Take note that whatever is run fails."""
        self.is_up, self.down = False, signature(error)
        self._share, self._plan = 0.0, None

    def _current_plan(self) -> Plan:
        if self._plan is None or self._num_runs >= _RUNS_OF_PLAN:
            succeeds = self._seconds[False].fit()
            raises = succeeds if self._num_raised < _MIN_RAISED else self._seconds[True].fit(succeeds)
            self._plan = make_plan(succeeds, raises, min(0.5, max(_MIN_SHARE, self._share)))
            self._num_runs = 0
        return self._plan


class _Line:
    """How long runs take by the number of their calls: a line through the newest of them."""

    def __init__(self) -> None:
        self.mean = 0.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, num_calls: int, seconds: float) -> None:
        """Take note of a run; it weighs more than those before it."""
        self._weight = _KEPT_RUNS * self._weight + 1
        self._x = _KEPT_RUNS * self._x + num_calls
        self._y = _KEPT_RUNS * self._y + seconds
        self._xx = _KEPT_RUNS * self._xx + num_calls * num_calls
        self._xy = _KEPT_RUNS * self._xy + num_calls * seconds
        self.mean = self._y / self._weight

    def fit(self, like: tuple[float, float] = (1.0, 0.0)) -> tuple[float, float]:
        """Return the seconds of a run, and of each of its calls.

        Args:
            like: those of other runs. Theirs are in the same proportion if too little is known of these.
        """
        if self._weight == 0:
            return like
        size = self._x / self._weight
        variance = self._xx / self._weight - size * size
        if variance > _MIN_VARIANCE:
            slope = max(0.0, (self._xy / self._weight - size * self.mean) / variance)
        else:
            slope = self.mean * like[1] / (like[0] + like[1] * size)
        slope = min(slope, self.mean / size)
        return self.mean - slope * size, slope


@dataclass(frozen=True, slots=True)
class Plan:
    """How many calls to run at once.

    Attributes:
        part_sizes: of some calls of which not all are fine, by their number.
        batch_size: of calls of which nothing is known; None if it takes no less time than all of them.
    """

    part_sizes: list[int]
    batch_size: int | None


def make_plan(succeeds: tuple[float, float], raises: tuple[float, float], share: float) -> Plan:
    """Return the sizes by which calls are answered in the least time, by dynamic programming.

    This is adaptive group testing in which a test that passes is the work itself. If a part of calls of which
    one is bad succeeds, the bad one is among the others; if it raises, it is in the part, and nothing is
    known of the others any more, which then cost what any call costs. That is what is looked for, so it is
    found in rounds.

    Args:
        succeeds: seconds of a run that succeeds, and of each of its calls.
        raises: those of a run that raises.
        share: of calls that are bad.
    """
    counts = range(_MAX_PLANNED + 1)
    fine = [(1 - share) ** count for count in counts]
    passing = [succeeds[0] + succeeds[1] * count for count in counts]
    failing = [raises[0] + raises[1] * count for count in counts]
    each = passing[-1] / _MAX_PLANNED  # seconds that a call costs
    for _ in range(2):
        seconds, part_sizes = [0.0, failing[1]], [0, 1]  # until calls are done of which not all are fine
        for count in counts[2:]:
            bad = 1 - fine[count]
            found = []
            for size in _sizes_below(count):
                chance = (fine[size] - fine[count]) / bad
                passes = passing[size] + seconds[count - size]
                fails = failing[size] + seconds[size] + each * (count - size)
                found.append((chance * passes + (1 - chance) * fails, size))
            best = min(found)
            seconds.append(best[0])
            part_sizes.append(best[1])
        costs = [
            (fine[size] * passing[size] + (1 - fine[size]) * (failing[size] + (size > 1) * seconds[size]))
            / size
            for size in counts[1:]
        ]
        each = min(costs)
    batch_size = 1 + costs.index(each)
    return Plan(part_sizes, batch_size if each < (1 - _MIN_GAIN) * costs[-1] else None)


def _sizes_below(count: int) -> set[int]:
    """Return sizes of parts to choose from: about half, all but one, and a few small ones."""
    small = (1, 2, 3, 4, 6, 8, 11, 16, 22)
    return {count // 2, count - 1, *(size for size in small if size < count)}


def signature(error: BaseException) -> Signature:
    """Return what an error says, but for what may differ from run to run: times, sizes, addresses, ids.

    Unlike the error, it keeps nothing alive.
    """
    return type(error), _WITH_DIGITS.sub("#", str(error)[:_MAX_COMPARED])
