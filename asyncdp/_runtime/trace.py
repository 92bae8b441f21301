"""An opt-in recorder of what lanes do, in the format of Chrome's and Perfetto's trace viewers."""

from __future__ import annotations

import heapq
import itertools
import json
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import anyio.to_thread

from .._devices.base import DeviceTimes
from .schedule import Progress
from .task import Lane, Task, driver_of, this_thread

recorder: TraceRecorder | None = None
"""The one that records now. Lanes look here at each task, which is all that tracing costs when off."""

_QUEUED, _ISSUED, _COMPLETE, _TIMED = "queued", "on lane", "on device", "device time"


class _Issued(NamedTuple):
    """A task under way."""

    name: str
    since: float
    times: DeviceTimes | None


class TraceRecorder:
    """Records every pass from `async with` to its end, then writes the file.

    Each lane is a row with a span for each task it ran, and within it one for copies to its device; the
    time a task was queued, and the time its device still took after the call had returned, are spans of
    their own beside the row. On CUDA so is the time the task took on its stream, by the device's own
    clock. Tasks carry the number of their pass and shard.

    Args:
        path: the file to write, JSON; open it at ui.perfetto.dev, or with `asyncdp trace summary`.
        max_events: spans kept; later ones are counted and dropped.

    Raises:
        RuntimeError: another recorder is active.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, *, max_events: int = 1_000_000) -> None:
        self.path = Path(path)
        self.num_dropped = 0
        self._max_events = max_events
        self._events: list[dict[str, Any]] = []
        self._started = time.perf_counter()
        self._queued: dict[Task, float] = {}
        self._issued: dict[Task, _Issued] = {}
        self._timed_until: dict[Lane, float] = {}
        self._passes: weakref.WeakKeyDictionary[Progress, int] = weakref.WeakKeyDictionary()
        self._ordinals = itertools.count()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        state = "recording" if recorder is self else "off"
        return f"<TraceRecorder {self.path}: {state}, {len(self._events)} spans>"

    async def __aenter__(self) -> TraceRecorder:
        global recorder
        if recorder is not None:
            raise RuntimeError(f"{recorder!r} is active. Leave it before another one is entered.")
        recorder = self
        try:
            await anyio.to_thread.run_sync(self.path.touch)
        except BaseException:
            recorder = None
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global recorder
        recorder = None
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._write)

    # Called by lanes and passes while this recorder is active; from any thread.

    def queued(self, task: Task) -> None:
        """Note that a task has entered its lane's queue."""
        self._queued[task] = time.perf_counter()

    def started(self, task: Task) -> Callable[[bool], None]:
        """Note that a lane begins a task; return what to call with whether it has ended, once it returned."""
        name = task.name
        times = driver_of(task.lane).time_next()
        begun = time.perf_counter()
        self._issued[task] = _Issued(name, begun, times)
        self._add(task, _QUEUED, name, self._queued.pop(task, begun), begun)

        def issued(ended: bool) -> None:
            now = time.perf_counter()
            self._add(task, _ISSUED, name, begun, now, task.error)
            if ended:
                self._issued.pop(task, None)
                self._add_timed(task, name, times)
            elif task in self._issued:  # else the device was quicker than this thread
                self._issued[task] = _Issued(name, now, times)

        return issued

    def scattered(self, begun: float) -> None:
        """Note that this thread's task has copied its shard to its lane's device, from `begun` until now."""
        self._add_step("scatter", begun)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Record a span within that of this thread's task."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._add_step(name, begun)

    def _add_step(self, name: str, begun: float) -> None:
        task = this_thread.task
        if task is not None:
            self._add(task, _ISSUED, name, begun, time.perf_counter())

    def completed(self, task: Task) -> None:
        """Note that the device is done with a task whose function returned earlier."""
        now = time.perf_counter()
        name, issued, times = self._issued.pop(task, _Issued(_COMPLETE, now, None))
        self._add(task, _COMPLETE, name, min(issued, now), now, task.error)
        self._add_timed(task, name, times)

    def _add_timed(self, task: Task, name: str, times: DeviceTimes | None) -> None:
        span = None if times is None else times()
        if span is not None:
            # Tasks of a lane follow each other; the mapping of clocks is not so exact.
            begin = max(span[0], self._timed_until.get(task.lane, 0.0))
            end = self._timed_until[task.lane] = max(begin, span[1])
            self._add(task, _TIMED, name, begin, end)

    def _add(
        self, task: Task, kind: str, name: str, begin: float, end: float, error: BaseException | None = None
    ) -> None:
        with self._lock:
            args: dict[str, Any] = {"pass": self._number(task.pass_), "shard": task.index}
        if error is not None:
            args["error"] = type(error).__name__
        self.add(task.lane.name, kind, name, begin, end, args)

    def add(
        self, row: str, kind: str, name: str, begin: float, end: float, args: Mapping[str, Any] | None = None
    ) -> None:
        """Record a span from `begin` to `end`, which may overlap with others of the same row and kind."""
        with self._lock:
            if len(self._events) >= self._max_events:
                self.num_dropped += 1
                return
            self._events.append(
                {
                    "ph": "X",
                    "name": name,
                    "cat": kind,
                    "pid": 1,
                    "ts": round((begin - self._started) * 1e6, 3),
                    "dur": round((end - begin) * 1e6, 3),
                    "args": {**(args or {}), "lane": row},
                }
            )

    def _number(self, pass_: Progress) -> int:
        number = self._passes.get(pass_)
        if number is None:
            number = self._passes[pass_] = next(self._ordinals)
        return number

    def _write(self) -> None:
        with self._lock:
            rows = [
                {"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": name}}
                for name, row in _lay_out(self._events).items()
            ]
            self._issued.clear()  # here, since events of a device may take their time to go
            self._queued.clear()
            contents = {"traceEvents": rows + self._events, "otherData": {"num_dropped": self.num_dropped}}
            self.path.write_text(json.dumps(contents))


def _lay_out(events: list[dict[str, Any]]) -> dict[str, int]:
    """Give each span its row; return the rows by name.

    Viewers drop spans of one row that overlap but do not nest. Tasks of a queue, or in flight on a
    device, overlap at will, and get as many rows as they need.
    """
    rows: dict[str, int] = {}
    taken: dict[str, list[tuple[float, int]]] = defaultdict(list)  # until when; which of a name's rows
    for event in sorted(events, key=lambda each: each["ts"]):
        name = event["args"]["lane"]
        if event["cat"] != _ISSUED:
            name = f"{name} {event['cat']}"
            own = taken[name]
            begin, end = event["ts"], event["ts"] + event["dur"]
            place = heapq.heappop(own)[1] if own and own[0][0] <= begin else len(own)
            heapq.heappush(own, (end, place))
            name = f"{name} {place + 1}" if place else name
        event["tid"] = rows.setdefault(name, len(rows) + 1)
    return rows
