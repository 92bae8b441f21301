"""Which samples make a batch raise; free of threads, clocks and loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .call import CallState, Request
from .health import Health, signature

_NUM_PROBES = 4  # of 10,000 calls of which 1 in 20 is bad, none gets blamed with a model that works

_MAX_RAISED = 8  # runs of one search, before samples run alone to see whether the model is down


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
        max_raised: parts that may raise before some samples run alone, even if those runs cost little.

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
        max_raised: float = _MAX_RAISED,
    ) -> None:
        self.error = error
        self.put_back: list[Request] = []
        self.is_model_down = False
        self.num_raised = 1
        self._health = health
        self._num_culprits = 0
        self._one_by_one = one_by_one
        self._max_raised = max_raised
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
        is_due = not self._suspects or cost > 1 or self.num_raised >= self._max_raised
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
            self._health.culprit = signature(error)
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


def start_search(calls: Sequence[Request], error: BaseException, health: Health) -> Search:
    """Return the search for the culprits of a batch that raised `error`."""
    found = signature(error)
    if found == health.mixed:
        return Search(calls, error, health, one_by_one=True)
    if not health.is_up:
        return Search(calls, error, health, num_probes=1 if found == health.down else 2, probes_first=True)
    # An error that samples are known to raise alone hardly says that the model is down.
    max_raised = math.inf if found == health.culprit else _MAX_RAISED
    return Search(calls, error, health, num_probes=_NUM_PROBES, max_raised=max_raised)
