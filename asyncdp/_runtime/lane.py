"""One ordered queue of work, and the thread that does it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from .._devices.base import LaneDevice
from .._devices.threads import set_intra_op_threads
from .._loops import completion
from . import trace
from .ambient import LaneModes, Modes, current_modes
from .schedule import LaneState
from .wakeup import LOOK_SECONDS, Wakeup

if TYPE_CHECKING:
    from .core import Core
    from .passes import Pass


class _Current(threading.local):
    lane: Lane | None = None


_current = _Current()


def current_lane() -> Lane | None:
    """The lane whose thread this is, or None."""
    return _current.lane


_alive: dict[Lane, None] = {}  # all lanes of the process whose threads run
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alive.clear)


def _is_any_at_work() -> bool:
    """Whether some lane of the process has use for a core that another one looks for work with."""
    return any(lane.running is not None for lane in list(_alive))


class Work:
    """What one lane does for one pass: a call, and where its end is reported."""

    __slots__ = ("error", "function", "index", "lane", "lost", "owner", "value")

    def __init__(self, lane: Lane, function: Callable[[], Any], owner: Pass, index: int) -> None:
        self.lane = lane
        self.function: Callable[[], Any] | None = function  # None once begun or dropped
        self.owner = owner
        self.index = index
        self.value: Any = None
        self.error: BaseException | None = None
        self.lost = False  # whether the error means that the device is


class Lane:
    """A persistent thread that does one work after the other on one device.

    Attributes:
        name: how errors, statistics and thread lists call this lane, "cuda:1" say.
        index: its place in the runtime.
        device: where its tensors live.
        running: the pass whose work it does, for that work itself; None between works.
        num_done: works done since the lane was made.
        busy_seconds: time spent in works.
        last_seconds: that the last work took; infinite before there is one, or if the device was to go on.
    """

    def __init__(self, name: str, index: int, driver: LaneDevice, core: Core) -> None:
        self.name = name
        self.index = index
        self.driver = driver
        self.device = driver.device
        self.running: Pass | None = None
        self.num_done = 0
        self.busy_seconds = 0.0
        self.last_seconds = math.inf
        self._sets_default_device = self.device.type != "cpu"  # which every thread's default device is anyway
        self._num_threads = 0
        self._modes = LaneModes()
        self._core = core  # its lock guards the queue and the two flags
        self._queue: deque[Work] = deque()
        self._sleeping = False
        self._stopping = False
        self._wakeup = Wakeup()
        self._thread = threading.Thread(target=self._run, name=f"asyncdp-{name}", daemon=True)

    @property
    def state(self) -> LaneState:
        """Whether the lane takes work."""
        return self._core.schedule.state(self.index)

    @property
    def is_alert(self) -> bool:
        """Whether it waits for work, awake, and a work like its last one ends well within a loop's look."""
        return self._wakeup.is_looking and self.last_seconds < completion.LOOK_SECONDS / 2

    @property
    def is_lost(self) -> bool:
        """Whether the device is lost."""
        return self.index in self._core.lost

    def __repr__(self) -> str:
        return f"<Lane {self.name}: {len(self._queue)} queued, {self.num_done} done>"

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, work: Work, *, first: bool = False) -> None:
        """Queue a work; the runtime's lock is held by the caller."""
        if first:
            self._queue.appendleft(work)
        else:
            self._queue.append(work)
        if trace.recorder is not None:
            trace.recorder.queued(work)
        if self._sleeping:
            self._rouse()

    def remove(self, work: Work) -> bool:
        """Take a work out of the queue if it has not started; the lock is held by the caller."""
        try:
            self._queue.remove(work)
        except ValueError:
            return False
        return True

    def clear(self) -> list[Work]:
        """Take everything out of the queue; the lock is held by the caller."""
        works = list(self._queue)
        self._queue.clear()
        return works

    def stop(self) -> None:
        """Let the thread end once its queue is empty; the lock is held by the caller."""
        self._stopping = True
        if self._sleeping:
            self._rouse()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread's end, `timeout` seconds at most."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def as_default_device(self) -> AbstractContextManager[object]:
        """A block of this lane's thread in which what names no device is made on the lane's."""
        return self.device if self._sets_default_device else nullcontext()

    def without_default_device(self) -> AbstractContextManager[None]:
        """A block of this lane's thread in which what names no device is made where it is anywhere else.

        A default device costs some microseconds at every operation and look at a tensor, and an
        optimizer that counts its steps on it waits for the device at each.
        """
        return self._without_default_device() if self._sets_default_device else nullcontext()

    @contextmanager
    def _without_default_device(self) -> Iterator[None]:
        self.device.__exit__(None, None, None)
        try:
            yield
        finally:
            self.device.__enter__()

    def _rouse(self) -> None:
        self._sleeping = False
        self._core.to_wake.append(self._wakeup.signal)

    def _run(self) -> None:
        # Left again at the end: torch would drop it after the thread's end, take the interpreter's lock for
        # that, and abort an interpreter that exits.
        with self.as_default_device():
            self._serve()

    def _serve(self) -> None:
        _current.lane = self
        _alive[self] = None
        self._open()
        ended: Work | None = None
        modes: Modes | None = None  # of this thread; None if a work may have switched them
        # Little is done between this lane's waking and its waking of the task that waits: some ten
        # microseconds more made short works take twice as long on a virtual machine, it seems because
        # the task's core falls asleep. What can be done before or after is done there.
        while True:
            with self._core.lock:
                if ended is not None:
                    ended.owner.ended(ended)
                work = self._queue.popleft() if self._queue else None
                stopped = work is None and self._stopping
                self._sleeping = work is None and not stopped
                idle = self._core.num_running == 0
            # An idle lane must not keep the last pass's tensors alive.
            ended = None
            # Last of all, so that the woken task finds the lock free and this lane ready for more.
            if self._core.to_wake:
                self._core.wake()
            if work is not None:
                modes = modes or current_modes(self._core.device_types)
                ended = work if self._perform(work, modes) else None
                modes = None
                del work
            elif stopped:
                break
            else:
                modes = current_modes(self._core.device_types)
                looks = idle and self.last_seconds < LOOK_SECONDS and not _is_any_at_work()
                self._wakeup.wait(look=looks)
        del _alive[self]
        self._modes.leave()  # here, since whichever thread lets go of torch's guards gets their old modes
        self.driver.close()

    def _open(self) -> None:
        try:
            self.driver.open()
        except Exception as error:
            # The thread goes on, to be stopped like any other; everyone who asks gets the reason.
            with self._core.lock:
                self._core.lose(self, error)
            self._core.wake()

    def _perform(self, work: Work, modes: Modes) -> bool:
        """Run one work as its caller would; tell whether it has ended or a later thread will say so.

        `modes` are those of this thread now, whatever earlier works have left switched.
        """
        started = time.perf_counter()
        owner = work.owner
        if owner.num_threads != self._num_threads:
            set_intra_op_threads(owner.num_threads)
            self._num_threads = owner.num_threads
        if owner.ambient.modes != modes:
            self._modes.switch(owner.ambient.modes, self._core.device_types)
        issued = None if trace.recorder is None else trace.recorder.started(work)
        function, work.function = work.function, None
        assert function is not None
        marker: Any = None
        self.running = owner
        try:
            captured = owner.captured.get(self.device) if owner.captured else None
            work.value, marker = self.driver.issue(captured, function)
        except BaseException as error:
            work.error = error
            work.lost = self.driver.lost(error)
        self.running = None
        if marker is not None:
            # The call and its inputs stay referenced until the device is done with them.
            self.driver.on_complete(marker, partial(owner.complete, work, function))
        if issued is not None:
            issued(marker is None)
        if self._modes.are_brief:
            self._modes.leave()
        self.num_done += 1
        seconds = time.perf_counter() - started
        self.busy_seconds += seconds
        self.last_seconds = seconds if marker is None else math.inf
        return marker is None
