"""An opt-in recorder of what lanes do, in the format of Chrome's and Perfetto's trace viewers."""

from __future__ import annotations

import functools
import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio.to_thread

if TYPE_CHECKING:
    from .lane import Lane, Work
    from .passes import Pass

recorder: TraceRecorder | None = None
"""The one that records now. Lanes look here at each work, which is all that tracing costs when off."""

_NAMES = {
    "apply": "run",
    "apply_and_move": "run",
    "run_lane": "train",
    "_finish": "reduce",
    "gather_to": "gather",
    "prepare": "replicate",
}

_QUEUED, _ISSUED, _COMPLETE = "queued", "on lane", "on device"


class TraceRecorder:
    """Records every pass from `async with` to its end, then writes the file.

    Each lane is a row with a span for each work it ran; the time a work was queued, and the time its
    device still took after the call had returned, are spans of their own beside the row. Works carry
    the number of their pass and shard.

    Args:
        path: the file to write, JSON; open it at ui.perfetto.dev, or with `asyncdp trace summary`.
        max_events: spans kept; later ones are counted and dropped.

    Raises:
        RuntimeError: another recorder is active.
    """

    def __init__(self, path: str | Path, *, max_events: int = 1_000_000) -> None:
        self.path = Path(path)
        self.num_dropped = 0
        self._max_events = max_events
        self._events: list[dict[str, Any]] = []
        self._started = time.perf_counter()
        self._queued: dict[Work, float] = {}
        self._issued: dict[Work, tuple[str, float]] = {}
        self._rows: dict[str, int] = {}
        self._passes: weakref.WeakKeyDictionary[Pass, int] = weakref.WeakKeyDictionary()
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

    def queued(self, work: Work) -> None:
        """A work entered its lane's queue."""
        self._queued[work] = time.perf_counter()

    def started(self, work: Work) -> Callable[[bool], None]:
        """A lane begins a work; the result is called when it has, with whether the work has ended."""
        assert work.function is not None
        name = _name_of(work.function)
        begun = time.perf_counter()
        self._issued[work] = (name, begun)
        self._add(work, _QUEUED, name, self._queued.pop(work, begun), begun)

        def issued(ended: bool) -> None:
            now = time.perf_counter()
            self._add(work, _ISSUED, name, begun, now)
            if ended:
                del self._issued[work]
            elif work in self._issued:  # else the device was quicker than this thread
                self._issued[work] = (name, now)

        return issued

    def completed(self, work: Work) -> None:
        """The device is done with a work whose call returned earlier."""
        now = time.perf_counter()
        name, issued = self._issued.pop(work, (_COMPLETE, now))
        self._add(work, _COMPLETE, name, min(issued, now), now)

    def _add(self, work: Work, kind: str, name: str, begin: float, end: float) -> None:
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
                    "tid": self._row(work.lane, kind),
                    "ts": round((begin - self._started) * 1e6, 3),
                    "dur": round((end - begin) * 1e6, 3),
                    "args": {"pass": self._number(work.owner), "shard": work.index, "lane": work.lane.name},
                }
            )

    def _row(self, lane: Lane, kind: str) -> int:
        # Spans of one row must nest; works of a queue, or in flight on a device, overlap at will.
        name = lane.name if kind == _ISSUED else f"{lane.name} {kind}"
        return self._rows.setdefault(name, len(self._rows) + 1)

    def _number(self, owner: Pass) -> int:
        number = self._passes.get(owner)
        if number is None:
            number = self._passes[owner] = next(self._ordinals)
        return number

    def _write(self) -> None:
        with self._lock:
            rows = [
                {"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": name}}
                for name, row in self._rows.items()
            ]
            told = {"num_dropped": self.num_dropped}
            self.path.write_text(json.dumps({"traceEvents": rows + self._events, "otherData": told}))


def _name_of(function: Callable[..., Any]) -> str:
    """What a person would call this work."""
    while isinstance(function, functools.partial):
        carried = function.func.__name__ == "run" if hasattr(function.func, "__name__") else False
        # Training carries the caller's ambient state itself: Ambient.run(function, device).
        function = function.args[0] if carried and function.args else function.func
    name = getattr(function, "__name__", type(function).__name__)
    return _NAMES.get(name, name)
