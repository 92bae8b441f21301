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
    # A change under way ends first: the child would inherit a count that was meant for one thread.
    os.register_at_fork(
        before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_begin_child
    )


def set_intra_op_threads(num_threads: int) -> None:
    """Set the calling thread's intra-op thread count and leave every other thread's as it is.

    `torch.set_num_threads` also sets the count that threads inherit when they first use torch; a
    short-lived thread puts that default back.
    """
    # A thread's first use of torch sets its count to the inherited one: have that behind us.
    torch.get_num_threads()
    # One at a time: two lanes would take each other's count for the default.
    with _changing:
        inherited = _inherited_num_threads()
        torch.set_num_threads(num_threads)
        if inherited != num_threads:
            _run_in_thread(lambda: torch.set_num_threads(inherited))


def end_own_team() -> None:
    """End the OpenMP threads that wait to help the calling thread with its next operation.

    A thread that has made a module has such a team, idle from then on, and gets another when it needs
    one. GNU's OpenMP counts the threads of all teams: once they outnumber the cores, every team sleeps
    at each of its waits, of which an operation has several. A lane with all cores then takes a third longer.
    """
    pause = _pause_call()
    if pause is not None and not _is_forked_child:  # its team was left behind, and would be waited for
        pause(_PAUSE_SOFT)


_PAUSE_SOFT = 1  # `omp_pause_soft`, by the OpenMP specification


@functools.cache
def _pause_call() -> Callable[[int], int] | None:
    """OpenMP's own, if torch uses GNU's: torch makes its symbols those of the process."""
    try:
        symbols = ctypes.CDLL(None)
        symbols.GOMP_parallel  # noqa: B018  LLVM's and Intel's have it too,
        pause: Callable[[int], int] = symbols.omp_pause_resource_all
    except (OSError, TypeError, AttributeError):  # Windows has no such thing as all symbols
        return None
    return None if hasattr(symbols, "kmp_set_blocktime") else pause  # but not without this


def _inherited_num_threads() -> int:
    counts: list[int] = []
    _run_in_thread(lambda: counts.append(torch.get_num_threads()))
    return counts[0]


def _run_in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function, name="asyncdp-threads")
    thread.start()
    thread.join()
