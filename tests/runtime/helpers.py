"""Latches, and a way to wait for a thread's signal without blocking the event loop."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.lowlevel

import asyncdp
from asyncdp._devices import LaneDevice
from asyncdp._runtime import Lane, Task, scheduler_of

__all__ = [
    "PATIENCE",
    "Clock",
    "LaneDevice",
    "Latch",
    "lane_threads",
    "lose_lane",
    "run_stages",
    "runtime",
    "wait_until",
]

PATIENCE = 20.0
"""Seconds after which a test gives up on another thread; far more than any needs."""


class Latch:
    """Holds a lane inside its work until the test lets go."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._opened = threading.Event()

    def hold(self) -> None:
        """Called on the lane: report the arrival, then wait."""
        self._entered.set()
        assert self._opened.wait(PATIENCE), "nobody opened the latch"

    def open(self) -> None:
        """Let the lane go on."""
        self._opened.set()

    @property
    def is_entered(self) -> bool:
        """Whether a lane is or was held."""
        return self._entered.is_set()

    async def wait_entered(self) -> None:
        """Wait until a lane is held."""
        await wait_until(self._entered.is_set)


class Clock:
    """In place of `time.perf_counter`, by which tasks are timed: passes by `advance`, hardly by itself.

    However busy the machine is, nothing takes long but what runs when the test says so.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._readings = itertools.count()

    def __call__(self) -> float:
        """Return the time, in seconds; at each reading 100 ns later, since rates divide by durations."""
        return self._start + next(self._readings) * 1e-7

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._start += seconds


async def wait_until(condition: object) -> None:
    """Give the loop back until `condition()` holds."""
    assert callable(condition)
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.lowlevel.checkpoint()


def lane_threads() -> set[threading.Thread]:
    """The threads of lanes that are alive in this process."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("asyncdp-cpu")}


def runtime(num_lanes: int = 2, max_queue: int = 1024) -> asyncdp.Runtime:
    """A runtime of CPU lanes."""
    return asyncdp.Runtime(f"cpu*{num_lanes}", max_queue=max_queue)


def lose_lane(rt: asyncdp.Runtime, position: int) -> None:
    """Let the device of a lane be lost."""
    scheduler = scheduler_of(rt)
    scheduler._on_lost(scheduler.lanes[position], RuntimeError("test"))


Calls = Sequence[tuple[Lane, Callable[[], Any]]]
"""What each lane calls in one stage."""


async def run_stages(
    rt: asyncdp.Runtime,
    first: Calls,
    *following: Callable[[list[Any], Lane], Calls],
    replica_stage: int | None = None,
) -> list[Any]:
    """Run a pass of several stages; give what the last one returned."""

    def tasks(number: int, calls: Calls) -> list[Task]:
        return [Task(lane, call, is_replica=number == replica_stage) for lane, call in calls]

    later = [
        lambda results, last, number=number, make=make: tasks(number, make(results, last))
        for number, make in enumerate(following, 1)
    ]
    return await scheduler_of(rt).run(tasks(0, first), later)
