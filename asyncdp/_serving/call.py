"""One call of a batcher: who waits for what, and which outcome it had."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from .._loops import Loop, Waiter, wake
from ..errors import CallCancelledError, CallTimeoutError
from .queue import BatchSchedule, Item
from .statistics import Recorder


class Call(Item):
    """One call of a batcher; await it, once, for its result, or `cancel` it.

    It belongs to the event loop of its batcher. Its time runs from the call on, awaited or not.
    """

    __slots__ = (
        "_call_off",
        "_error",
        "_is_counted",
        "_is_late",
        "_loop",
        "_queue",
        "_recorder",
        "_value",
        "_waiter",
        "done",
        "sample",
        "timeout",
    )

    def __init__(
        self,
        queue: BatchSchedule[Call],
        recorder: Recorder,
        loop: Loop,
        sample: Any,
        size: float,
        priority: int,
        timeout: float | None,
    ) -> None:
        # Not by super(): it would cost every call one more call.
        self.size = size
        self.priority = priority
        self.arrived = time.perf_counter()
        self._queue = queue
        self._recorder = recorder
        self._loop = loop
        self.timeout = timeout
        self._waiter: Waiter | None = None  # made when somebody awaits the call
        self._call_off: Callable[[], object] | None = None  # what ends that wait in time
        self._value: Any = None
        self._error: BaseException | None = None
        self._is_late = False
        self._is_counted = False
        self.sample = sample
        self.done = False
        """Whether it has its outcome; a result that comes later is dropped."""

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the result of the sample.

        Raises:
            CallTimeoutError: the call was not answered in time.
            CallCancelledError: `cancel` came first.
            DeviceLostError: the device under its batch was lost.
            BatcherClosedError: the batcher was cancelled.
            EngineCancelledError: the engine raised a cancellation of its own.
            BaseException: what the engine raised for this very sample.
        """
        if not self.done:
            if self._waiter is not None:
                raise RuntimeError("two tasks await one call. Let one of them await it and tell the other.")
            self._waiter = waiter = self._loop.waiter()
            if self.timeout is not None:
                seconds = self.arrived + self.timeout - time.perf_counter()
                self._call_off = self._loop.call_later(max(0.0, seconds), partial(self.expire, math.inf))
            try:
                yield from waiter.__await__()
            except BaseException:
                # Also if the outcome came in the same turn of the loop: nobody gets to see it.
                if not self._is_counted:
                    self._give_up()
                raise
            finally:
                if self._call_off is not None:
                    self._call_off()
        if not self._is_counted:
            self._count()
        if self._error is None:
            return self._value
        try:
            raise self._error
        finally:
            # The traceback refers to this frame: without this, frame and error keep each other alive.
            del self

    def cancel(self) -> bool:
        """Give the call up: it leaves the queue at once, or its result is dropped.

        Returns:
            Whether it had no outcome before.
        """
        if self.done:
            return False
        self._give_up()
        if self._waiter is not None:
            wake(self._waiter)
        return True

    # Called by the dispatcher.

    def settle(self, value: Any, error: BaseException | None = None) -> None:
        """Give the call its outcome, unless it has one."""
        if self.done:
            return
        if self._waiter is None:
            if not self.expire(time.perf_counter()):
                self.done, self._value, self._error = True, value, error
                self._count()
        else:
            # Counted when the task that waits goes on: it may be cancelled before that.
            self.done, self._value, self._error = True, value, error
            if not self._waiter.done():  # as `wake` does, but without its call
                self._waiter.set_result(None)

    def expire(self, now: float) -> bool:
        """Give the call a `CallTimeoutError` if its time is over; tell whether it was."""
        if self.timeout is None or self.done or now < self.arrived + self.timeout:
            return False
        self._time_out()
        if self._waiter is None:
            self._count()
        else:
            wake(self._waiter)
        return True

    def _time_out(self) -> None:
        assert self.timeout is not None
        self.done = self._is_late = True
        self._error = CallTimeoutError(self.timeout)
        self._queue.remove(self, time.perf_counter())

    def _give_up(self) -> None:
        self.done = self._is_counted = True
        self._value, self._error = None, CallCancelledError()
        self._recorder.num_cancelled += 1
        self._queue.remove(self, time.perf_counter())

    def _count(self) -> None:
        self._is_counted = True
        if self._error is None:
            self._recorder.num_done += 1
        elif self._is_late:
            self._recorder.num_timed_out += 1
        else:
            self._recorder.num_failed += 1
