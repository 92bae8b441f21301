"""What a lane's thread waits for between works, awake for a moment before it sleeps."""

from __future__ import annotations

import functools
import os
import threading
import time

import numpy as np
from numpy.lib.stride_tricks import as_strided

LOOK_SECONDS = 300e-6
"""How long a thread looks for its signal before it sleeps."""

_SOON = 2 * LOOK_SECONDS  # a signal that came later than this last time is not looked for the next time
_GRACE = 10e-6  # seconds from the signal to the end of the look: by then a slow machine has let go, too
_NUM_ROWS = round(LOOK_SECONDS / _GRACE)
_SILENT = bytes(_NUM_ROWS)
_SIGNALLED = bytes([1] * (_NUM_ROWS - 1) + [0])


class Wakeup:
    """One thread waits, any other signals, once for each wait.

    To sleep and be woken by the system takes longer than a short work, above all when the core sleeps
    too. To look for the signal in Python would hold the interpreter's lock, which whoever prepares the
    signal needs. So NumPy looks, which lets go of that lock: whether any element is true of an array
    whose rows, by a stride of 0, are one byte each. It leaves a row at the first that is.

    A signal sets the bytes of all rows but the last: the look ends one row later, by which time the
    signalling thread has let go of the interpreter's lock as a rule. Nothing depends on what the look
    sees but how soon the wait ends.

    Attributes:
        seen: for each row, whether the latest look found it signalled.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._bytes = bytearray(_NUM_ROWS)
        self._rows = as_strided(np.frombuffer(self._bytes, bool), (_NUM_ROWS, _row_length()), (1, 0))
        self.seen = np.zeros(_NUM_ROWS, bool)
        self._last_wait = float("inf")

    def signal(self) -> None:
        """Let the waiting thread go on."""
        self._bytes[:] = _SIGNALLED
        self._lock.release()

    def wait(self, *, look: bool) -> None:
        """Wait for the signal; `look` for it first, if there is a core to spare and the last came soon."""
        started = time.perf_counter()
        if look and self._last_wait < _SOON and _has_spare_core():
            np.logical_or.reduce(self._rows, axis=1, out=self.seen)
        self._lock.acquire()
        self._bytes[:] = _SILENT
        self._last_wait = time.perf_counter() - started


@functools.cache
def _has_spare_core() -> bool:
    """Whether the signal can be prepared while this thread looks for it."""
    return len(os.sched_getaffinity(0)) > 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() != 1


@functools.cache
def _row_length() -> int:
    """How many elements NumPy looks at in `_GRACE` seconds."""
    elements = as_strided(np.zeros(1, bool), (10_000,), (0,))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        np.logical_or.reduce(elements)
        times.append(time.perf_counter() - started)
    return max(1, round(_GRACE / min(times) * len(elements)))
