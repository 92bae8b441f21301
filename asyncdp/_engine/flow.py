"""The batches of one stream, between the task that reads them and the tasks that take their results."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import anyio

from .. import _loops
from .._loops import Completion, Waiter, wake
from .._runtime import Task, scheduler_of
from .._runtime.lane_runner import StatefulLaneRunner
from .._runtime.passes import Pass
from .._runtime.schedule import PassState
from .._runtime.task import last_seconds
from .._verbs.batch import arguments
from .prefetch import Prefetcher
from .source import SourceFailure

_QUICK_SECONDS = 1e-3
_QUICK_PER_LANE = 8


class Outcome(NamedTuple):
    """What became of one batch."""

    value: Any
    error: BaseException | None = None


class Flow(SourceFailure):
    """Runs batches, and gives out what became of them; all on one event loop.

    A batch is a pass that no task waits for: its end is a call by the loop, and one wake-up may carry any
    number of them. Nothing here may refer to the stream: only the deletion of that ends what fills it.

    Args:
        runner: runs the batches, in the state of now.
        ordered: whether results are given in the order of the batches.
        max_in_flight: batches that were started and whose results were not taken; None for two per lane,
            and more where they are quick.

    Attributes:
        closing: whether the stream is closed by its reader.
        closed: finished when the task that fills the stream has ended.
    """

    def __init__(self, runner: StatefulLaneRunner, ordered: bool, max_in_flight: int | None) -> None:
        self.closing = False
        self.closed: list[Completion] = []
        self._runner = runner
        self._scheduler = scheduler_of(runner.runtime)
        self._num_threads = self._scheduler.thread_share(len(runner.lanes))
        self._state = runner.capture()
        # Read here, since a mode that is on during an await leaks into other tasks.
        self._ambient = self._scheduler.ambient()
        self._prefetcher = Prefetcher(runner.lanes)
        self._ordered = ordered
        self._max_in_flight = max_in_flight
        self._num_started = 0
        self._num_taken = 0
        self._running: dict[int, Pass] = {}
        self._outcomes: OrderedDict[int, Outcome] = OrderedDict()  # in the order of completion
        self._has_ended = False
        self._filler: Waiter | None = None
        self._readers: list[Waiter] = []
        self._is_read = False  # the source, to its end
        self._on_idle: Callable[[], object] = bool  # called once it is read and nothing runs

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self._has_ended

    def check_not_nested(self) -> None:
        """Raise `NestedPassError` on a lane of the very runtime that runs the batches."""
        self._scheduler.check_not_nested()

    # What fills the stream.

    @property
    def _limit(self) -> int:
        if self._max_in_flight is not None:
            return self._max_in_flight
        lanes = self._runner.lanes
        # Two, so that while one runs the next is ready. Of quick ones several have ended at each wake-up.
        return len(lanes) * (_QUICK_PER_LANE if last_seconds(lanes[0]) < _QUICK_SECONDS else 2)

    async def wait_room(self) -> None:
        """Wait until one more batch may be started."""
        while self._num_started - self._num_taken >= self._limit:
            self._filler = _loops.current().waiter()
            await self._filler

    def start(self, batch: Any) -> None:
        """Put a batch on a lane."""
        index = self._num_started
        self._num_started += 1
        try:
            position = self._runner.pick()
            lane = self._runner.lanes[position]
            inputs = self._prefetcher.start(lane, arguments(batch))
            self._running[index] = self._scheduler.start(
                Task(lane, partial(_run, self._runner, self._state, position, inputs), "run"),
                partial(self._on_end, index),
                num_threads=self._num_threads,
                ambient=self._ambient.copy(),
            )
        except BaseException as error:
            self._put(index, Outcome(None, error))

    def note_read(self) -> None:
        """Take note that no more batches come."""
        self._is_read = True
        self._check_idle()

    async def wait_idle(self) -> None:
        """Wait until no more batches come and none runs; a cancellation cancels those that do, at once."""
        idle = _loops.current().waiter()
        self._on_idle = partial(wake, idle)
        try:
            await idle
        except BaseException:
            self._cancel()
            raise

    async def drain(self) -> None:
        """Wait until what was cancelled has ended."""
        if self._running:
            drained = _loops.current().completion(bool)  # the wait goes on to its end
            self._on_idle = drained.finish
            # Without the shield anyio would cancel the wait again and again on asyncio.
            with anyio.CancelScope(shield=True):
                await drained

    def end(self) -> None:
        """Take note that nothing more will come."""
        self._prefetcher.close()
        self._has_ended = True
        self._wake_readers()
        for completion in self.closed:
            completion.finish()

    def _cancel(self) -> None:
        for pass_ in self._running.values():
            self._scheduler.cancel(pass_)

    # What reads it.

    async def get(self) -> Outcome | None:
        """Return the next outcome, or None at the end of the stream."""
        while (outcome := self._take()) is None and not self._has_ended:
            reader = _loops.current().waiter()
            self._readers.append(reader)
            await reader
        return outcome

    def _take(self) -> Outcome | None:
        if self._ordered:
            outcome = self._outcomes.pop(self._num_taken, None)
        else:
            outcome = self._outcomes.popitem(last=False)[1] if self._outcomes else None
        if outcome is not None:
            self._num_taken += 1
            if self._filler is not None:
                wake(self._filler)
        return outcome

    # Ends of batches.

    def _on_end(self, index: int, pass_: Pass) -> None:
        del self._running[index]
        if pass_.results:
            self._put(index, Outcome(pass_.results[0]))
        elif pass_.state is not PassState.CANCELLED:
            self._put(index, Outcome(None, pass_.take_failure()))
        self._check_idle()

    def _check_idle(self) -> None:
        if self._is_read and not self._running:
            self._on_idle()

    def _put(self, index: int, outcome: Outcome) -> None:
        self._outcomes[index] = outcome
        if not self._ordered or index == self._num_taken:
            self._wake_readers()

    def _wake_readers(self) -> None:
        while self._readers:
            wake(self._readers.pop())


def _run(
    runner: StatefulLaneRunner,
    state: Any,
    position: int,
    inputs: Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]]],
) -> Any:
    args, kwargs = inputs()
    return runner.run_as(position, state, *args, **kwargs)
