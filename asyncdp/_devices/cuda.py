"""CUDA lanes: a stream per lane, and a thread per device that waits for events."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch

from .._kernels import transfer
from .base import LaneDevice
from .cuda_clock import Timing, clock_of

_POLL_SECONDS = 50e-6


class _Pending(NamedTuple):
    event: torch.cuda.Event
    callback: Callable[[BaseException | None], None]


class _EventWaiter:
    """Waits for the events of one device on a daemon thread and reports each end.

    The events of one lane come in the order they were recorded, and are waited for in a blocking
    synchronise, which costs no CPU. With several lanes a long event of one must not hide a short one
    of another, so all are queried in turn, every 50 us while any is pending.

    Attributes:
        num_lanes: lanes on the device, of all runtimes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrivals: queue.SimpleQueue[_Pending] = queue.SimpleQueue()
        self.num_lanes = 0
        threading.Thread(target=self._run, name=f"asyncdp-events-{device}", daemon=True).start()

    def watch(self, pending: _Pending) -> None:
        self._arrivals.put(pending)

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        waiting: deque[_Pending] = deque()
        while True:
            if not waiting:
                waiting.append(self._arrivals.get())
            while not self._arrivals.empty():
                waiting.append(self._arrivals.get())
            if self.num_lanes == 1:
                self._finish(waiting.popleft())
            elif not self._sweep(waiting):
                time.sleep(_POLL_SECONDS)

    def _sweep(self, waiting: deque[_Pending]) -> bool:
        """Report every event that has been reached; tell whether there was one."""
        reached = False
        for _ in range(len(waiting)):
            pending = waiting.popleft()
            if _reached(pending.event):
                self._finish(pending)
                reached = True
            else:
                waiting.append(pending)
        return reached

    def _finish(self, pending: _Pending) -> None:
        try:
            pending.event.synchronize()
        except Exception as error:
            pending.callback(error)
        else:
            pending.callback(None)


def _reached(event: torch.cuda.Event) -> bool:
    try:
        return bool(event.query())
    except Exception:
        return True  # the error comes out again, and is reported, in synchronize


_waiters: dict[torch.device, _EventWaiter] = {}
_waiters_lock = threading.Lock()


def forget_waiters() -> None:
    """Forget the waiter threads; called in a forked child, where they no longer exist."""
    global _waiters_lock
    _waiters_lock = threading.Lock()
    _waiters.clear()


def _join_waiter(device: torch.device) -> _EventWaiter:
    """The waiter of a device, which counts one more lane from now on."""
    with _waiters_lock:
        if device not in _waiters:
            _waiters[device] = _EventWaiter(device)
        _waiters[device].num_lanes += 1
        return _waiters[device]


def _leave_waiter(waiter: _EventWaiter) -> None:
    with _waiters_lock:
        waiter.num_lanes -= 1


class _Captured(NamedTuple):
    stream: torch.cuda.Stream
    event: torch.cuda.Event


class CudaLane(LaneDevice):
    """A lane on a CUDA device, with a stream of its own."""

    captures = True
    prefetches = True

    _stream: torch.cuda.Stream
    _waiter: _EventWaiter | None = None  # until it is open
    _copies: torch.cuda.Stream | None = None  # made when first needed
    _timing: Timing | None = None  # of the next work

    def open(self) -> None:
        """Bind the thread to the device: a fresh thread has no current context and would use device 0."""
        torch.cuda.set_device(self.device)
        self._stream = torch.cuda.Stream(self.device)
        self._stream.query()
        transfer.add_lane(self.device, self._stream)
        self._waiter = _join_waiter(self.device)

    def close(self) -> None:
        """Leave the device's waiter to the other lanes."""
        if self._waiter is not None:
            _leave_waiter(self._waiter)

    def capture(self) -> _Captured:
        """Record an event behind everything the caller has issued on this device."""
        stream = torch.cuda.current_stream(self.device)
        event = torch.cuda.Event()
        event.record(stream)
        return _Captured(stream, event)

    def prefetch(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Copy through pinned memory on a stream beside the lane's; the taker has the lane's wait for it."""
        if self._copies is None:
            # Of high priority: torch makes these apart from others, so this is not the stream of a lane.
            self._copies = torch.cuda.Stream(self.device, priority=-1)
        stream = self._copies
        with torch.cuda.stream(stream):
            # The allocators of both ends know of these copies: neither gives its memory away before them.
            copies = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
            arrived = torch.cuda.Event()
            arrived.record(stream)

        def take() -> list[torch.Tensor]:
            self._stream.wait_event(arrived)
            for copy in copies:
                copy.record_stream(self._stream)
            return copies

        return take

    def time_next(self) -> Timing | None:
        """Have two timed events recorded around the next work; otherwise none are."""
        with contextlib.suppress(RuntimeError):
            self._timing = Timing(clock_of(self.device).reference())
        return self._timing

    def issue(self, captured: _Captured | None, function: Callable[[], Any]) -> tuple[Any, Any]:
        """Call `function` on the lane's stream and mark its end with a blocking-sync event."""
        if captured is not None:
            self._stream.wait_event(captured.event)
        timing, self._timing = self._timing, None
        if timing is not None:
            timing.begin(self._stream)
        try:
            with torch.cuda.stream(self._stream):
                value = function()
        except BaseException:
            # What was issued before the error still reads its inputs. After a context error this
            # fails too, and the first error is the one to report.
            with contextlib.suppress(RuntimeError):
                self._stream.synchronize()
            raise
        if captured is not None:
            self._lend(value, captured.stream)
        event = torch.cuda.Event(enable_timing=timing is not None, blocking=True)
        event.record(self._stream)
        if timing is not None:
            timing.end_by(event)
        return value, None if event.query() else event

    def _lend(self, value: Any, stream: torch.cuda.Stream) -> None:
        """Tie a result's tensors to the caller's stream, which goes on using them after the completion.

        Without this the allocator could give their memory back to this lane too early.
        """
        for leaf in optree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.device == self.device:
                leaf.record_stream(stream)

    def on_complete(self, marker: torch.cuda.Event, callback: Callable[[BaseException | None], None]) -> None:
        """Hand the event to the device's waiter thread."""
        assert self._waiter is not None
        self._waiter.watch(_Pending(marker, callback))

    def lost(self, error: BaseException) -> bool:
        """Ask the stream again: after a context error every further call fails too."""
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return False
        if self._waiter is None:  # not open yet, which finds it out
            return False
        try:
            self._stream.query()
        except RuntimeError:
            return True
        return False
