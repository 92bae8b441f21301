"""The tasks that run a batcher's batches, one for each of its slots."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from functools import partial

import anyio

from ..errors import (
    BatcherClosedError,
    DeviceLostError,
    EngineCancelledError,
)
from .call import Call
from .schedule import BatchSchedule
from .slots import Slot
from .statistics import Recorder
from .tasks import ends_tasks, is_cancelled, spawn
from .waiter import Waiter, new_waiter


class BatcherState(enum.Enum):
    """Whether a batcher takes calls."""

    NEW = "new"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


class Workers:
    """Take batches out of a queue, run them, and settle their calls, whatever happens.

    Attributes:
        state: see `BatcherState`.
        lost: the name of the lane that was lost last, once no slot is left.
    """

    def __init__(self, slots: Sequence[Slot], queue: BatchSchedule[Call], recorder: Recorder) -> None:
        self.state = BatcherState.NEW
        self.lost: str | None = None
        self._slots = slots
        self._queue = queue
        self._recorder = recorder
        self._idle: list[Waiter] = []
        self._num_free = len(slots)  # slots that run no batch and have not lost their lanes
        self._num_usable = len(slots)
        self._num_left = len(slots)  # workers that have not ended
        self._cancels: list[Callable[[], object]] = []
        self._ended: anyio.Event | None = None
        self._crash: BaseException | None = None

    def start(self) -> None:
        """Begin to work, on the event loop that runs in this thread."""
        self._ended = anyio.Event()
        self.state = BatcherState.OPEN
        self._cancels = [spawn(partial(self._work, slot)) for slot in self._slots]

    async def aclose(self) -> None:
        """Drain the queue and end; as often as one likes, also at the same time."""
        if self._ended is None:
            self.state = BatcherState.CLOSED
            return
        if self.state is BatcherState.OPEN:
            self._drain()
        try:
            await self._ended.wait()
        except BaseException:
            for cancel in self._cancels:
                cancel()
            with anyio.CancelScope(shield=True):
                await self._ended.wait()
            raise
        if self._crash is not None:
            raise self._crash

    def notice_call(self) -> None:
        """A call has been queued."""
        if self._queue.num_queued == 1 or self._queue.may_leave:
            self._wake_one()

    def fail_waiting(self, make_error: Callable[[], BaseException]) -> None:
        """End the wait of every call that no batch has taken yet."""
        for call in self._queue.clear():
            call.settle(None, make_error())

    # The life of the workers.

    async def _work(self, slot: Slot) -> None:
        try:
            await self._serve_all(slot)
        except Exception as error:
            # A mistake of ours: the other workers end too, and nobody waits for ever.
            self._crash = error
            self._drain()
            self.fail_waiting(partial(_closed_by, error))
        finally:
            self._num_left -= 1
            if self._num_left == 0:
                self._end()

    def _drain(self) -> None:
        self.state = BatcherState.CLOSED if self._num_left == 0 else BatcherState.DRAINING
        self._queue.closing = True
        while self._idle:
            self._idle.pop().wake()

    def _end(self) -> None:
        assert self._ended is not None
        # Without lanes an open batcher stays open, so that calls are told why they fail.
        if self.state is not BatcherState.OPEN or self.lost is None:
            self.state = BatcherState.CLOSED
        self.fail_waiting(partial(BatcherClosedError, "the batcher was cancelled"))
        self._ended.set()

    async def _serve_all(self, slot: Slot) -> None:
        """Run batches on one slot until the queue is drained or the slot's last lane is lost."""
        while not is_cancelled():
            if slot.lost is not None and not slot.move_on():
                self._give_up(slot)
                return
            batch = self._queue.take(time.perf_counter(), self._num_free)
            if batch:
                await self._serve(slot, batch)
            elif self.state is not BatcherState.OPEN and not self._queue.num_queued:
                return
            else:
                await self._wait_calls()

    def _give_up(self, slot: Slot) -> None:
        """Go on without a slot; with none left, every call fails."""
        self._num_free -= 1
        self._num_usable -= 1
        self._recorder.num_lost_slots += 1
        if self._num_usable == 0:
            self.lost = slot.lost
            self.fail_waiting(partial(DeviceLostError, slot.lost or "", "no lane of this batcher is left"))
        self._wake_one()

    def _wake_one(self) -> None:
        """Let an idle worker look at what waits."""
        if self._idle and self._queue.num_queued:
            self._idle.pop().wake()

    async def _wait_calls(self) -> None:
        """Wait for a call, or for the time when a batch leaves although it is not full."""
        ready_at = self._queue.ready_at()
        waiter = new_waiter()
        self._idle.append(waiter)
        try:
            await waiter.wait(None if ready_at is None else max(0.0, ready_at - time.perf_counter()))
        finally:
            if waiter in self._idle:
                self._idle.remove(waiter)

    # One batch.

    async def _serve(self, slot: Slot, batch: Sequence[Call]) -> None:
        """Run a batch and settle its calls, whatever happens."""
        started = time.perf_counter()
        recorder = self._recorder
        recorder.num_running += len(batch)
        self._num_free -= 1
        try:
            self._wake_one()
            in_time = [call for call in batch if not call.expire(started)]
            if in_time:
                recorder.batch([call.size for call in in_time], [started - call.arrived for call in in_time])
                error = await self._run(slot, in_time)
                if error is not None:
                    await self._retry(slot, in_time, error)
                recorder.runs.append(time.perf_counter() - started)
        except BaseException as error:
            for call in batch:
                call.settle(None, _closed_by(error))
            raise
        finally:
            self._num_free += 1
            recorder.num_running -= len(batch)

    async def _run(self, slot: Slot, batch: Sequence[Call]) -> BaseException | None:
        """Run some calls and settle them, or return what the engine raised."""
        try:
            values = await slot.run([call.sample for call in batch])
        except BaseException as error:
            if not ends_tasks(error):
                return error
            if is_cancelled():
                raise
            # The engine's own, which its callers would take for theirs.
            wrapped = EngineCancelledError(error)
            wrapped.__cause__ = error
            return wrapped
        for call, value in zip(batch, values, strict=True):
            call.settle(value)
        return None

    async def _retry(self, slot: Slot, batch: Sequence[Call], error: BaseException) -> None:
        """Find out whose sample made a batch fail; on a lost lane, fail all."""
        self._recorder.num_retried += len(batch) > 1 and slot.lost is None
        for call in batch:
            own: BaseException | None = error
            if call.done:
                continue
            if len(batch) > 1 and slot.lost is None:
                own = await self._run(slot, [call])
            if own is not None:
                call.settle(None, _told(own, slot.lost))


def _told(error: BaseException, lost: str | None) -> BaseException:
    """What a call gets for its engine's exception, on a lane that is lost or not."""
    if lost is None or isinstance(error, DeviceLostError):
        return error
    told = DeviceLostError(lost, str(error).partition("\n")[0])
    told.__cause__ = error
    return told


def _closed_by(error: BaseException) -> BatcherClosedError:
    """What calls get when their worker ends under them."""
    if not isinstance(error, Exception):
        return BatcherClosedError("the batcher was cancelled")
    closed = BatcherClosedError(f"the batcher failed with {error!r}")
    closed.__cause__ = error
    return closed
