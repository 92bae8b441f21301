"""A stream of training steps: batches read ahead, steps queued on the lanes, results in order."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
from torch import Tensor

from .. import _loops
from .._loops import Completion, Waiter, ends_tasks, is_cancelled, wake
from .._runtime import Lane
from .._training.commit import StepOptions
from .._training.pipeline import Pipeline, QueuedStep
from .._training.trainer import Trainer
from .._verbs.batch import Batch
from ..errors import NotAPairError
from .adaptive import Adaptive
from .prefetch import Prefetcher
from .source import END, Source, SourceFailure, sayable


@dataclass(frozen=True, slots=True)
class StepResult:
    """A training step that was taken; see `DataParallel.train`.

    Attributes:
        index: its number in the stream, from 0.
        rows: how many rows its batches have in this process; None if they have none.
        loss: of all these rows, 0-d and detached, on the engine's output device.
        learning_rate: of the optimizer's first group, as it stepped; a tensor where the optimizer has one,
            None where it has none.
    """

    index: int
    rows: int | None
    loss: Tensor
    learning_rate: float | Tensor | None


OnEnd = Callable[[int, StepResult | BaseException | None], object]


class Steps:
    """Puts steps on the lanes of an engine.

    Args:
        trainer: of the engine.
        options: what the user said of every step.
        adaptive: chooses the number of lanes; None where it is fixed.
        num_lanes: the most.
        dim: the dimension of rows.
        lanes: of the engine.
    """

    def __init__(
        self,
        trainer: Trainer,
        options: StepOptions,
        adaptive: Adaptive | None,
        num_lanes: int,
        dim: int,
        lanes: Sequence[Lane],
    ) -> None:
        trainer.scheduler.check_open()
        trainer.scheduler.check_not_nested()
        self.pipeline = Pipeline(trainer, options, trainer.scheduler.ambient())
        self._training = trainer.capture().training
        self._trainer = trainer
        self._adaptive = adaptive
        self._num_lanes = num_lanes
        self._dim = dim
        self._prefetcher = Prefetcher(lanes)
        self._num_batches = 0
        self._num_steps = 0

    def add(self, pairs: Sequence[Any], on_end: OnEnd) -> None:
        """Queue a step made up of batches.

        Args:
            pairs: inputs and targets of each.
            on_end: gets the step's number and its result, or its error, or None where it was called off.

        Raises:
            NotAPairError, ValueError: the batches cannot be trained on; nothing was queued.
        """
        batches = [self._batch(pair) for pair in pairs]
        self._queue(batches, on_end)

    def join(self, on_end: OnEnd) -> bool:
        """Queue a step for which only other processes have batches; return False if there is none."""
        if self._trainer.shared is not None:
            self._queue([], on_end)
        return self._trainer.shared is not None

    def leave(self, error: BaseException | None) -> None:
        """Have the streams of other processes end too, because of an error or an end before its time."""
        if self._trainer.shared is not None and not self.pipeline.has_failed:
            self._trainer.shared.leave(error)

    def _queue(self, batches: Sequence[Batch], on_end: OnEnd) -> None:
        rows = [batch.rows_if_any for batch in batches]
        counts = [count for count in rows if count is not None]
        num_rows = sum(counts) if len(counts) == len(rows) else None
        state = self._trainer.capture(self._training)
        num_lanes, record = self._num_lanes, None
        if self._adaptive is not None and batches:
            num_lanes, record = self._adaptive.choose_for_step(batches, state.snapshot)

        def end(queued: QueuedStep) -> None:
            error = queued.pass_.take_failure()
            if error is not None or not queued.pass_.results or not queued.is_done:
                on_end(index, error)
                return
            if record is not None:
                record(queued.seconds)
            on_end(index, StepResult(index, num_rows, queued.pass_.results.pop(), queued.learning_rate))

        index = self._num_steps
        self.pipeline.add(batches, num_lanes, state, self._prefetcher.start, end)
        self._num_steps += 1

    def close(self) -> None:
        """Copy nothing more."""
        self._prefetcher.close()

    def _batch(self, pair: Any) -> Batch:
        number = self._num_batches
        self._num_batches += 1
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise NotAPairError(number, pair)
        inputs, targets = pair
        return Batch.of_step(inputs, targets, self._dim, self._num_lanes)


class _Run(SourceFailure):
    """What a stream and the task that fills it share, on one event loop.

    The task must not refer to the stream: only the stream's deletion in mid-run ends the task.
    """

    def __init__(self, steps: Steps, source: Source, accumulate: int, max_ahead: int) -> None:
        self.steps = steps
        self.source = source
        self.has_ended = False
        self.is_closing = False
        self.gone: list[Completion] = []  # finished when the task has ended
        self._accumulate = accumulate
        self._room = max_ahead
        self._num_running = 0
        self._num_taken = 0
        self._outcomes: dict[int, StepResult | BaseException] = {}  # their ends may arrive in any order
        self._readers: list[Waiter] = []
        self._filler: list[Waiter] = []  # the task, while it waits

    async def get(self) -> StepResult | BaseException | None:
        """Return what became of the next step, or None at the end."""
        while self._num_taken not in self._outcomes:
            if self.has_ended:
                return None
            await _wait(self._readers)
        outcome = self._outcomes.pop(self._num_taken)
        self._num_taken += 1
        self._room += 1
        _wake(self._filler)
        return outcome

    async def fill(self) -> None:
        """Keep steps on the lanes, until the source ends, a step fails or the task is cancelled."""
        try:
            # In a group's task, as the cancellation of this one would not wait for a thread that reads.
            async with anyio.create_task_group() as group:
                group.start_soon(self._read_all)
        except BaseException:
            if not self.is_closing:
                self.failure = RuntimeError(
                    "the task that fills this stream was cancelled before its end, not by closing it. Do not"
                    " cancel tasks of an event loop that you did not start."
                )
            self.steps.pipeline.stop()
            raise
        finally:
            with anyio.CancelScope(shield=True):
                while self._num_running:
                    await _wait(self._filler)
            self.steps.close()
            self.steps.leave(self.failure)
            self.end()

    def end(self) -> None:
        """Note that no step will follow."""
        self.has_ended = True
        _wake(self._readers)
        for completion in self.gone:
            completion.finish()

    async def _read_all(self) -> None:
        try:
            try:
                while batches := await self._read():
                    self.steps.add(batches, self._on_end)
                    await self._note_begun()
                # Until the batches of all processes have ended, this one takes part without any.
                while await self._has_room() and self.steps.join(self._on_end):
                    await self._note_begun()
            finally:
                with anyio.CancelScope(shield=True):
                    await self.source.aclose()
        except BaseException as error:
            if ends_tasks(error) and is_cancelled():
                raise
            self.failure = error

    async def _read(self) -> list[Any]:
        """Return the batches of the next step once there is room for it; none at the end."""
        batches: list[Any] = []
        await self._has_room()
        while len(batches) < self._accumulate and not self.steps.pipeline.is_stopped:
            batch = await self.source.next()
            if batch is END:
                break
            batches.append(batch)
        return [] if self.steps.pipeline.is_stopped else batches

    async def _has_room(self) -> bool:
        """Wait until another step may be queued; return False if none will be."""
        while self._room == 0 and not self.steps.pipeline.is_stopped:
            await _wait(self._filler)
        return not self.steps.pipeline.is_stopped

    async def _note_begun(self) -> None:
        self._num_running += 1
        self._room -= 1
        if self._room:  # else it waits anyway
            await anyio.lowlevel.checkpoint()

    def _on_end(self, index: int, outcome: StepResult | BaseException | None) -> None:
        self._num_running -= 1
        if outcome is not None:
            self._outcomes[index] = outcome
            _wake(self._readers)
        if not isinstance(outcome, StepResult) or not self._num_running:  # none follows
            _wake(self._filler)


async def _wait(waiters: list[Waiter]) -> None:
    waiter = _loops.current().waiter()
    waiters.append(waiter)
    await waiter


def _wake(waiters: list[Waiter]) -> None:
    while waiters:
        wake(waiters.pop())


class StepStream:
    """The steps of `DataParallel.train`: an async iterator of `StepResult`, and an async context manager.

    Leaving a loop over it early begins no further step. That happens in the background; to wait until the
    lanes have drained and the source is closed, use `async with engine.train(...) as steps:` or `aclose()`.
    The cancellation of a task that waits for the next step closes the stream.
    """

    def __init__(self, steps: Steps, source: Source, accumulate: int, max_ahead: int) -> None:
        self._run = _Run(steps, source, accumulate, max_ahead)
        self._cancel: Callable[[], object] | None = None
        self._is_closed = False

    def __aiter__(self) -> StepStream:
        return self

    async def __anext__(self) -> StepResult:
        if self._is_closed:
            raise StopAsyncIteration
        if self._cancel is None:
            # Cancels once: a second cancellation would interrupt the closing of the source.
            self._cancel = cancel = weakref.finalize(self, _loops.current().spawn(self._run.fill))
            cancel.atexit = False
        try:
            outcome = await self._run.get()
        except GeneratorExit:
            self._cancel()
            raise
        except BaseException:
            await self.aclose()
            raise
        if isinstance(outcome, StepResult):
            return outcome
        if outcome is not None:
            try:
                raise sayable(outcome)
            finally:
                del outcome  # its traceback refers to this frame
                await self.aclose()
        self._is_closed = True
        self._run.raise_failure()
        raise StopAsyncIteration

    async def __aenter__(self) -> StepStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Begin no further step, wait until the lanes have drained, close the source.

        A step that runs is given up, unless its optimizer has begun. A cancellation of the caller goes on
        after that.

        Raises:
            Exception: what the source raised as it was closed.
        """
        self._is_closed = True
        run = self._run
        run.failure = None  # from reading ahead, which the caller has given up
        if run.has_ended:
            return
        # Without the shield anyio would cancel the wait again and again on asyncio.
        with anyio.CancelScope(shield=True):
            if self._cancel is None:
                run.steps.close()
                run.steps.leave(None)
                run.end()
                await run.source.aclose()
                return
            gone = _loops.current().completion(lambda: None)  # the wait goes on to its end
            run.gone.append(gone)
            run.is_closing = True
            run.steps.pipeline.stop()
            self._cancel()
            await gone
        run.raise_failure()
