"""Looks at a running job now and then, and tells whoever wants to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .events import Report, Started, Warned
from .monitor import Monitor


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
        self._num_warned = 0

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
