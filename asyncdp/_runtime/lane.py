"""The thread of a lane, which runs one task after the other."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .._devices.threads import set_intra_op_threads
from . import trace
from .ambient import LaneModes
from .spin import SpinSignal
from .task import Lane, Task, this_thread


class LaneThread:
    """A persistent thread with an ordered queue.

    Args:
        lane: whose thread it is.
        device_types: of all lanes of the runtime, also of later ones; see `LaneModes`.
        lock: guards the queue; held by callers of `put`, `remove`, `clear` and `stop`.
        on_ended: called with each task that has ended, under the lock.
        on_lost: called with the error that keeps the device from being opened, without the lock.
        wake: called without the lock after what may have given others something to do.
        to_wake: functions for `wake` to call; appended to under the lock.
        spin: seconds to spin before the thread sleeps.

    Attributes:
        started: the tasks that have begun and not ended, the oldest first, and when each began.
    """

    def __init__(
        self,
        lane: Lane,
        device_types: Sequence[str],
        lock: threading.Lock,
        *,
        on_ended: Callable[[Task], None],
        on_lost: Callable[[Lane, BaseException], None],
        wake: Callable[[], None],
        to_wake: deque[Callable[[], None]],
        spin: float,
    ) -> None:
        self._lane = lane
        self._driver = lane._driver
        self._device_types = device_types
        self._lock = lock
        self._on_ended = on_ended
        self._on_lost = on_lost
        self._wake = wake
        self._to_wake = to_wake
        self._modes = LaneModes()
        self._num_threads = 0
        self._queue: deque[Task] = deque()
        self.started: dict[Task, float] = {}
        self._is_sleeping = False
        self._is_stopping = False
        self._is_given_up = False
        self._ended = threading.Event()
        self._signal = SpinSignal(spin) if spin else threading.Lock()  # released by others for each sleep
        if not spin:
            self._signal.acquire()
        self._thread = threading.Thread(target=self._run, name=f"asyncdp-{lane.name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, task: Task, *, first: bool = False) -> None:
        """Queue a task."""
        if first:
            self._queue.appendleft(task)
        else:
            self._queue.append(task)
        if trace.recorder is not None:
            trace.recorder.queued(task)
        if self._is_sleeping:
            self._is_sleeping = False
            # Not at once: the thread takes the lock first of all, and would have to wait for it.
            self._to_wake.append(self._signal.release)

    def remove(self, task: Task) -> bool:
        """Take a task out of the queue if it has not begun."""
        try:
            self._queue.remove(task)
        except ValueError:
            return False
        return True

    def clear(self) -> list[Task]:
        """Take everything out of the queue."""
        tasks = list(self._queue)
        self._queue.clear()
        return tasks

    def stop(self) -> None:
        """Let the thread end once its queue is empty."""
        self._is_stopping = True
        if self._is_sleeping:
            self._is_sleeping = False
            self._to_wake.append(self._signal.release)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread's end, `timeout` seconds at most, or until it is given up."""
        if self._thread is threading.current_thread() or not self._ended.wait(timeout):
            return
        if not self._is_given_up:
            self._thread.join(timeout)

    def give_up(self) -> None:
        """Let nobody wait for the thread's end any more; it ends once its task has, if ever."""
        self._is_given_up = True
        self._ended.set()

    def _run(self) -> None:
        this_thread.lane = self._lane
        try:
            self._driver.open()
        except Exception as error:
            # The thread goes on, to be stopped like any other; everyone who asks gets the reason.
            self._on_lost(self._lane, error)
        ended: Task | None = None
        while True:
            with self._lock:
                if ended is not None:
                    self._on_ended(ended)
                    ended = None
                task = self._queue.popleft() if self._queue else None
                if task is not None:
                    self.started[task] = time.perf_counter()
                sleeps = self._is_sleeping = task is None and not self._is_stopping
            if self._to_wake:
                self._wake()
            if task is not None:
                ended = task if self._perform(task) else None
                task = None  # nothing of an ended pass may stay referenced here
            elif sleeps:
                self._signal.acquire()
            else:
                break
        self._modes.leave()  # here, since whichever thread lets go of torch's guards gets their old modes
        self._driver.close()
        self._ended.set()

    def _perform(self, task: Task) -> bool:
        """Run one task as its caller would; return whether it has ended, or a later thread will say so."""
        started = time.perf_counter()
        setting, lane = task.setting, self._lane
        lane._busy = (lane._busy[0], started)
        if setting.num_threads != self._num_threads:
            set_intra_op_threads(setting.num_threads)
            self._num_threads = setting.num_threads
        self._modes.switch(setting.ambient.modes, self._device_types)
        issued = None if trace.recorder is None else trace.recorder.started(task)
        call, task.call = task.call, None
        assert call is not None
        marker: Any = None
        this_thread.task = task
        try:
            task.value, marker = self._driver.issue(setting.captured.get(lane.device), call)
        except BaseException as error:
            task.error = error
            task.lost = self._driver.lost(error)
        this_thread.task = None
        if marker is not None:
            # The call and its inputs stay referenced until the device is done with them.
            self._driver.on_complete(marker, partial(self._on_complete, task, call))
        if issued is not None:
            issued(marker is None)
        if self._modes.are_brief:
            self._modes.leave()
        seconds = time.perf_counter() - started
        lane._num_done += 1
        lane._busy = (lane._busy[0] + seconds, None)
        lane._last_seconds = seconds if marker is None else math.inf
        return marker is None

    def _on_complete(self, task: Task, _call: object, error: BaseException | None) -> None:
        """Take note of a task whose end on the device came after its end on the lane; from any thread."""
        if error is not None:
            task.error = error
            task.lost = self._driver.lost(error)
        if trace.recorder is not None:
            trace.recorder.completed(task)
        with self._lock:
            self._on_ended(task)
        self._wake()
