"""How threads wait for what comes soon: awake for a moment, before they sleep."""

from __future__ import annotations

import functools
import math
import os
import threading
import time

import numpy as np
from numpy.lib.stride_tricks import as_strided

LOOK_SECONDS = 1e-3
"""How long a lane looks for its signal at most before it sleeps."""

_LONGER = 2.0  # a lane looks so many times as long as it had to wait last
_GRACE = 10e-6  # seconds from the sign to the end of the look: by then a slow machine has let go, too
_MIN_DELAY = 1e-3  # seconds that a look takes too long where others want its core
_MAX_DELAY = 10e-3  # what counts of longer ones, as of a process that was stopped
_MAX_LOSS = 0.02  # share of the time that such delays may take
_MAX_REST = 0.5  # seconds that may be missing to that share


class Look:
    """One thread looks for a sign for a moment, any other gives it.

    To sleep and be woken by the system takes longer than a short work, above all when the core sleeps
    too. To look for the sign in Python would hold the interpreter's lock, which whoever prepares the
    sign needs. So NumPy looks, which lets go of that lock: whether any element is true of an array
    whose rows, by a stride of 0, are one byte each. It leaves a row at the first that is.

    A sign sets the bytes of all rows but the last: the look ends one row later, by which time the
    thread that gave it has let go of the interpreter's lock as a rule. Nothing may depend on what the
    look sees but how soon it ends.

    Args:
        seconds: how long to look at most.

    Attributes:
        seen: for each row, whether the latest look found it signed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        num_rows = round(seconds / _GRACE)
        self._bytes = bytearray(num_rows)
        self._silent = bytes(num_rows)
        self._signed = bytes([1] * (num_rows - 1) + [0])
        self._rows = as_strided(np.frombuffer(self._bytes, bool), (num_rows, _row_length()), (1, 0))
        self.seen = np.zeros(num_rows, bool)
        self._rested_at = 0.0

    def give(self) -> None:
        """Give the sign."""
        self._bytes[:] = self._signed

    def take(self, seconds: float = math.inf) -> None:
        """Look until the sign is given or the time is over, that of the constructor or less."""
        started = time.perf_counter()
        num_rows = len(self._bytes)
        if seconds < self._seconds:
            num_rows = max(2, math.ceil(seconds / _GRACE))
        # The last ones, since a sign leaves out the last of all.
        np.logical_or.reduce(self._rows[-num_rows:], axis=1, out=self.seen[-num_rows:])
        ended = time.perf_counter()
        delay = ended - started - min(seconds, self._seconds)
        if delay > _MIN_DELAY:
            self._rested_at = max(self._rested_at, ended) + min(delay, _MAX_DELAY) / _MAX_LOSS

    def is_worth_it(self, now: float) -> bool:
        """Whether looks of late have ended in time; `now` is of `time.perf_counter`.

        They do not where other processes want all cores. Who looks uses up its share of one there, and
        waits for its next turn just when it has something to do: it had better sleep.
        """
        return self._rested_at < now + _MAX_REST

    def clear(self) -> None:
        """Forget the sign."""
        self._bytes[:] = self._silent


class Wakeup:
    """A lane's thread waits for its next work, any other signals it, once for each wait.

    Attributes:
        look: what the thread sees while it is awake.
        is_looking: whether it is awake, waiting.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.look = Look(LOOK_SECONDS)
        self.is_looking = False
        self._last_wait = float("inf")

    def signal(self) -> None:
        """Let the waiting thread go on."""
        self.look.give()
        self._lock.release()

    def wait(self, *, look: bool) -> None:
        """Wait for the signal; `look` for it first, if there is a core to spare and the last came soon."""
        started = time.perf_counter()
        if look and self._last_wait < LOOK_SECONDS and has_spare_core() and self.look.is_worth_it(started):
            self.is_looking = True
            self.look.take(_LONGER * self._last_wait)
            self.is_looking = False
        self._lock.acquire()
        self.look.clear()
        self._last_wait = time.perf_counter() - started


@functools.cache
def has_spare_core() -> bool:
    """Whether a sign can be prepared while another thread looks for it."""
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
