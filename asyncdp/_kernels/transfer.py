"""How tensors of other devices reach a kernel: read in place by peers, or staged by a copy first."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class PathStatistics:
    """How many input tensors took which way to a kernel since the process started.

    Attributes:
        num_local: lay on the kernel's device already.
        num_peer: were read from another device's memory in place.
        num_staged: were copied to the kernel's device first.
    """

    num_local: int = 0
    num_peer: int = 0
    num_staged: int = 0


class _Counter:
    """Counts from several lane threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = PathStatistics()

    def add(self, *, num_local: int = 0, num_peer: int = 0, num_staged: int = 0) -> None:
        with self._lock:
            counts = self._counts
            self._counts = PathStatistics(
                counts.num_local + num_local, counts.num_peer + num_peer, counts.num_staged + num_staged
            )

    def read(self) -> PathStatistics:
        return self._counts


_counter = _Counter()


def statistics() -> PathStatistics:
    """Return the ways taken so far by compiled kernels of this process; all zero where torch's run."""
    return _counter.read()
