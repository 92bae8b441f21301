"""Lanes that hang: how they are found, gone round, and abandoned."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from .. import _loops
from ..errors import LaneHungError
from .lane import LaneThread
from .passes import Pass
from .schedule import LaneState, Schedule
from .task import Lane, Task, oldest

GRACE_SECONDS = 2.0
"""How long a cancelled close goes on waiting for lanes."""

_logger = logging.getLogger("asyncdp")


def grace_of(exc: BaseException | None) -> float | None:
    """Return how long to wait for lanes on leaving a block by `exc`.

    A task that was cancelled is not cancelled again: there Ctrl-C must not wait for a lane that hangs.
    """
    return GRACE_SECONDS if exc is not None and _loops.ends_tasks(exc) else None


class HangWatch:
    """The part of a scheduler that deals with lanes that hang; see `Scheduler` for the attributes."""

    lock: threading.Lock
    schedule: Schedule
    lanes: list[Lane]
    hang_timeout: float | None
    _threads: list[LaneThread]
    _is_stopped: threading.Event
    _perform: Any
    _discard: Any
    _wake: Any

    def abandon(self) -> None:
        """Take nothing more, and fail all that has not ended with `LaneHungError`."""
        with self.lock:
            self._perform(self.schedule.close())
            for lane, thread in zip(self.lanes, self._threads, strict=True):
                _, began = oldest(thread.started)
                for task in list(thread.started):
                    self._abandon(task)
                for task in thread.clear():
                    seconds = 0.0 if began is None else time.perf_counter() - began
                    self._discard(
                        task, LaneHungError(f"the task before this one on lane {lane.name}", seconds)
                    )
        self._wake()

    def watch(self) -> None:
        """Start to look for lanes that hang."""
        assert self.hang_timeout is not None
        threading.Thread(target=self._watch, name="asyncdp-watch", daemon=True).start()

    def find_hung(self, hang_timeout: float) -> None:
        """Mark the lanes suspect whose oldest task has run for longer than that."""
        now = time.perf_counter()
        with self.lock:
            for lane, thread in zip(self.lanes, self._threads, strict=True):
                task, started = oldest(thread.started)
                if started is None or task is None or now - started <= hang_timeout:
                    continue
                if self.schedule.is_closed:
                    self._abandon(task)
                elif self.schedule.mark_suspect(lane._index, suspect=True):
                    _logger.warning(
                        "Lane %s is suspect: its task %r has run for %.1f s. Others are used until it ends.",
                        lane.name,
                        task.name,
                        now - started,
                    )
            self._abandon_cancelled()
        self._wake()

    def _watch(self) -> None:
        assert self.hang_timeout is not None
        seconds = min(max(0.01, self.hang_timeout / 4), threading.TIMEOUT_MAX)
        while not self._is_stopped.wait(seconds):
            self.find_hung(self.hang_timeout)

    # All that follows is called with the lock held.

    def _note_answer(self, lane: Lane) -> None:
        """Take note that a lane has ended a task, and so does not hang."""
        started = self._threads[lane._index].started
        if started:
            started[next(iter(started))] = time.perf_counter()  # it had to wait for this one
        if self.schedule.mark_suspect(lane._index, suspect=False):
            _logger.warning("Lane %s has answered and is used again.", lane.name)

    def _abandon(self, task: Task) -> None:
        """Let a pass end as if a task of its had failed, although it runs on."""
        if task.is_abandoned:
            return  # given up when the close began
        task.is_abandoned = True
        pass_, lane = task.pass_, task.lane
        assert isinstance(pass_, Pass)
        seconds = time.perf_counter() - self._threads[lane._index].started[task]
        _logger.warning(
            "Lane %s hangs: its task %r, which has run for %.1f s, is abandoned.",
            lane.name,
            task.name,
            seconds,
        )
        if self.schedule.is_closed:
            self._threads[lane._index].give_up()
        error = LaneHungError(f"task {task.name!r} on lane {lane.name}", seconds)
        pass_.failures = (*pass_.failures, (task.place, error))
        self._perform(self.schedule.on_task_done(pass_, lane._index, failed=True))

    def _abandon_cancelled(self) -> None:
        """Let cancelled passes end that wait for nothing but suspect lanes."""
        for lane, thread in zip(self.lanes, self._threads, strict=True):
            if lane.state is LaneState.SUSPECT:
                for task in list(thread.started):
                    if task.pass_.is_cancelled:
                        self._abandon(task)
