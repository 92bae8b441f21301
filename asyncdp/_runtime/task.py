"""Lanes as others see them, and tasks: passive data, which the threads of lanes run."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .._devices import LaneDevice
from .ambient import Ambient
from .schedule import LaneState, Progress, Schedule


@dataclass(frozen=True)
class LaneStatistics:
    """One lane at one moment."""

    name: str
    device: torch.device
    state: LaneState
    num_queued: int
    """Tasks that are queued or running."""
    num_done: int
    busy_seconds: float
    """Time spent in tasks since the lane was made, the running one included, in seconds."""
    task_label: str | None = None
    """How traces call the task that runs, or of several the oldest; None if none does."""
    task_started: float | None = None
    """When that task began, by `time.perf_counter()`."""


class Lane:
    """One ordered queue of tasks on one device, with a thread of its own.

    Attributes:
        name: how errors, statistics and thread lists call this lane, "cuda:1" say.
        device: where its tensors live.
    """

    # What has an underscore here belongs to the package's runtime.

    def __init__(self, name: str, index: int, driver: LaneDevice, schedule: Schedule) -> None:
        self.name = name
        self.device = driver.device
        self._index = index
        self._driver = driver
        self._schedule = schedule
        self._num_done = 0
        self._busy: tuple[float, float | None] = (0.0, None)  # in ended tasks; since when in one that runs
        self._started: Mapping[Task, float] = {}  # of its thread, which changes it under the lock
        self._last_seconds = math.inf

    def __repr__(self) -> str:
        num_queued = self._schedule.loads[self._index]
        return f"<Lane {self.name}: {self.state.value}, {num_queued} queued, {self._num_done} done>"

    @property
    def state(self) -> LaneState:
        """Whether the lane takes tasks."""
        return self._schedule.states[self._index]

    def statistics(self) -> LaneStatistics:
        """Return the lane's counts as of now."""
        seconds, since = self._busy
        if since is not None:
            seconds += time.perf_counter() - since
        task, started = oldest(self._started)
        label = None if task is None else task.name
        if task is None or task.function is None:
            label = started = None  # it has ended meanwhile
        return LaneStatistics(
            name=self.name,
            device=self.device,
            state=self.state,
            num_queued=self._schedule.loads[self._index],
            num_done=self._num_done,
            busy_seconds=seconds,
            task_label=label,
            task_started=started,
        )


@dataclass(slots=True)
class Setting:
    """What all tasks of a pass run under.

    Attributes:
        ambient: what the caller had switched on.
        num_threads: intra-op threads on a CPU lane.
        captured: what each device's `LaneDevice.capture` noted at the call.
    """

    ambient: Ambient
    num_threads: int
    captured: Mapping[torch.device, Any]


@dataclass(slots=True, eq=False)
class Task:
    """One lane's piece of a pass.

    Attributes:
        lane: where it runs.
        function: what it does; None once it has ended or was discarded.
        label: how traces call it; None for the function's own name.
        is_replica: whether its errors say which replica they come from.
        index: its place in its stage.
        call: the function, under the caller's context variables and default device.
        lost: whether its error means that the device is lost.
        is_abandoned: whether nobody waits for its end any more.
    """

    lane: Lane
    function: Callable[[], Any] | None
    label: str | None = None
    is_replica: bool = False
    index: int = field(default=0, init=False)
    pass_: Progress = field(init=False, repr=False)
    setting: Setting = field(init=False, repr=False)
    call: Callable[[], Any] | None = field(default=None, init=False, repr=False)
    value: Any = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)
    lost: bool = field(default=False, init=False)
    is_abandoned: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        """How a person would call it, as long as it has not ended."""
        function: Any = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return self.label or str(getattr(function, "__name__", type(function).__name__))

    @property
    def place(self) -> str:
        """Where it runs, as errors say it."""
        return (
            f"replica {self.index} on lane {self.lane.name}" if self.is_replica else f"lane {self.lane.name}"
        )


def oldest(started: Mapping[Task, float]) -> tuple[Task | None, float | None]:
    """Return the first of the tasks that have begun, and when; read without the lock."""
    while True:
        try:
            return next(iter(started.items()), (None, None))
        except RuntimeError:
            continue  # it changed in between


class _Thread(threading.local):
    lane: Lane | None = None
    task: Task | None = None


this_thread = _Thread()
"""The lane whose thread this is, and the task it runs."""


def begin_stage() -> bool:
    """Go on to another stage of the pass within the task that this lane runs: cheaper than a task of its own.

    Returns:
        Whether it may begin: the pass was not cancelled.
    """
    task = this_thread.task
    assert task is not None
    task.is_replica = False
    return not task.pass_.is_cancelled


def on_cancel(call: Callable[[], object]) -> None:
    """Have `call` called, from any thread, once the pass is cancelled whose task this lane runs."""
    task = this_thread.task
    assert task is not None
    task.pass_.on_cancel = call
    if task.pass_.is_cancelled:
        call()


def is_lost(lane: Lane) -> bool:
    """Return whether the lane's device is lost."""
    return lane.state is LaneState.LOST


def driver_of(lane: Lane) -> LaneDevice:
    """Return the driver of the lane's device."""
    return lane._driver


def load_of(lane: Lane) -> int:
    """Return how many tasks are on the lane, the running one included."""
    return lane._schedule.loads[lane._index]


def last_seconds(lane: Lane) -> float:
    """Return how long the lane's last task took; infinite if there is none, or its device went on."""
    return lane._last_seconds
