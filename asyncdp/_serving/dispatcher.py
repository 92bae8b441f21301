"""What sends a batcher's batches to its slots, and hands their results to the calls."""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import anyio

from .. import _loops
from .._loops import Loop, ends_tasks
from ..errors import BatcherClosedError, DeviceLostError, EngineCancelledError
from .call import Call
from .queue import BatchSchedule
from .slots import CANCELLED, Slot, Values
from .statistics import Recorder


class BatcherState(enum.Enum):
    """Whether a batcher takes calls."""

    NEW = "new"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


OPEN = BatcherState.OPEN  # looked up once: an enumeration's members are slow to get at


class _Batch:
    """Calls that run on a slot together; after a failure one by one."""

    __slots__ = ("calls", "cancel", "error", "left", "slot", "started")

    def __init__(self, slot: Slot, calls: Sequence[Call], started: float) -> None:
        self.slot = slot
        self.calls = calls
        self.started = started
        self.error: BaseException | None = None  # that all of them together have raised
        self.left: deque[Call] = deque()  # calls to run one by one
        self.cancel: Callable[[], object] | None = None  # gives up what runs now


class Dispatcher:
    """Takes batches out of a queue, has slots run them, and settles their calls, whatever happens.

    All of it happens in calls by the event loop, none of which waits: a task for each slot would cost
    every batch two more turns of the loop.

    Attributes:
        state: see `BatcherState`.
        lost: the name of the lane that was lost last, once no slot is left.
        queue: the calls that wait.
        recorder: what statistics are made of.
        loop: the event loop that all of this belongs to.
    """

    loop: Loop

    def __init__(self, slots: Sequence[Slot], queue: BatchSchedule[Call], recorder: Recorder) -> None:
        self.state = BatcherState.NEW
        self.lost: str | None = None
        self._slots = slots
        self.queue = queue
        self.recorder = recorder
        self._free = list(reversed(slots))  # the one that was used last comes last, and is used first
        self._running: set[_Batch] = set()
        self._is_due = False  # whether the loop is about to look at the queue
        self._is_cancelled = False
        self._call_off: Callable[[], object] = bool  # the look at the time when a batch that fills leaves
        self._ended: anyio.Event | None = None
        self._crash: Exception | None = None

    def start(self) -> None:
        """Begin to work, on the event loop that runs in this thread."""
        for slot in self._slots:
            slot.open()
        self.loop = _loops.current()
        self._ended = anyio.Event()
        self.state = OPEN

    async def aclose(self) -> None:
        """Drain the queue and end; as often as one likes, also at the same time."""
        if self._ended is None:
            self.state = BatcherState.CLOSED
            return
        if self.state is OPEN:
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

    def notice_call(self) -> None:
        """A call has been queued: look at it in the loop's next turn, when others may have come."""
        if not self._is_due and self._free and (self.queue.num_queued == 1 or self.queue.may_leave):
            self._is_due = True
            self.loop.call_soon(self._take_turn)

    def fail_waiting(self, make_error: Callable[[], BaseException]) -> None:
        """End the wait of every call that no batch has taken yet."""
        for call in self.queue.clear():
            call.settle(None, make_error())

    # Sending batches.

    def _take_turn(self) -> None:
        """Send what may leave; called by the loop."""
        self._is_due = False
        self._send()

    def _send(self) -> None:
        """Send what may leave to slots that are free, and end once there is nothing more to do."""
        try:
            while self._free and self.queue.num_queued and not self._is_cancelled:
                if not self._send_one():
                    self._look_later()
                    break
        except Exception as error:
            self._fail(error)
        if self.state is not OPEN and not self._running:
            self._end()

    def _send_one(self) -> bool:
        """Send a batch, unless it still fills or its slot is lost; tell whether to look for another one."""
        slot = self._free[-1]
        now = time.perf_counter()
        if slot.lost is not None and not slot.move_on():
            self._free.pop()
            self._give_up(slot)
            return True
        calls = self.queue.take(now, 1 if slot.is_quick else len(self._free))
        if not calls:
            return False
        self._free.pop()
        try:
            in_time = [call for call in calls if call.timeout is None or not call.expire(now)]
            if in_time:
                sizes = [call.size for call in in_time] if self.queue.sized else ()
                self.recorder.batch(sizes, [now - call.arrived for call in in_time])
        except BaseException as error:
            _settle_all(calls, _closed_by(error))
            raise
        if in_time:
            self.recorder.num_running += len(in_time)
            batch = _Batch(slot, in_time, now)
            self._running.add(batch)
            self._run(batch, in_time)
        else:
            self._free.append(slot)
        return True

    def _look_later(self) -> None:
        """Look again when the next batch leaves although it is not full."""
        ready_at = self.queue.ready_at()
        assert ready_at is not None
        self._call_off()
        self._call_off = self.loop.call_later(max(0.0, ready_at - time.perf_counter()), self._send)

    def _run(self, batch: _Batch, calls: Sequence[Call]) -> None:
        told = partial(self._on_end, batch, calls)
        try:
            batch.cancel = batch.slot.begin([call.sample for call in calls], told)
        except Exception as error:
            # Not at once: one by one, very many calls might fail within one another.
            self.loop.call_soon(partial(told, None, error))

    # Ends of batches.

    def _on_end(
        self, batch: _Batch, calls: Sequence[Call], values: Values, error: BaseException | None
    ) -> None:
        """Some calls of a batch have run, or were given up."""
        batch.cancel = None
        try:
            if values is CANCELLED:
                _settle_all(batch.calls, _closed_by(None))
                self._cancel()  # if it was not us, the event loop ends
                self._finish(batch)
            elif error is not None:
                self._on_error(batch, calls, error)
            else:
                if not batch.left:
                    self._finish(batch)  # first of all, so that the slot works on while calls are settled
                for call, value in zip(calls, values, strict=True):
                    call.settle(value)
                if batch.left:
                    self._run_next(batch)
        except Exception as mistake:
            _settle_all(batch.calls, _closed_by(mistake))
            self._fail(mistake)
            self._finish(batch)

    def _on_error(self, batch: _Batch, calls: Sequence[Call], error: BaseException) -> None:
        """Find out whose sample made a batch fail; on a lost lane, fail all."""
        if ends_tasks(error):
            # The engine's own, which its callers would take for theirs.
            wrapped = EngineCancelledError(error)
            wrapped.__cause__ = error
            error = wrapped
        if len(calls) > 1 and batch.slot.lost is None:
            self.recorder.num_retried += 1
            batch.error = error
            batch.left.extend(calls)
        else:
            _settle_all(calls, _told(error, batch.slot.lost))
        self._run_next(batch)

    def _run_next(self, batch: _Batch) -> None:
        """Run the next call of a batch that failed; with none left, the batch is over."""
        while batch.left and not self._is_cancelled:
            call = batch.left.popleft()
            if call.done:
                continue
            if batch.slot.lost is None:
                self._run(batch, [call])
                return
            assert batch.error is not None
            call.settle(None, _told(batch.error, batch.slot.lost))
        _settle_all(batch.left, _closed_by(None))
        self._finish(batch)

    def _finish(self, batch: _Batch) -> None:
        """A batch is over: its slot takes the next one."""
        if batch not in self._running:
            return
        self._running.remove(batch)
        self.recorder.num_running -= len(batch.calls)
        self.recorder.runs.append(time.perf_counter() - batch.started)
        if batch.slot.lost is None or batch.slot.move_on():
            self._free.append(batch.slot)
        else:
            self._give_up(batch.slot)
        self._send()

    def _give_up(self, slot: Slot) -> None:
        """Go on without a slot; with none left, every call fails."""
        self.recorder.num_lost_slots += 1
        if not self._free and not self._running:
            self.lost = slot.lost
            self.fail_waiting(partial(DeviceLostError, slot.lost or "", "no lane of this batcher is left"))

    # The end of it all.

    def _drain(self) -> None:
        self.state = BatcherState.DRAINING
        self.queue.closing = True

    def _cancel(self) -> None:
        """Give up everything; what runs is waited for."""
        if not self._running or self._is_cancelled:
            return
        self._drain()
        self._is_cancelled = True
        for batch in list(self._running):
            if batch.cancel is not None:
                batch.cancel()

    def _fail(self, error: Exception) -> None:
        """A mistake of ours: nobody shall wait for ever, and whoever closes the batcher is told."""
        if self._crash is None:
            self._crash = error
        self._drain()
        self.fail_waiting(partial(_closed_by, error))

    def _end(self) -> None:
        assert self._ended is not None
        self.state = BatcherState.CLOSED
        self._call_off()
        self.fail_waiting(partial(_closed_by, None))
        self._ended.set()


def _settle_all(calls: Sequence[Call] | deque[Call], error: BaseException) -> None:
    for call in calls:
        call.settle(None, error)


def _told(error: BaseException, lost: str | None) -> BaseException:
    """What a call gets for its engine's exception, on a lane that is lost or not."""
    if lost is None or isinstance(error, DeviceLostError):
        return error
    told = DeviceLostError(lost, str(error).partition("\n")[0])
    told.__cause__ = error
    return told


def _closed_by(error: BaseException | None) -> BatcherClosedError:
    """What calls get that end with their batcher, by its cancellation or a mistake in it."""
    if not isinstance(error, Exception):
        return BatcherClosedError("the batcher was cancelled")
    closed = BatcherClosedError(f"the batcher failed with {error!r}")
    closed.__cause__ = error
    return closed
