"""The intra-op threads of CPU lanes."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable

import torch

_changing = threading.Lock()
_is_forked_child = False


def _begin_child() -> None:
    global _is_forked_child
    _is_forked_child = True
    _changing.release()


if hasattr(os, "register_at_fork"):
    # A fork waits for a change under way: the child would inherit a count meant for one thread only.
    os.register_at_fork(
        before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_begin_child
    )


def set_intra_op_threads(num_threads: int) -> None:
    """Set the calling thread's intra-op thread count and leave every other thread's as it is.

    `torch.set_num_threads` also sets the count that threads inherit when they first use torch; a
    short-lived thread restores that default.
    """
    # A thread's first use of torch sets its count to the inherited one: do that now, not after the change.
    torch.get_num_threads()
    # One at a time: two lanes would take each other's count for the default.
    with _changing:
        inherited = _inherited_num_threads()
        torch.set_num_threads(num_threads)
        if inherited != num_threads:
            _run_in_thread(lambda: torch.set_num_threads(inherited))


def end_own_team() -> None:
    """End the OpenMP team of the calling thread; its next operation makes another one.

    A thread that has made a module has such a team, idle from then on. GNU's OpenMP counts the threads of
    all teams: once they outnumber the cores, the threads of every team sleep at each wait within an
    operation instead of spinning, which slows down the lanes.
    """
    pause = _pause_call()
    # A fork leaves the team's threads behind, and the call would wait for them.
    if pause is not None and not _is_forked_child:
        pause(_PAUSE_SOFT)


_PAUSE_SOFT = 1  # `omp_pause_soft`, by the OpenMP specification


@functools.cache
def _pause_call() -> Callable[[int], int] | None:
    """Return OpenMP's function for that if torch uses GNU's, whose symbols are visible in the process."""
    try:
        symbols = ctypes.CDLL(None)
        symbols.GOMP_parallel  # noqa: B018
        pause: Callable[[int], int] = symbols.omp_pause_resource_all
    except (OSError, TypeError, AttributeError):  # on Windows a process has no symbols of its own
        return None
    # LLVM's and Intel's OpenMP have the names of GNU's too, and one that GNU's has not.
    return None if hasattr(symbols, "kmp_set_blocktime") else pause


def _inherited_num_threads() -> int:
    counts: list[int] = []
    _run_in_thread(lambda: counts.append(torch.get_num_threads()))
    return counts[0]


def _run_in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function, name="asyncdp-threads")
    thread.start()
    thread.join()
