"""The process's own runtime, and what happens to all runtimes at a fork and at the interpreter's end."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Sequence

import torch

from .. import _devices
from .._devices import parse_devices
from ..errors import AsyncDPError
from . import trace
from .lane import Lane
from .runtime import Runtime, cores

_EXIT_SECONDS = 5.0


class _DefaultRuntime(Runtime):
    """The process's own runtime: grows lanes as they are asked for, and is never closed before exit."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__([_devices.lane_device_for(device) for device in devices])

    def lanes_for(self, devices: Sequence[torch.device]) -> list[Lane]:
        found, missing = self._find_lanes(devices)
        if missing:
            with self._core.lock:
                for device in self._find_lanes(devices)[1]:  # unless another thread was quicker
                    self._core.add_lane(_devices.lane_device_for(device))
            found, _ = self._find_lanes(devices)
        return found


_default: _DefaultRuntime | None = None
_default_lock = threading.Lock()


def default_runtime() -> Runtime:
    """The process's own runtime, made at first use, shared by every event loop and thread."""
    return _made(None)


def default_lanes(devices: Sequence[torch.device]) -> tuple[Runtime, list[Lane]]:
    """The process's own runtime, and one of its lanes for each entry of `devices`."""
    runtime = _made(devices)
    return runtime, runtime.lanes_for(devices)


def _made(devices: Sequence[torch.device] | None) -> Runtime:
    """The process's own runtime; `devices` are those of the caller, if it names any."""
    global _default
    with _default_lock:
        if _default is None:
            _default = _DefaultRuntime(_first_devices(devices))
        return _default


def _first_devices(named: Sequence[torch.device] | None) -> Sequence[torch.device]:
    try:
        return parse_devices()
    except AsyncDPError:
        if named is None:
            raise
        return named  # whoever names devices need not know of a wrong default


def _shut_down_all() -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for core in list(cores):
        core.shut_down(max(0.0, deadline - time.monotonic()))


def _forget_after_fork() -> None:
    """In a forked child the lanes' threads do not exist: start anew, and refuse the old runtimes.

    A trace goes on in the parent alone. What only CUDA lanes use is left alone: torch refuses CUDA in a
    forked child.
    """
    global _default, _default_lock
    trace.recorder = None
    _default = None
    _default_lock = threading.Lock()
    for core in list(cores):
        core.lock = threading.Lock()
        core.closed_cause = (
            "the runtime was made before a fork, and its threads do not exist in this child process"
        )
        core.schedule.closed = True


atexit.register(_shut_down_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
