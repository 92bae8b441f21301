"""CUDA lanes: a stream per lane, and a thread per lane that waits for events."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch

from .._kernels import transfer
from .base import LaneDevice
from .cuda_clock import Timing, clock_of


class _Pending(NamedTuple):
    event: torch.cuda.Event
    callback: Callable[[BaseException | None], None]


class _EventWaiter:
    """Waits for the events of one lane on a daemon thread and reports each end.

    They come in the order they were recorded, so that a blocking synchronise waits for each, at no cost.
    One thread for several lanes would have to ask for their events in turn all the time, or a long work of
    one lane would hide the end of a short one of another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrivals: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"asyncdp-events-{device}", daemon=True)
        self._thread.start()

    def watch(self, pending: _Pending) -> None:
        self._arrivals.put(pending)

    def close(self) -> None:
        """End the thread, which has nothing to wait for any more."""
        self._arrivals.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while self._report_next():
            pass

    def _report_next(self) -> bool:
        # A call of its own, so that nothing of the work is kept alive while the next is waited for.
        pending = self._arrivals.get()
        if pending is None:
            return False
        try:
            pending.event.synchronize()
        except Exception as error:
            pending.callback(error)
        else:
            pending.callback(None)
        return True


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
        _allow_gradients_from_streams()
        self._stream = torch.cuda.Stream(self.device)
        self._stream.query()
        transfer.add_lane(self.device, self._stream)
        self._waiter = _EventWaiter(self.device)

    def close(self) -> None:
        """End the thread that waits for the lane's events."""
        if self._waiter is not None:
            self._waiter.close()

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
            torch.cuda.set_stream(self._stream)  # which a work may have changed, and the device with it
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
        """Hand the event to the lane's waiter thread."""
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


def _allow_gradients_from_streams() -> None:
    """Have torch not warn that a parameter's gradient comes from another stream than it was first used on.

    Here that is meant: lanes take turns with a module's parameters, and autograd waits for their streams.
    """
    allow = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if allow is not None:  # torch 2.10 and newer
        allow(False)
