"""CUDA lanes: a stream per lane, and a thread per lane that waits for events."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import optree
import torch

from .. import _kernels
from .._kernels import transfer
from .base import LaneDevice
from .cuda_clock import Timing, clock_of
from .threads import set_intra_op_threads


class _Fetched(NamedTuple):
    """A result on its way to the host."""

    pinned: torch.Tensor
    host: torch.Tensor

    def arrive(self) -> None:
        """Copy it to ordinary memory, since a caller may keep it: torch never gives pinned memory back."""
        with torch.inference_mode():  # may be written only there if it was made there
            self.host.copy_(self.pinned)


class _Marker(NamedTuple):
    """The end of a task: its event, and what is on the host by then."""

    event: torch.cuda.Event
    fetched: Sequence[_Fetched]


class _Pending(NamedTuple):
    marker: _Marker
    callback: Callable[[BaseException | None], None]


class _EventWaiter:
    """Waits for the events of one lane on a daemon thread and reports each end.

    The events of a lane are reached in the order they were recorded, but for copies to the host that are
    short, so the thread can block in each one's `synchronize`. One thread for several lanes would have to
    poll their events, or a long task of one lane would hide the end of a short task of another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrivals: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"asyncdp-events-{device}", daemon=True)
        self._thread.start()

    def watch(self, pending: _Pending) -> None:
        self._arrivals.put(pending)

    def close(self) -> None:
        """End the thread; no event is pending any more."""
        self._arrivals.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        set_intra_op_threads(1)  # a copy of what has arrived must not make a team beside those of lanes
        while self._report_next():
            pass

    def _report_next(self) -> bool:
        # A call of its own, whose locals keep nothing of the task alive while the thread waits for the next.
        pending = self._arrivals.get()
        if pending is None:
            return False
        try:
            pending.marker.event.synchronize()
            for each in pending.marker.fetched:
                each.arrive()
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
    _waiter: _EventWaiter | None = None  # None until the lane is open
    _timing: Timing | None = None  # of the next task
    _fetched: Sequence[_Fetched] = ()  # by the task that runs

    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        """The stream of copies from the host.

        Of high priority: torch has a pool of its own for these, so this is not the stream of a lane.
        """
        return torch.cuda.Stream(self.device, priority=-1)

    @cached_property
    def _copies_out(self) -> torch.cuda.Stream:
        """The stream of copies to the host; one for both ways would have the next inputs wait for results."""
        return torch.cuda.Stream(self.device, priority=-1)

    def open(self) -> None:
        """Make the device current on this thread, where device 0 is by default; create the lane's stream."""
        torch.cuda.set_device(self.device)
        _allow_gradients_from_streams()
        self._stream = torch.cuda.Stream(self.device)
        self._stream.query()
        transfer.add_lane(self.device, self._stream)
        self._waiter = _EventWaiter(self.device)

    def warm_up(self) -> None:
        """Build and load the compiled kernels, where they can run; takes seconds when not cached."""
        _kernels.warm_up(self.device)

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
        """Copy through pinned memory on another stream; the lane's waits for it when the copies are used."""
        stream = self._copies
        with torch.cuda.stream(stream):
            # Torch's allocators on both sides know of these copies and do not reuse the memory before them.
            copies = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
            arrived = torch.cuda.Event()
            arrived.record(stream)

        def take() -> list[torch.Tensor]:
            self._stream.wait_event(arrived)
            for copy in copies:
                copy.record_stream(self._stream)
            return copies

        return take

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy through pinned memory on another stream, which waits for the lane's; no thread waits here."""
        # Of a copy, since the next task may write what this one gave: a buffer, the output of a graph.
        results = [tensor.clone() for tensor in tensors]
        stream = self._copies_out
        stream.wait_stream(self._stream)
        with torch.cuda.stream(stream):
            # Torch pins what it copies to like this, and does not reuse it before the copy.
            pinned = [result.to("cpu", non_blocking=True) for result in results]
        for result in results:
            result.record_stream(stream)
        fetched = [_Fetched(each, torch.empty_like(each)) for each in pinned]
        self._fetched = (*self._fetched, *fetched)
        return [each.host for each in fetched]

    def time_next(self) -> Timing | None:
        """Record two timed events around the next task; without this call no timed event is made."""
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
            torch.cuda.set_stream(self._stream)  # a task may have changed it, and the current device with it
            value = function()
        except BaseException:
            # Operations issued before the error still read their inputs. After a context error this
            # fails too, and the first error is the one to report.
            with contextlib.suppress(RuntimeError):
                self._stream.synchronize()
                if self._fetched:
                    self._copies_out.synchronize()
            self._fetched = ()
            raise
        if captured is not None:
            self._lend(value, captured.stream)
        return value, self._mark_end(timing)

    def _mark_end(self, timing: Timing | None) -> _Marker | None:
        """Record the end of a task behind all its streams; return None if it is reached."""
        fetched, self._fetched = self._fetched, ()
        stream = self._stream
        if fetched:
            stream = self._copies_out
            stream.wait_stream(self._stream)
        event = torch.cuda.Event(enable_timing=timing is not None, blocking=True)
        event.record(stream)
        if timing is not None:
            timing.end_by(event)
        if not event.query():
            return _Marker(event, fetched)
        for each in fetched:
            each.arrive()
        return None

    def _lend(self, value: Any, stream: torch.cuda.Stream) -> None:
        """Record the caller's stream on a result's tensors, which it uses after the completion.

        Otherwise the allocator could reuse their memory on this lane too early.
        """
        for leaf in optree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.device == self.device:
                leaf.record_stream(stream)

    def on_complete(self, marker: _Marker, callback: Callable[[BaseException | None], None]) -> None:
        """Hand the event to the lane's waiter thread."""
        assert self._waiter is not None
        self._waiter.watch(_Pending(marker, callback))

    def lost(self, error: BaseException) -> bool:
        """Query the stream: after a context error every further call fails too."""
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return False
        if self._waiter is None:  # `open` will find it out
            return False
        try:
            self._stream.query()
        except RuntimeError:
            return True
        return False


def _allow_gradients_from_streams() -> None:
    """Turn off torch's warning about a gradient from another stream than its parameter was first used on.

    That is intended here: lanes take turns with a module's parameters, and autograd waits for their streams.
    """
    allow = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if allow is not None:  # torch 2.10 and newer
        allow(False)
