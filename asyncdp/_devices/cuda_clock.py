"""When tasks ran on a CUDA device, by the device's own clock; used only while a trace is recorded."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import torch

# The clocks of host and device drift apart, and events report the time between them as a float32 of
# milliseconds, whose resolution falls with its length.
_MAX_AGE_SECONDS = 1.0


class _Reference(NamedTuple):
    """One moment on both clocks."""

    event: torch.cuda.Event
    host_time: float


class DeviceClock:
    """Maps one device's event times to the host's `time.perf_counter`."""

    def __init__(self, device: torch.device) -> None:
        # Of high priority: torch has a pool of its own for these, so this is not the stream of a lane.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._reference: _Reference | None = None
        self._lock = threading.Lock()

    def reference(self) -> _Reference:
        """Return a moment of the last second on both clocks; may wait microseconds for the device."""
        with self._lock:
            found = self._reference
            if found is None or time.perf_counter() - found.host_time > _MAX_AGE_SECONDS:
                event = torch.cuda.Event(enable_timing=True)
                event.record(self._stream)
                event.synchronize()
                found = self._reference = _Reference(event, time.perf_counter())
            return found


class Timing:
    """The begin and end of one task on its stream; call it once the task is complete."""

    def __init__(self, reference: _Reference) -> None:
        self._reference = reference
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end: torch.cuda.Event | None = None

    def begin(self, stream: torch.cuda.Stream) -> None:
        """Mark the begin, behind everything the stream has to wait for."""
        self._begin.record(stream)

    def end_by(self, event: torch.cuda.Event) -> None:
        """Take the recorded event that marks the end."""
        self._end = event

    def __call__(self) -> tuple[float, float] | None:
        """Return begin and end by the host's `time.perf_counter`, in seconds; None if the task failed."""
        if self._end is None:
            return None
        try:
            begin = self._reference.host_time + self._reference.event.elapsed_time(self._begin) / 1000
            return begin, begin + self._begin.elapsed_time(self._end) / 1000
        except RuntimeError:  # the device was lost, which `on_complete` reports
            return None


_clocks: dict[torch.device, DeviceClock] = {}
_lock = threading.Lock()


def clock_of(device: torch.device) -> DeviceClock:
    """Return the clock of a device, the same one at every call."""
    with _lock:
        if device not in _clocks:
            _clocks[device] = DeviceClock(device)
        return _clocks[device]
