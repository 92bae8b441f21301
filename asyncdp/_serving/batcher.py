"""Many tasks call with one sample each; batches run on the lanes."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from .._runtime import Runtime
from ..errors import (
    BatcherClosedError,
    CallTimeoutError,
    DeviceLostError,
    OtherLoopError,
    QueueFullError,
    SplitError,
)
from .schedule import BatchSchedule, Item
from .slots import Slot, open_slots
from .statistics import BatcherStatistics, Recorder
from .steps import Collate, Split, Stack, unbind
from .tasks import spawn
from .waiter import Waiter, current_loop, new_waiter

if TYPE_CHECKING:
    from .._data_parallel import DataParallel


class BatcherState(enum.Enum):
    """Whether a batcher takes calls."""

    NEW = "new"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


class Call(Item):
    """One call of a batcher; await it, once, for its result."""

    __slots__ = ("_batcher", "done", "error", "sample", "timeout", "value", "waiter")

    def __init__(
        self, batcher: Batcher, sample: Any, size: float, priority: int, timeout: float | None
    ) -> None:
        super().__init__(size, priority, time.perf_counter())
        self._batcher = batcher
        self.sample = sample
        self.timeout = timeout
        self.waiter: Waiter = new_waiter()
        self.done = False  # it has its outcome, or nobody waits for one any more
        self.value: Any = None
        self.error: BaseException | None = None

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the result of the sample.

        Raises:
            CallTimeoutError: the call was not answered in time.
            DeviceLostError: the device under its batch was lost.
            BatcherClosedError: the batcher was cancelled.
            BaseException: what the engine raised for this very sample.
        """
        return self._batcher._outcome(self).__await__()

    def settle(self, value: Any, error: BaseException | None = None) -> None:
        """Give the call its outcome, unless it was given up."""
        if not self.done:
            self.done = True
            self.value = value
            self.error = error
            self.waiter.wake()


class Batcher:
    """Runs the samples of many tasks in batches, and hands each task its own result.

    An async context manager, on asyncio or trio. A batch leaves the moment a lane is free. When one
    raises, its samples run again one by one, so that only the call with the bad sample fails.

    Args:
        engine: a `DataParallel` engine, each batch of which runs whole on one lane; or a function of
            one batch, called on a lane; or an async function, awaited on the loop. A tuple made by
            `collate` holds positional arguments.
        max_batch_size: most samples of a batch.
        max_wait: seconds a sample may wait for its batch to fill although a lane is free.
        max_queue: most calls in the queue; awaited calls beyond that wait, `call_nowait` refuses.
        timeout: seconds a call may take in all, unless it names its own; None for ever.
        size_of: length of a sample (tokens, pixels). Samples of like length are batched together.
        max_cost: most samples times longest of a batch, by `size_of`; a longer sample goes alone.
        max_padding: most of a batch that may be padding, by `size_of`, from 0 to 1. Full batches of
            unlike samples are slower than smaller batches of like ones.
        max_age: seconds after which a waiting call goes before every priority.
        pad: value that the default `collate` fills shorter tensors with.
        collate: makes a batch of samples, on a lane; the default stacks tensors.
        split: makes results of an output and its samples, on a lane; the default gives row i of every
            tensor to sample i, as a view.
        max_in_flight: batches that run at the same time; one per lane if None.
        runtime: the lanes a function runs on; the process's own if None. An engine brings its own.

    Raises:
        ValueError: a number is out of range, or `max_cost` comes without `size_of`.
        NotServableError: `engine` cannot be called.
    """

    def __init__(
        self,
        engine: DataParallel | Callable[..., Any],
        *,
        max_batch_size: int = 32,
        max_wait: float = 0.0,
        max_queue: int = 1024,
        timeout: float | None = None,
        size_of: Callable[[Any], float] | None = None,
        max_cost: float | None = None,
        max_padding: float = 0.1,
        max_age: float = 1.0,
        pad: float | None = None,
        collate: Collate | None = None,
        split: Split = unbind,
        max_in_flight: int | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        _check_numbers(max_batch_size, max_wait, max_queue, max_in_flight, timeout)
        if not 0 <= max_padding <= 1:
            raise ValueError(f"max_padding is a share from 0 to 1, but got {max_padding}.")
        if max_cost is not None and size_of is None:
            raise ValueError("max_cost needs to know how long samples are. Pass size_of= too.")
        self._slots = open_slots(engine, collate or Stack(pad), split, runtime, max_in_flight)
        self._schedule: BatchSchedule[Call] = BatchSchedule(
            max_batch_size, max_queue, max_wait, max_age, max_cost, max_padding, sized=size_of is not None
        )
        self._size_of = size_of
        self._timeout = timeout
        self._recorder = Recorder(max_batch_size)
        self._idle: list[Waiter] = []
        self._num_free = len(self._slots)  # slots that run no batch and have not lost their lane
        self._num_usable = len(self._slots)
        self._num_workers = 0
        self._cancels: list[Callable[[], object]] = []
        self._state = BatcherState.NEW
        self._loop: object = None
        self._ended: Waiter | None = None
        self._crash: BaseException | None = None

    def __repr__(self) -> str:
        return (
            f"<Batcher {self._state.value}: {self._schedule.num_queued} queued, "
            f"{self._recorder.num_running} running, {self._recorder.num_done} done>"
        )

    async def __aenter__(self) -> Batcher:
        if self._state is not BatcherState.NEW:
            raise BatcherClosedError("a batcher can be entered only once")
        self._loop = current_loop()
        self._ended = new_waiter()
        self._state = BatcherState.OPEN
        self._num_workers = len(self._slots)
        self._cancels = [spawn(partial(self._work, slot)) for slot in self._slots]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is not None:
            self._fail_waiting(partial(BatcherClosedError, "the batcher was left by an exception"))
        await self.aclose()

    async def aclose(self) -> None:
        """Take no more calls, answer those that wait, and end.

        Cancelling this fails the calls that still wait and ends as soon as the lanes have drained.
        """
        if self._state is BatcherState.NEW:
            self._state = BatcherState.CLOSED
        if self._state is not BatcherState.OPEN:
            return
        assert self._ended is not None
        self._state = BatcherState.DRAINING
        self._schedule.closing = True
        while self._idle:
            self._idle.pop().wake()
        try:
            await self._ended.wait()
        except BaseException:
            for cancel in self._cancels:
                cancel()
            with anyio.CancelScope(shield=True):
                while self._num_workers:
                    await anyio.lowlevel.checkpoint()
            raise
        if self._crash is not None:
            raise self._crash

    async def __call__(self, sample: Any, *, timeout: float | None = None, priority: int = 0) -> Any:
        """Run one sample as part of some batch; wait for room if the queue is full.

        Args:
            sample: what `collate` makes batches of.
            timeout: seconds this call may take in all; the batcher's own if None.
            priority: higher goes first.

        Returns:
            The sample's own result.

        Raises:
            CallTimeoutError: the call was not answered in time.
            DeviceLostError: the device under its batch was lost.
            BatcherClosedError: outside of the batcher's `async with` block.
            BaseException: what the engine raised for this very sample.
        """
        return await self._outcome(self._enter(sample, timeout, priority))

    def call_nowait(self, sample: Any, *, timeout: float | None = None, priority: int = 0) -> Call:
        """Queue a sample if there is room, and return what to await for its result.

        Raises:
            QueueFullError: the queue is full.
        """
        if self._schedule.is_full:
            self._recorder.num_refused += 1
            raise QueueFullError("this batcher", self._schedule.max_queue)
        return self._enter(sample, timeout, priority)

    def statistics(self) -> BatcherStatistics:
        """A snapshot of queue, batches and durations."""
        return self._recorder.snapshot(self._schedule.num_queued, self._schedule.num_outside)

    # One call.

    def _enter(self, sample: Any, timeout: float | None, priority: int) -> Call:
        if self._state is not BatcherState.OPEN:
            raise BatcherClosedError(f"the batcher is {self._state.value}")
        if self._loop is not current_loop():
            raise OtherLoopError
        if self._num_usable == 0:
            raise DeviceLostError(self._slots[0].lost or "", "no lane of this batcher is left")
        size = 0.0 if self._size_of is None else self._size_of(sample)
        call = Call(self, sample, size, priority, self._timeout if timeout is None else timeout)
        self._schedule.add(call)
        if self._schedule.num_queued == 1 or self._schedule.may_leave:
            self._wake_one()
        return call

    async def _outcome(self, call: Call) -> Any:
        try:
            if not await call.waiter.wait(call.timeout):
                assert call.timeout is not None
                self._recorder.num_timed_out += 1
                raise CallTimeoutError(call.timeout)
        except BaseException as error:
            if not call.done:
                call.done = True
                self._recorder.num_cancelled += not isinstance(error, CallTimeoutError)
                self._schedule.remove(call, time.perf_counter())
            raise
        if call.error is None:
            return call.value
        try:
            raise call.error
        finally:
            # The traceback refers to this frame: without this, frame and error keep each other alive.
            del call

    def _fail_waiting(self, make_error: Callable[[], BaseException]) -> None:
        for call in self._schedule.clear():
            self._recorder.num_failed += 1
            call.settle(None, make_error())

    # The workers: one task per slot.

    async def _work(self, slot: Slot) -> None:
        try:
            await self._serve_all(slot)
        except Exception as error:
            self._crash = error
        finally:
            self._num_workers -= 1
            if self._num_workers == 0:
                self._end()

    def _end(self) -> None:
        assert self._ended is not None
        if self._num_usable:
            self._state = BatcherState.CLOSED
            self._fail_waiting(partial(BatcherClosedError, "the batcher was cancelled"))
        self._ended.wake()

    async def _serve_all(self, slot: Slot) -> None:
        """Run batches on one slot until the batcher is drained or the slot's lane is lost."""
        while slot.lost is None:
            batch = self._schedule.take(time.perf_counter(), self._num_free)
            if batch:
                self._wake_one()
                await self._serve(slot, batch)
            elif self._state is BatcherState.DRAINING and not self._schedule.num_queued:
                return
            else:
                await self._wait_calls()
        self._give_up(slot)

    def _wake_one(self) -> None:
        """Let an idle worker look at what waits."""
        if self._idle and self._schedule.num_queued:
            self._idle.pop().wake()

    async def _wait_calls(self) -> None:
        """Wait for a call, or for the time when a batch leaves although it is not full."""
        ready_at = self._schedule.ready_at()
        waiter = new_waiter()
        self._idle.append(waiter)
        try:
            await waiter.wait(None if ready_at is None else max(0.0, ready_at - time.perf_counter()))
        finally:
            if waiter in self._idle:
                self._idle.remove(waiter)

    async def _serve(self, slot: Slot, batch: list[Call]) -> None:
        """Run a batch and settle its calls, whatever happens."""
        started = time.perf_counter()
        recorder = self._recorder
        recorder.waits.extend([started - call.arrived for call in batch])
        recorder.batch([call.size for call in batch])
        recorder.num_running += len(batch)
        self._num_free -= 1
        try:
            error = await self._run(slot, batch)
            if error is not None:
                await self._retry(slot, batch, error)
        except BaseException:
            for call in batch:
                call.settle(None, BatcherClosedError("the batcher was cancelled"))
            raise
        finally:
            self._num_free += 1
            recorder.num_running -= len(batch)
            recorder.runs.append(time.perf_counter() - started)

    async def _run(self, slot: Slot, batch: Sequence[Call]) -> BaseException | None:
        """Run some calls and settle them, or return what the engine raised."""
        try:
            values = await slot.run([call.sample for call in batch])
            if len(values) != len(batch):
                raise SplitError(f"split gave {len(values)} results instead of one for each", len(batch))
        except (anyio.get_cancelled_exc_class(), GeneratorExit):
            raise
        except BaseException as error:
            return error
        for call, value in zip(batch, values, strict=True):
            self._recorder.num_done += not call.done
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
                self._fail(call, slot.lost, own)

    def _fail(self, call: Call, lost: str | None, error: BaseException) -> None:
        if lost is not None and not isinstance(error, DeviceLostError):
            cause, error = error, DeviceLostError(lost, str(error).partition("\n")[0])
            error.__cause__ = cause
        self._recorder.num_failed += not call.done
        call.settle(None, error)

    def _give_up(self, slot: Slot) -> None:
        """Go on without the slot whose lane was lost; with none left, every call fails."""
        assert slot.lost is not None
        self._num_free -= 1
        self._num_usable -= 1
        self._recorder.num_lost_slots += 1
        if self._num_usable == 0:
            self._fail_waiting(partial(DeviceLostError, slot.lost, "no lane of this batcher is left"))
        self._wake_one()


def _check_numbers(
    max_batch_size: int, max_wait: float, max_queue: int, max_in_flight: int | None, timeout: float | None
) -> None:
    for name, value in (
        ("max_batch_size", max_batch_size),
        ("max_queue", max_queue),
        ("max_in_flight", max_in_flight),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, but got {value}.")
    for name, seconds in (("max_wait", max_wait), ("timeout", timeout)):
        if seconds is not None and seconds < 0:
            raise ValueError(f"{name} is in seconds and not negative, but got {seconds}.")
