"""Virtual time for fake devices."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable

from .._checks import as_seconds


class VirtualClock:
    """Time in seconds from 0 that passes only by `advance`; every method may be called from any thread."""

    def __init__(self) -> None:
        self._now = 0.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._ordinals = itertools.count()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<VirtualClock at {self._now} s: {len(self._calls)} calls due later>"

    @property
    def now(self) -> float:
        """Time since the clock was made, in seconds."""
        return self._now

    def call_at(self, when: float, function: Callable[[], None]) -> None:
        """Call `function` from the `advance` that reaches `when`."""
        with self._lock:
            heapq.heappush(self._calls, (when, next(self._ordinals), function))

    def advance(self, seconds: float) -> None:
        """Let time pass, and make the calls that fall due in the order of their times.

        Raises:
            ValueError: `seconds` is negative, or no number.
        """
        end = self._now + as_seconds("seconds", seconds)
        while (function := self._pop_due(end)) is not None:
            function()
        self._now = end

    def advance_to_next(self) -> float:
        """Let time pass until the next call falls due, if there is one, and return the time."""
        with self._lock:
            when = self._calls[0][0] if self._calls else self._now
        self.advance(max(0.0, when - self._now))
        return self._now

    def _pop_due(self, end: float) -> Callable[[], None] | None:
        with self._lock:
            if not self._calls or self._calls[0][0] > end:
                return None
            when, _, function = heapq.heappop(self._calls)
            self._now = max(self._now, when)
            return function
