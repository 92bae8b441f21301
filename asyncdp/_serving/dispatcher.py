"""The dispatcher of a batcher: sends batches to slots, and hands their results to the calls."""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio

from .. import _loops
from .._loops import Loop, ends_tasks
from ..errors import BatcherClosedError, DeviceLostError, EngineCancelledError, OtherLoopError
from .call import CallState, Request
from .queue import BatchQueue
from .slots import Slot
from .statistics import Recorder


class BatcherState(enum.Enum):
    """Whether a batcher takes calls."""

    NEW = "new"
    OPEN = "open"
    DRAINING = "draining"
    CANCELLED = "cancelled"
    """Nothing begins any more, and what runs is waited for."""
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class _Batch:
    """Calls that run on a slot together; after a failure one by one.

    Attributes:
        started: when, in seconds.
        left: calls still to run one by one.
        error: what the last run raised.
        cancel: cancels what runs now.
    """

    slot: Slot
    calls: Sequence[Request]
    started: float
    left: deque[Request] = field(default_factory=deque)
    error: BaseException | None = None
    cancel: Callable[[], object] | None = None


class Dispatcher:
    """Takes batches out of a queue, has slots run them, and ends their calls, whatever happens.

    All of it happens in callbacks of the event loop, none of which waits: a task for each slot would
    cost every batch two more turns of the loop.

    Attributes:
        state: see `BatcherState`.
        queue: the calls that wait.
        recorder: what statistics are made of.
    """

    def __init__(self, slots: Sequence[Slot], queue: BatchQueue[Request], recorder: Recorder) -> None:
        self.state = BatcherState.NEW
        self.queue = queue
        self.recorder = recorder
        self._slots = slots
        self._free = list(reversed(slots))  # the one that was used last comes last, and is used first
        self._running: set[_Batch] = set()
        self._lost: str | None = None  # the lane that was lost last, once no slot is left
        self._loop: Loop | None = None
        self._is_due = False  # whether the loop is about to call `_send`
        self._stop_timer: Callable[[], object] = bool  # of the batch that waits to fill
        self._ended: anyio.Event | None = None
        self._crash: Exception | None = None

    def start(self) -> None:
        """Begin to take calls, on the event loop that runs in this thread."""
        if self.state is not BatcherState.NEW:
            raise BatcherClosedError("a batcher can be entered only once")
        for slot in self._slots:
            slot.open()
        self._loop = _loops.current()
        self._ended = anyio.Event()
        self.state = BatcherState.OPEN

    def submit(self, sample: Any, size: float, priority: int, timeout: float | None) -> Request:
        """Queue a sample.

        Raises:
            BatcherClosedError, OtherLoopError, DeviceLostError: nothing was queued.
        """
        if self.state is not BatcherState.OPEN:
            raise BatcherClosedError(f"the batcher is {self.state.value}")
        loop = _loops.current()
        if loop is not self._loop:
            raise OtherLoopError
        if self._lost is not None:
            raise DeviceLostError(self._lost, "no lane of this batcher is left")
        now = time.perf_counter()
        request = Request(self.queue, self.recorder.outcomes, loop, sample, size, priority, now, timeout)
        self.queue.add(request)
        # In the loop's next turn, when others may have come.
        if not self._is_due and self._free and (self.queue.num_queued == 1 or self.queue.may_leave):
            self._is_due = True
            loop.call_soon(self._send)
        return request

    async def aclose(self) -> None:
        """Drain the queue and end; may be called any number of times, also at the same time."""
        if self._ended is None:
            self.state = BatcherState.CLOSED
            return
        if self.state is BatcherState.OPEN:
            self._drain()
            self._send()
        try:
            await self._ended.wait()
        except BaseException:
            self._cancel()
            with anyio.CancelScope(shield=True):
                await self._ended.wait()
            raise
        if self._crash is not None:
            raise self._crash

    def reject_waiting(self, make_error: Callable[[], BaseException]) -> None:
        """Fail every call that no batch has taken yet."""
        for call in self.queue.clear():
            call.complete(None, make_error())

    # Sending batches.

    def _send(self) -> None:
        """Send what may leave to slots that are free, and end once there is nothing more to do."""
        self._is_due = False
        try:
            while self._free and self.queue.num_queued and self.state is not BatcherState.CANCELLED:
                if not self._send_batch(self._free[-1]):
                    break
        except Exception as error:
            self._fail(error)
        if self.state is not BatcherState.OPEN and not self._running:
            self._end()

    def _send_batch(self, slot: Slot) -> bool:
        """Send a batch unless it still fills or its slot is lost; return whether to try another one."""
        now = time.perf_counter()
        if slot.lost is not None and not slot.change_lane():
            self._free.pop()
            self._retire(slot)
            return True
        taken = self.queue.take(now, 1 if slot.is_quick else len(self._free))
        if not taken:
            self._send_later(now)
            return False
        try:
            calls = [call for call in taken if call.timeout is None or not call.expire(now)]
            if not calls:
                return True
            self.recorder.on_batch(calls, now)
        except Exception as error:
            _fail_all(taken, _closed_by(error))
            raise
        self._free.pop()
        batch = _Batch(slot, calls, now)
        self._running.add(batch)
        self._run(batch, calls)
        return True

    def _send_later(self, now: float) -> None:
        """Send the next batch when its time has come although it is not full."""
        assert self._loop is not None
        ready_at = self.queue.ready_at()
        assert ready_at is not None
        self._stop_timer()
        self._stop_timer = self._loop.call_later(max(0.0, ready_at - now), self._send)

    def _run(self, batch: _Batch, calls: Sequence[Request]) -> None:
        on_end = partial(self._on_end, batch, calls)
        try:
            batch.cancel = batch.slot.begin([call.sample for call in calls], on_end)
        except Exception as error:
            assert self._loop is not None
            # Not at once: one by one, very many calls might fail within one another.
            self._loop.call_soon(partial(on_end, None, error))

    # Ends of batches.

    def _on_end(
        self,
        batch: _Batch,
        calls: Sequence[Request],
        results: Sequence[Any] | None,
        error: BaseException | None,
    ) -> None:
        """End some calls of a batch, which have run or were cancelled."""
        batch.cancel, batch.error = None, error
        try:
            if error is not None:
                self._on_error(batch, calls, error)
            elif results is None:
                self._cancel()  # if it was not us, the event loop ends
                _fail_all(batch.calls, _closed_by(None))
            else:
                if not batch.left:
                    self._finish(batch)  # first of all, so that the slot runs the next one meanwhile
                for call, value in zip(calls, results, strict=True):
                    call.complete(value)
            if batch in self._running:
                self._run_next(batch)
        except Exception as mistake:
            _fail_all(batch.calls, _closed_by(mistake))
            self._fail(mistake)
            if batch in self._running:
                self._finish(batch)

    def _on_error(self, batch: _Batch, calls: Sequence[Request], error: BaseException) -> None:
        """Have the calls of a failed batch run one by one; fail a lone one, and all on a lost lane."""
        lost = batch.slot.lost
        if len(calls) > 1 and lost is None:
            self.recorder.num_retried += 1
            batch.left.extend(calls)
            return
        if lost is not None:
            calls = [*calls, *batch.left]
            batch.left.clear()
        _fail_all(calls, _for_callers(error, lost))

    def _run_next(self, batch: _Batch) -> None:
        """Run the next call of a batch that failed; finish the batch if none is left."""
        while batch.left and self.state is not BatcherState.CANCELLED:
            call = batch.left.popleft()
            if call.state is CallState.PENDING:
                self._run(batch, [call])
                return
        _fail_all(batch.left, _closed_by(None))
        self._finish(batch)

    def _finish(self, batch: _Batch) -> None:
        """End a batch: its slot takes the next one."""
        self._running.remove(batch)
        self.recorder.num_running -= len(batch.calls)
        self.recorder.runs.append(time.perf_counter() - batch.started)
        slot = batch.slot
        if batch.error is not None and slot.lost is not None and not slot.change_lane():
            self._retire(slot)
        else:
            self._free.append(slot)
        self._send()

    def _retire(self, slot: Slot) -> None:
        """Go on without a slot; with none left, every call fails."""
        self.recorder.num_lost_slots += 1
        if not self._free and not self._running:
            self._lost = slot.lost
            self.reject_waiting(partial(DeviceLostError, slot.lost or "", "no lane of this batcher is left"))

    # The end of it all.

    def _drain(self) -> None:
        self.state = BatcherState.DRAINING
        self.queue.is_closing = True

    def _cancel(self) -> None:
        """Cancel what runs, and begin nothing more."""
        if not self._running or self.state is BatcherState.CANCELLED:
            return
        self.state = BatcherState.CANCELLED
        for batch in list(self._running):
            if batch.cancel is not None:
                batch.cancel()

    def _fail(self, error: Exception) -> None:
        """End after a mistake of ours: no call may wait for ever, and `aclose` raises it."""
        self._crash = self._crash or error
        if self.state is BatcherState.OPEN:
            self._drain()
        self.reject_waiting(partial(_closed_by, error))

    def _end(self) -> None:
        assert self._ended is not None
        self.state = BatcherState.CLOSED
        self._stop_timer()
        self.reject_waiting(partial(_closed_by, None))
        self._ended.set()


def _fail_all(calls: Iterable[Request], error: BaseException) -> None:
    for call in calls:
        call.complete(None, error)


def _for_callers(error: BaseException, lost: str | None) -> BaseException:
    """Return what calls get for their engine's error, on a lane that is lost or not."""
    if lost is not None and not isinstance(error, DeviceLostError):
        wrapped: BaseException = DeviceLostError(lost, str(error).partition("\n")[0])
    elif ends_tasks(error):  # the engine's own, which its callers would take for theirs
        wrapped = EngineCancelledError(error)
    else:
        return error
    wrapped.__cause__ = error
    return wrapped


def _closed_by(error: Exception | None) -> BatcherClosedError:
    """Return what calls get that end with their batcher, by its cancellation or a mistake in it."""
    if error is None:
        return BatcherClosedError("the batcher was cancelled")
    closed = BatcherClosedError(f"the batcher failed with {error!r}")
    closed.__cause__ = error
    return closed
