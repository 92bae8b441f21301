"""Looks at a running job now and then, and tells whoever wants to know."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from .events import Report, Started, Warned
from .history import RUNNING, ProgressLog
from .memory import resident_memory
from .monitor import Monitor

_LONGEST_STATE = 200


class Watch:
    """Samples a job while it runs.

    Args:
        monitor: what the job counts.
        estimate: returns how many records there are in all, None where that is not known.
        report: gets the events.
    """

    def __init__(self, monitor: Monitor, estimate: Callable[[], int | None], report: Report) -> None:
        self.monitor = monitor
        self.report = report
        self._estimate = estimate
        self._engine: Any = None
        self._log: ProgressLog | None = None
        self._num_warned = 0

    @contextlib.asynccontextmanager
    async def noted_in(self, folder: Path) -> AsyncIterator[None]:
        """Note in the output folder how a block of code, the whole run, goes and ends."""
        self._log = ProgressLog(folder)
        state = "stopped"
        try:
            await anyio.to_thread.run_sync(self.note)
            yield
            state = "done"
        except Exception as error:
            state = f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST_STATE]
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.note, state)

    def note(self, state: str = RUNNING) -> None:
        """Measure memory, and note in the output folder how far the job is; in a worker thread."""
        self.monitor.memory = resident_memory()
        if self._log is not None:
            self._log.note(self.monitor, self._estimate(), state)

    def start(self, engine: Any) -> None:
        """Begin, with the lanes of an engine."""
        self._engine = engine
        self.monitor.restart(engine)
        names = tuple(lane.name for lane in engine.runtime.lanes)
        self.report(Started(self._estimate(), self.monitor.num_earlier, names))
        self.warn()

    def look(self) -> None:
        """Report how far the job is."""
        self.monitor.sample(self._engine)
        self.warn()
        self.report(self.monitor.progress(self._estimate()))

    def warn(self) -> None:
        """Report the warnings that are new."""
        for text in self.monitor.warnings[self._num_warned :]:
            self.report(Warned(text))
        self._num_warned = len(self.monitor.warnings)
