"""Which samples make a batch raise; free of threads, clocks and loops."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .call import CallState, Request

_MAX_COMPARED = 500  # characters of what an error says
_WITH_DIGITS = re.compile(r"\S*\d\S*")

Signature = tuple[type[BaseException], str]

_NUM_PROBES = 4  # of 10,000 calls of which 1 in 20 is bad, none gets blamed with a model that works

_MAX_RAISED = 8  # runs of one search, before samples run alone to see whether the model is down
_MIN_RAISED = 16  # runs that raised, before their cost counts: fewer may be chance
_KEPT_RUNS = 0.98  # of what is known of runs, at each new one
_KEPT_SAMPLES = 1 - 1 / 256  # of what is known of samples, at each new one


class Health:
    """What earlier batches say of the model.

    Attributes:
        is_up: whether a batch has succeeded since the model was last found to be down.
        down: what the error says by which it was found to be down, if it still is.
        mixed: what the error says of batches that raised although each of their samples ran alone.
    """

    def __init__(self) -> None:
        self.is_up = False
        self.down: Signature | None = None
        self.mixed: Signature | None = None
        self._share = 0.0  # of samples that are bad
        self._num_raised = 0
        self._seconds = {False: 0.0, True: 0.0}  # that a run takes, by whether it raises

    def on_run(self, num_calls: int, seconds: float, *, raised: bool) -> None:
        """Take note of how long a run took."""
        self._num_raised += raised
        before = self._seconds[raised] or seconds
        self._seconds[raised] = seconds + _KEPT_RUNS * (before - seconds)
        if not raised:
            self._share *= _KEPT_SAMPLES**num_calls
        elif num_calls == 1:
            self._share = 1 + _KEPT_SAMPLES * (self._share - 1)

    @property
    def raised_cost(self) -> float:
        """The time of a run that raises, of that of one that succeeds; at most 1."""
        if self._num_raised < _MIN_RAISED or not self._seconds[False]:
            return 1.0
        return min(1.0, max(0.01, self._seconds[True] / self._seconds[False]))

    def part_size(self, num_suspects: int) -> int:
        """Return how many of some calls, of which not all are fine, to run next.

        If a run costs the same whether or not it raises, it says most if either is as likely: about half of
        the calls. A model that checks its inputs first raises at once: there larger parts, most of which
        raise, find a bad sample by fewer runs that take their time, and these answer more calls.
        """
        if num_suspects < 2:
            return num_suspects
        fine = 1 - min(0.5, max(0.001, self._share))
        raises = (1 - _success_chance(self.raised_cost)) * (1 - fine**num_suspects)
        return min(num_suspects - 1, max(1, round(math.log1p(-raises) / math.log(fine))))

    def on_success(self, num_calls: int) -> None:
        """Take note of a batch that succeeded."""
        self.is_up, self.down = True, None
        if num_calls > 1:
            self.mixed = None

    def on_down(self, error: BaseException) -> None:
        """Take note that whatever is run fails."""
        self.is_up, self.down = False, signature(error)
        self._share = 0.0

    def search(self, calls: Sequence[Request], error: BaseException) -> Search:
        """Return the search for the culprits of a batch that raised `error`."""
        if signature(error) == self.mixed:
            return Search(calls, error, self, one_by_one=True)
        if self.is_up:
            return Search(calls, error, self, num_probes=_NUM_PROBES)
        num_probes = 1 if signature(error) == self.down else 2
        return Search(calls, error, self, num_probes=num_probes, probes_first=True)


class Search:
    """Finds the samples that make a batch raise by running parts of it.

    A part that raises is divided again. What is then left beside it may be fine: it goes back to the queue,
    where it fills other batches. As long as nothing of the batch has succeeded, some samples are run alone;
    if all of those raise the same, the model is at fault and the rest need not be run.

    Args:
        calls: of the batch.
        error: what it raised.
        health: says how large parts should be, and what runs that raise cost.
        num_probes: samples that must raise alone for the model to be at fault.
        probes_first: whether to run those before any other part.
        one_by_one: whether to run every sample alone.

    Attributes:
        put_back: calls of which nothing is known any more; their taker clears it.
        is_model_down: whether all that is left fails with the error of the batch.
        num_raised: parts that raised, the whole batch included.
        is_complete: whether all calls have run to an end of their own: none was cancelled or lost before.
    """

    def __init__(
        self,
        calls: Sequence[Request],
        error: BaseException,
        health: Health,
        *,
        num_probes: int = 0,
        probes_first: bool = False,
        one_by_one: bool = False,
    ) -> None:
        self.error = error
        self.put_back: list[Request] = []
        self.is_model_down = False
        self.num_raised = 1
        self._health = health
        self._num_culprits = 0
        self._one_by_one = one_by_one
        self._is_up = num_probes == 0 and not one_by_one
        self._num_probes = num_probes
        self.is_complete = True
        self._is_probe = False  # whether the part that runs is one
        starts_alone = probes_first or one_by_one
        self._suspects: list[Request] = [] if starts_alone else list(calls)  # not all of them are fine
        self._others: list[Request] = list(calls) if starts_alone else []  # may be fine
        self._part: list[Request] = []

    @property
    def num_left(self) -> int:
        """Calls that no part has taken."""
        return len(self._suspects) + len(self._others)

    @property
    def is_fruitless(self) -> bool:
        """Whether a search that is over has found no sample that raises alone."""
        return self.is_complete and self._num_culprits == 0

    def take(self) -> list[Request]:
        """Take the next part to run; none if nothing is left to find out."""
        self._suspects = self._pending(self._suspects)
        self._others = self._pending(self._others)
        # A sample that runs alone takes its time for little, if other runs raise at once and so cost less.
        cost = self.num_raised * self._health.raised_cost
        is_due = not self._suspects or cost > 1 or self.num_raised >= _MAX_RAISED
        self._is_probe = is_due and bool(self._others)
        if self._is_probe:
            self._part = [self._others.pop(0 if self._one_by_one else len(self._others) // 2)]
        else:
            size = self._health.part_size(len(self._suspects))
            self._part, self._suspects = self._suspects[:size], self._suspects[size:]
        return self._part

    def on_success(self) -> None:
        """Take note that the part, or any other batch meanwhile, gave results."""
        if not self._one_by_one:
            self._note_up()

    def on_error(self, error: BaseException) -> None:
        """Take note that the part raised."""
        self.num_raised += 1
        if len(self._part) == 1:
            self._num_culprits += 1
        if self._one_by_one:
            return
        if signature(error) != signature(self.error):
            self._note_up()
        if self._is_probe:
            self._on_probe_failed()
        else:
            self._others += self._suspects
            self._suspects = self._part if len(self._part) > 1 else []
            if self._is_up or not self._suspects:
                self._release()

    def end(self) -> list[Request]:
        """Give the search up; return what is left."""
        left = [*self._suspects, *self._others]
        self._suspects, self._others = [], []
        return left

    def _pending(self, calls: list[Request]) -> list[Request]:
        pending = [call for call in calls if call.state is CallState.PENDING]
        self.is_complete &= len(pending) == len(calls)
        return pending

    def _on_probe_failed(self) -> None:
        self._num_probes -= 1
        if self._num_probes == 0 and not self._is_up:
            self.is_model_down = True
        elif self._is_up:
            self._release()

    def _note_up(self) -> None:
        """Take note that the model works; what was set aside to find that out is free."""
        if self._is_up:
            return
        self._is_up = True
        if self._suspects or self._num_culprits:
            self._release()
        else:
            self._suspects, self._others = self._others, []

    def _release(self) -> None:
        self.put_back += self._others
        self._others = []


def _success_chance(raised_cost: float) -> float:
    """Return how likely a run should succeed to say most for its cost: x, where x + x ** raised_cost = 1.

    Known from codes of two letters that differ in cost: the best ones use each letter by that law.
    """
    low, high = 0.0, 1.0
    for _ in range(20):
        x = (low + high) / 2
        if x + x**raised_cost < 1:
            low = x
        else:
            high = x
    return high


def signature(error: BaseException) -> Signature:
    """Return what an error says, but for what may differ from run to run: times, sizes, addresses, ids.

    Unlike the error, it keeps nothing alive.
    """
    return type(error), _WITH_DIGITS.sub("#", str(error)[:_MAX_COMPARED])
