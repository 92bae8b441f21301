"""When works ran on a CUDA device, by the device's own clock; used only while a trace is recorded."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import torch

# The clocks of host and device drift apart by tens of microseconds a second, and events tell the time
# between them in a float32 of milliseconds, which is coarse when it is long.
_MAX_AGE_SECONDS = 1.0


class _Reference(NamedTuple):
    """One moment on both clocks."""

    event: torch.cuda.Event
    host_time: float


class DeviceClock:
    """Maps one device's event times to the host's `time.perf_counter`."""

    def __init__(self, device: torch.device) -> None:
        # Of high priority: torch makes these apart from others, so this is not the stream of a lane.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._reference: _Reference | None = None
        self._lock = threading.Lock()

    def reference(self) -> _Reference:
        """A moment of the last second; waits some microseconds for the device where that has to be found."""
        with self._lock:
            found = self._reference
            if found is None or time.perf_counter() - found.host_time > _MAX_AGE_SECONDS:
                event = torch.cuda.Event(enable_timing=True)
                event.record(self._stream)
                event.synchronize()
                found = self._reference = _Reference(event, time.perf_counter())
            return found


class Timing:
    """The begin and end of one work on its stream; call it once the work is complete."""

    def __init__(self, reference: _Reference) -> None:
        self._reference = reference
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end: torch.cuda.Event | None = None

    def begin(self, stream: torch.cuda.Stream) -> None:
        """Mark the begin, behind all the stream has to wait for."""
        self._begin.record(stream)

    def end_by(self, event: torch.cuda.Event) -> None:
        """Take the recorded event that marks the end."""
        self._end = event

    def __call__(self) -> tuple[float, float] | None:
        """Begin and end on the host's `time.perf_counter`, in seconds; None if the work failed."""
        if self._end is None:
            return None
        try:
            begin = self._reference.host_time + self._reference.event.elapsed_time(self._begin) / 1000
            return begin, begin + self._begin.elapsed_time(self._end) / 1000
        except RuntimeError:  # the device was lost, which is reported elsewhere
            return None


_clocks: dict[torch.device, DeviceClock] = {}
_lock = threading.Lock()


def clock_of(device: torch.device) -> DeviceClock:
    """The one clock of a device."""
    with _lock:
        if device not in _clocks:
            _clocks[device] = DeviceClock(device)
        return _clocks[device]
