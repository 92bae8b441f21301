"""Waits for collectives that leave the process free to exit.

A thread that returns from C++ while the interpreter shuts down takes the whole process with it (`terminate
called without an active exception`). So threads wait in slices, and at exit none begins another.
"""

from __future__ import annotations

import atexit
import os
import threading
from datetime import timedelta
from typing import Any

_SLICE = timedelta(milliseconds=200)


class _Exit:
    """Counts the threads that wait in C++, and keeps them out of it at exit."""

    def __init__(self) -> None:
        self.forget()

    def __enter__(self) -> None:
        with self._changed:
            if not self._has_come:
                self._num_waiting += 1
                return
        threading.Event().wait()  # for ever: the process is about to end

    def __exit__(self, *exc_info: object) -> None:
        with self._changed:
            self._num_waiting -= 1
            self._changed.notify_all()

    def come(self) -> None:
        """Wait until no thread is in C++ any more."""
        with self._changed:
            self._has_come = True
            self._changed.wait_for(lambda: self._num_waiting == 0, 10 * _SLICE.total_seconds())

    def forget(self) -> None:
        """Begin anew, as in a forked child, which has none of its parent's threads."""
        self._changed = threading.Condition()
        self._num_waiting = 0
        self._has_come = False


_exit = _Exit()
atexit.register(_exit.come)
os.register_at_fork(after_in_child=_exit.forget)


def wait_done(work: Any) -> None:
    """Wait for a collective of gloo.

    Raises:
        RuntimeError: it failed; another process is gone, or the group's timeout is over.
    """
    while True:
        try:
            with _exit:
                work.wait(_SLICE)
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # says whether it failed, or ended only just now
                return
