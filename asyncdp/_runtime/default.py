"""The process's own runtime, and what happens to all runtimes at a fork and at the interpreter's end."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Sequence

import torch

from .._devices import lane_device_for, parse_devices
from ..errors import AsyncDPError
from . import trace
from .runtime import Runtime, make_growing, scheduler_of, schedulers
from .scheduler import Scheduler
from .task import Lane

_EXIT_SECONDS = 5.0


_default: Runtime | None = None
_default_lock = threading.Lock()


def default_runtime() -> Runtime:
    """Return the process's own runtime, made at first use, shared by every event loop and thread."""
    return _made(None)


def default_lanes(devices: Sequence[torch.device]) -> tuple[Scheduler, list[Lane]]:
    """Return the scheduler of the process's own runtime, and one of its lanes for each entry of `devices`."""
    scheduler = scheduler_of(_made(devices))
    return scheduler, scheduler.lanes_for(devices)


def _made(devices: Sequence[torch.device] | None) -> Runtime:
    """Return the process's own runtime; `devices` are those of the caller, if it names any."""
    global _default
    with _default_lock:
        if _default is None:
            _default = make_growing([lane_device_for(device) for device in _first_devices(devices)])
        return _default


def _first_devices(named: Sequence[torch.device] | None) -> Sequence[torch.device]:
    try:
        return parse_devices()
    except AsyncDPError:
        if named is None:
            raise
        return named  # who names devices need not know of a wrong default


def _shut_down_all() -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for scheduler in list(schedulers):
        scheduler.close(max(0.0, deadline - time.monotonic()))


def _forget_after_fork() -> None:
    """In a forked child the lanes' threads do not exist: start anew, and refuse the old runtimes.

    A trace goes on in the parent alone. What only CUDA lanes use is left alone: torch refuses CUDA in a
    forked child.
    """
    global _default, _default_lock
    trace.recorder = None
    _default = None
    _default_lock = threading.Lock()
    for scheduler in list(schedulers):
        scheduler.lock = threading.Lock()
        scheduler.closed_cause = (
            "the runtime was made before a fork, and its threads do not exist in this child process"
        )
        scheduler.schedule.is_closed = True


atexit.register(_shut_down_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
