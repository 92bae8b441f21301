"""One call of a batcher: who waits for what, and how it ended."""

from __future__ import annotations

import enum
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .. import _loops
from .._loops import Loop, Waiter
from ..errors import CallCancelledError, CallTimeoutError, OtherLoopError
from .queue import BatchQueue

_MAX_KINDS = 50  # each is a time series of its own where it is exported


class CallState(enum.StrEnum):  # hashed as a str: every call is counted by its state
    """Whether a call has ended, and how."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    CANCELLED = "cancelled"


class Outcomes(Counter[CallState]):
    """How many calls have ended how.

    Attributes:
        failures: how many of those that failed got which error, by the name of its class.
        num_expired: how many of those that timed out never ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: Counter[str] = Counter()
        self.num_expired = 0

    def on_error(self, state: CallState, error: BaseException) -> None:
        """Count the error that a call got; of very many kinds those that come late as "other"."""
        if isinstance(error, CallTimeoutError) and state is CallState.TIMED_OUT:
            self.num_expired += error.has_waited
        if state is not CallState.FAILED:
            return
        kind = type(error).__name__
        is_known = kind in self.failures or len(self.failures) < _MAX_KINDS
        self.failures[kind if is_known else "other"] += 1


class BatcherState(enum.Enum):
    """Whether a batcher takes calls."""

    NEW = "new"
    OPEN = "open"
    DRAINING = "draining"
    CANCELLED = "cancelled"
    """Nothing begins any more, and what runs is waited for."""
    CLOSED = "closed"


class Call(Coroutine[Any, Any, Any]):
    """One call of a batcher; await it, once, for its result, or `cancel` it.

    It may be handed to whatever takes a coroutine: `asyncio.create_task`, `gather`, `shield`, `as_completed`,
    and in a task to `asyncio.wait`. To cancel that task cancels the call.

    It belongs to the event loop of its batcher. Its time runs from the call on, awaited or not.
    """

    __slots__ = ("_is_over", "_request", "_steps")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._is_over = False  # whether the task that ran it has its outcome
        self._steps: Generator[Any, None, Any] | None = None  # once a task runs it

    def __repr__(self) -> str:
        return f"<Call {self._request.state.value}>"

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the result of the sample.

        Raises:
            CallTimeoutError: the call was not answered in time.
            CallCancelledError: `cancel` came first.
            DeviceLostError: the device under its batch was lost.
            BatcherClosedError: the batcher was cancelled.
            OtherLoopError: this is another event loop than the batcher's.
            EngineCancelledError: the engine raised a cancellation of its own, or what ends a process.
            BaseException: what the engine raised for this very sample.
        """
        if self._request.state is CallState.PENDING and _loops.current() is not self._request.loop:
            raise OtherLoopError
        return self._request.__await__()

    def send(self, value: Any, /) -> Any:
        """Wait on, as the task that runs this call."""
        if self._steps is None:
            self._steps = self.__await__()
        elif self._is_over:
            raise _shared()  # a generator that is over would give None
        try:
            return self._steps.send(value)
        except BaseException:
            self._is_over = True
            raise

    def throw(self, *error: Any) -> Any:
        """Raise an error in the wait, as the task that runs this call does to cancel it."""
        if self._steps is None:
            self._steps = self._request.__await__()
            if self._request.state is CallState.PENDING:
                self._request.cancel()
        return self._steps.throw(*error)

    def close(self) -> None:
        """End the wait, if a task has begun it."""
        if self._steps is not None:
            self._steps.close()

    def cancel(self) -> bool:
        """Cancel the call: it leaves the queue at once, or its result is dropped.

        Returns:
            Whether it was still pending.
        """
        return self._request.cancel()


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """A call as the dispatcher sees it; an item of its queue.

    Attributes:
        queue: where it waits.
        outcomes: counts how calls have ended.
        loop: the event loop of its batcher.
        sample: what is to run.
        size, priority, arrived, ordinal: see `Item`.
        timeout: seconds it may take in all.
        within: the batchers whose batches wait for it.
        state: a result that comes when it is no longer pending is dropped.
        has_run: whether it is queued again since a batch with it raised, though perhaps not by its fault.
    """

    queue: BatchQueue[Request]
    outcomes: Outcomes
    loop: Loop
    sample: Any
    size: float
    priority: int
    arrived: float
    timeout: float | None
    within: frozenset[object]
    ordinal: int = field(init=False)
    state: CallState = field(default=CallState.PENDING, init=False)
    has_run: bool = field(default=False, init=False)
    _waiter: Waiter | None = field(default=None, init=False)  # made when somebody awaits the call
    _value: Any = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _is_counted: bool = field(default=False, init=False)

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the result, as `Call.__await__` documents."""
        if self.state is CallState.PENDING:
            if self._waiter is not None:
                raise _shared()
            self._waiter = self.loop.waiter()
            stop_timer = self._start_timer() if self.timeout is not None else None
            try:
                yield from self._waiter.__await__()
            except BaseException:
                self._waiter = None
                # Also if the result came in the same turn of the loop: nobody gets to see it.
                if not self._is_counted:
                    self._withdraw()
                raise
            finally:
                if stop_timer is not None:
                    stop_timer()
        self._count()
        if self._error is None:
            return self._value
        try:
            raise self._error
        finally:
            # The traceback refers to this frame: without this, frame and error keep each other alive.
            del self

    def cancel(self) -> bool:
        """Cancel the call if it is pending; return whether it was."""
        if self.state is not CallState.PENDING:
            return False
        self._withdraw()
        return True

    def complete(self, value: Any, error: BaseException | None = None) -> None:
        """End a pending call by a result or an error."""
        # The time of one that nobody awaits is checked by no timer.
        if self.state is CallState.PENDING and (
            self.timeout is None or self._waiter is not None or not self.expire(time.perf_counter())
        ):
            self._end(CallState.DONE if error is None else CallState.FAILED, value, error)

    def expire(self, now: float, *, is_next: bool = False) -> bool:
        """End a pending call whose time is over; return whether it was.

        Args:
            now: the time, in seconds.
            is_next: whether its batch was about to begin.
        """
        if self.timeout is None or self.state is not CallState.PENDING or now < self.arrived + self.timeout:
            return False
        has_waited = self.queue.remove(self, time.perf_counter()) or is_next
        self._end(CallState.TIMED_OUT, None, CallTimeoutError(self.timeout, has_waited))
        return True

    def _start_timer(self) -> Callable[[], object]:
        assert self.timeout is not None
        seconds = self.arrived + self.timeout - time.perf_counter()
        return self.loop.call_later(max(0.0, seconds), partial(self.expire, math.inf))

    def _withdraw(self) -> None:
        """Cancel the call wherever it is; if it still waits, it leaves the queue."""
        self._end(CallState.CANCELLED, None, CallCancelledError())
        self.queue.remove(self, time.perf_counter())

    def _end(self, state: CallState, value: Any, error: BaseException | None) -> None:
        self.state, self._value, self._error = state, value, error
        # Else counted when the task that waits goes on: it may be cancelled before that.
        if self._waiter is None:
            self._count()
        elif not self._waiter.done():
            self._waiter.set_result(None)

    def _count(self) -> None:
        if not self._is_counted:
            self._is_counted = True
            self.outcomes[self.state] += 1
            if self._error is not None:
                self.outcomes.on_error(self.state, self._error)


def _shared() -> RuntimeError:
    return RuntimeError("two tasks await one call. Await it in one task and pass the result on.")
