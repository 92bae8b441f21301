"""Lanes that spin before they sleep: a pass begins sooner, at the price of a core. Off unless asked for."""

from __future__ import annotations

import functools
import math
import threading
import time

import numpy as np
from numpy.lib.stride_tricks import as_strided

MAX_SECONDS = 0.1
_ROW_SECONDS = 10e-6


class SpinSignal:
    """What a lane's thread waits by, used like a lock: `acquire` waits for one `release`.

    To sleep and be woken by the system takes longer than a short task. To spin in Python would hold the
    interpreter's lock, which whoever is to wake the lane needs. So NumPy spins, which lets go of that lock:
    it asks whether any element is true of an array whose rows, by a stride of 0, are one byte each, and
    leaves a row at the first that is. `release` sets the bytes of all rows but the last: the spin ends one
    row later, when the thread that woke the lane has let go of the interpreter's lock as a rule.

    Args:
        seconds: how long to spin at most.
    """

    def __init__(self, seconds: float) -> None:
        num_rows = math.ceil(seconds / _ROW_SECONDS) + 1
        self._lock = threading.Lock()
        self._lock.acquire()
        self._bytes = bytearray(num_rows)
        self._silent = bytes(num_rows)
        self._signalled = bytes([1] * (num_rows - 1) + [0])
        self._rows = as_strided(np.frombuffer(self._bytes, bool), (num_rows, _row_length()), (1, 0))
        self._seen = np.zeros(num_rows, bool)

    def release(self) -> None:
        """Let the thread go on that waits, or is about to."""
        self._bytes[:] = self._signalled
        self._lock.release()

    def acquire(self) -> None:
        """Wait, awake for a moment and then asleep."""
        np.logical_or.reduce(self._rows, axis=1, out=self._seen)
        self._lock.acquire()
        self._bytes[:] = self._silent


@functools.cache
def _row_length() -> int:
    """Return how many elements NumPy asks in `_ROW_SECONDS`."""
    elements = as_strided(np.zeros(1, bool), (10_000,), (0,))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        np.logical_or.reduce(elements)
        times.append(time.perf_counter() - started)
    return max(1, round(_ROW_SECONDS / min(times) * len(elements)))
