"""The dispatcher of a batcher: sends batches to slots, and hands their results to the calls."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio

from .. import _loops
from .._loops import Loop
from .._runtime import trace
from .._runtime.hangs import GRACE_SECONDS
from ..errors import BatcherClosedError, DeviceLostError, LaneHungError, NestedCallError, OtherLoopError
from .call import BatcherState, CallState, Request
from .free import FreeSlots
from .health import Health, signature
from .outcomes import closed_by, fail_all, for_callers
from .queue import BatchQueue
from .running import RunningBatch
from .search import Search, start_search
from .slots import Slot, within
from .statistics import Recorder

_MAX_PARTS = 4  # that succeed, of batches that raised, before one of the queue goes although it is not full

_logger = logging.getLogger("asyncdp")


class Dispatcher:
    """Takes batches out of a queue, has slots run them, and ends their calls, whatever happens.

    All of it happens in callbacks of the event loop, none of which waits: a task for each slot would
    cost every batch two more turns of the loop.

    Attributes:
        state: see `BatcherState`.
        queue: the calls that wait.
        recorder: what statistics are made of.
        make_request: makes the requests; an export puts one there that makes spans of them, too.

    Args:
        halves: whether to look for the samples that make a batch raise.
        hang_timeout: seconds after which a task makes its lane suspect; the runtime's own if None.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        queue: BatchQueue[Request],
        recorder: Recorder,
        *,
        halves: bool,
        hang_timeout: float | None,
    ) -> None:
        self.state = BatcherState.NEW
        self.queue = queue
        self.recorder = recorder
        self.make_request: Callable[..., Request] = Request
        self._slots = slots
        self._free = FreeSlots(slots)
        self._running: set[RunningBatch] = set()
        self._halves = halves
        self._scheduler = slots[0].scheduler
        self._hang_timeout = self._scheduler.hang_timeout if hang_timeout is None else hang_timeout
        self._stop_watch: Callable[[], object] = bool
        self._health = Health()
        self._searches: deque[Search] = deque()  # that have a part to run
        self._has_warned = False  # that batches raise although no sample of theirs does
        self._num_parts = 0.0  # of batches that raised, since one of the queue ran; less of quick ones
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
        token = within.set(within.get() | {self})  # for what the slots capture
        try:
            for slot in self._slots:
                slot.open()
        finally:
            within.reset(token)
        self._loop = _loops.current()
        self._ended = anyio.Event()
        self.state = BatcherState.OPEN
        if self._hang_timeout is not None:
            self._watch_later(self._hang_timeout)

    def submit(self, sample: Any, size: float, priority: int, timeout: float | None) -> Request:
        """Queue a sample.

        Raises:
            BatcherClosedError, OtherLoopError, NestedCallError, DeviceLostError: nothing was queued.
        """
        if self.state is not BatcherState.OPEN:
            raise BatcherClosedError(f"the batcher is {self.state.value}")
        loop = _loops.current()
        if loop is not self._loop:
            raise OtherLoopError
        waiting = within.get()
        if self in waiting:
            raise NestedCallError
        if self._lost is not None:
            raise DeviceLostError(self._lost, "no lane of this batcher is left")
        now = time.perf_counter()
        request = self.make_request(
            self.queue, self.recorder.outcomes, loop, sample, size, priority, now, timeout, waiting
        )
        self.queue.add(request)
        # In the loop's next turn, when others may have come.
        if not self._is_due and self._free and (self.queue.num_queued == 1 or self.queue.may_leave):
            self._is_due = True
            loop.call_soon(self._send)
        return request

    async def aclose(self, timeout: float | None) -> None:
        """Drain the queue and end; may be called any number of times, also at the same time.

        After `timeout` seconds, or some after a cancellation, what still runs is abandoned.
        """
        if self._ended is None:
            self.state = BatcherState.CLOSED
            self.recorder.on_closed()
            return
        if self.state is BatcherState.OPEN:
            self._drain()
            self._send()
        try:
            with anyio.move_on_after(timeout) as scope:
                await self._ended.wait()
            if scope.cancelled_caught:
                self._abandon_all()
        except BaseException:
            self._cancel()
            with anyio.move_on_after(GRACE_SECONDS, shield=True):
                await self._ended.wait()
            self._abandon_all()
            raise
        if self._crash is not None:
            raise self._crash

    def reject_waiting(self, make_error: Callable[[], BaseException]) -> None:
        """Fail every call that no batch has taken yet."""
        for call in [*self.queue.clear(), *(call for search in self._searches for call in search.end())]:
            call.complete(None, make_error())
        self._searches.clear()

    def counts(self) -> dict[str, int]:
        """Return the fields of `BatcherStatistics` that are the dispatcher's; from any thread."""
        # Copied at once, since the loop's thread goes on changing them.
        running, searches, free = tuple(self._running), list(self._searches), tuple(self._free)
        searches += [batch.search for batch in running if batch.search is not None]
        num_calls = sum(len(batch.calls) for batch in running)
        return {
            "num_queued": self.queue.num_queued,
            "num_outside": self.queue.num_outside,
            "num_running": num_calls + sum(search.num_left for search in searches),
            "num_suspect": sum(slot.is_suspect for slot in (*free, *(batch.slot for batch in running))),
        }

    # Sending batches.

    def _send(self) -> None:
        """Send what may leave to slots that are free, and end once there is nothing more to do."""
        self._is_due = False
        try:
            while self._has_work() and self.state is not BatcherState.CANCELLED:
                self._free.order()
                if self._hang_timeout is not None and not self._free.bring_healthy():
                    break
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
        search, taken = self._take(slot, now)
        if not taken and search is None:
            self._send_later(now)
            return False
        try:
            calls = [call for call in taken if call.timeout is None or not call.expire(now, is_next=True)]
            if search is not None and len(calls) < len(taken):
                search.is_complete = False
            if not calls:
                self._go_on(search)
                return True
            if search is None:
                self.recorder.on_batch(calls, now)
        except Exception as error:
            fail_all(taken, closed_by(error))
            raise
        self._free.pop()
        batch = RunningBatch(slot, calls, now, search)
        self._running.add(batch)
        self._run(batch)
        return True

    def _has_work(self) -> bool:
        return bool(self._free) and (self.queue.num_queued > 0 or bool(self._searches))

    def _take(self, slot: Slot, now: float) -> tuple[Search | None, Sequence[Request]]:
        """Take the calls of the next batch, from the queue or as a part of one that raised.

        Full batches of the queue go by turns with such parts, others after some of them: small batches in
        between would cost those that search, and those that wait for a fuller one, more than they gain.
        """
        is_turn = self._num_parts >= _MAX_PARTS or self.queue.num_queued >= self.queue.max_batch_size
        if not self._searches or (is_turn and self._num_parts > 0):
            self._num_parts = 0.0
            taken = self.queue.take(now, 1 if slot.is_quick else self._free.num_alike)
            if taken or not self._searches:
                return None, taken
        self._num_parts += self._health.raised_cost
        search = self._searches.popleft()
        return search, search.take()

    def _go_on(self, search: Search | None) -> None:
        """Have a search go on, unless it is over."""
        if search is None:
            return
        left = [call for call in search.put_back if call.state is CallState.PENDING]
        for call in left:
            call.has_run = True
        self.queue.put_back(left)
        search.put_back = []
        if search.is_model_down:
            self._health.on_down(search.error)
            fail_all(search.end(), for_callers(search.error, None))
        elif search.num_left:
            self._searches.append(search)
        elif search.is_fruitless:
            self._on_fruitless(search)

    def _on_fruitless(self, search: Search) -> None:
        """Say once that batches raise although no sample of theirs does."""
        if search.num_raised > 1:
            self._health.mixed = signature(search.error)
        if not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "A batch raised although each of its samples runs by itself, which costs many more runs. "
                "Let collate, model and split take any batch, or name sizes by size_of=.",
                exc_info=search.error,
            )

    def _send_later(self, now: float) -> None:
        """Send the next batch when its time has come although it is not full."""
        assert self._loop is not None
        ready_at = self.queue.ready_at()
        assert ready_at is not None
        self._stop_timer()
        self._stop_timer = self._loop.call_later(max(0.0, ready_at - now), self._send)

    def _run(self, batch: RunningBatch) -> None:
        on_end = partial(self._on_end, batch)
        waiting = frozenset().union(*(call.within for call in batch.calls))
        try:
            batch.cancel = batch.slot.begin([call.sample for call in batch.calls], on_end, waiting)
        except Exception as error:
            assert self._loop is not None
            # Not at once: very many batches might fail within one another.
            self._loop.call_soon(partial(on_end, None, error))

    # Ends of batches.

    def _on_end(
        self, batch: RunningBatch, results: Sequence[Any] | None, error: BaseException | None
    ) -> None:
        """End the calls of a batch, which has run or was cancelled, or look for those at fault."""
        if batch not in self._running:
            return  # abandoned
        batch.cancel, batch.has_failed = None, error is not None
        if self.recorder.observers or trace.recorder is not None:
            self._observe(batch, closed_by(None) if results is None and error is None else error)
        try:
            if error is not None:
                self._on_error(batch, error)
            elif results is None:
                self._cancel()  # if it was not us, the event loop ends
                fail_all(batch.calls, closed_by(None))
            else:
                self._on_success(batch, results)
            if batch in self._running:
                self._finish(batch)
        except Exception as mistake:
            fail_all(batch.calls, closed_by(mistake))
            self._fail(mistake)
            if batch in self._running:
                self._finish(batch)

    def _observe(self, batch: RunningBatch, error: BaseException | None) -> None:
        self.recorder.on_run(batch.calls, batch.started, batch.slot.place, batch.search is not None, error)

    def _on_success(self, batch: RunningBatch, results: Sequence[Any]) -> None:
        self._health.on_success(len(batch.calls))
        for search in self._searches:
            search.on_success()  # of another batch, which shows as well that the model works
        if batch.search is not None:
            self._num_parts += 1 - self._health.raised_cost
            batch.search.on_success()
            self._go_on(batch.search)
        self._finish(batch)  # first of all, so that the slot runs the next one meanwhile
        for call, value in zip(batch.calls, results, strict=True):
            call.complete(value)

    def _on_error(self, batch: RunningBatch, error: BaseException) -> None:
        """Search a failed batch for the calls at fault; fail a lone one, and all on a lost lane."""
        lost, search = batch.slot.lost, batch.search
        is_final = lost is not None or len(batch.calls) == 1 or not self._halves
        if is_final:
            fail_all(batch.calls, for_callers(error, lost))
        elif self.state is BatcherState.CANCELLED:
            fail_all(batch.calls, closed_by(None))
        elif search is None:
            self.recorder.num_retried += 1
            search = start_search(batch.calls, error, self._health)
        if batch.search is not None:
            if lost is None:
                batch.search.on_error(error)
            batch.search.is_complete &= lost is None
        self._go_on(search)

    def _finish(self, batch: RunningBatch) -> None:
        """End a batch: its slot takes the next one."""
        self._running.remove(batch)
        seconds = time.perf_counter() - batch.started
        self.recorder.runs.append(seconds)
        self._health.on_run(len(batch.calls), seconds, raised=batch.has_failed)
        self.queue.full_size = self._health.batch_size(self.queue.max_batch_size)
        slot = batch.slot
        if batch.is_substituted:
            slot.leave()
        elif batch.has_failed and slot.lost is not None and not slot.change_lane():
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

    # Lanes that hang.

    def _watch_later(self, hang_timeout: float) -> None:
        assert self._loop is not None
        self._stop_watch = self._loop.call_later(hang_timeout / 4, partial(self._watch, hang_timeout))

    def _watch(self, hang_timeout: float) -> None:
        """Look for lanes that hang and go round them; once calls are no longer taken, abandon them."""
        if self.state is BatcherState.CLOSED:
            return
        self._watch_later(hang_timeout)
        try:
            self._scheduler.find_hung(hang_timeout)
            hung = [batch for batch in self._running if batch.slot.is_suspect]
            if self.state is not BatcherState.OPEN:
                self._abandon(hung)
            for batch in hung:
                self.recorder.num_hung += not batch.is_hung
                batch.is_hung = True
                substitute = None if batch.is_substituted else batch.slot.substitute()
                if substitute is not None:
                    batch.is_substituted = True
                    self._free.append(substitute)
        except Exception as error:
            self._fail(error)
        self._send()

    def _abandon(self, batches: Sequence[RunningBatch]) -> None:
        """Fail batches that run, and wait for them no longer."""
        for batch in batches:
            what = f"a batch of {len(batch.calls)} calls {batch.slot.place}"
            error = LaneHungError(what, time.perf_counter() - batch.started)
            _logger.warning("%s", error)
            self._running.remove(batch)
            self._observe(batch, error)
            fail_all([*batch.calls, *(() if batch.search is None else batch.search.end())], error)
            if batch.cancel is not None:
                batch.cancel()

    def _abandon_all(self) -> None:
        self._abandon(list(self._running))
        assert self._ended is not None
        if not self._ended.is_set():
            self._end()

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
        self.reject_waiting(partial(closed_by, error))

    def _end(self) -> None:
        assert self._ended is not None
        self.state = BatcherState.CLOSED
        self._stop_timer()
        self._stop_watch()
        self.reject_waiting(partial(closed_by, None))
        self.recorder.on_closed()
        self._ended.set()
