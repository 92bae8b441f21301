"""The intra-op threads of CPU lanes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

_changing = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A change under way ends first: the child would inherit a count that was meant for one thread.
    os.register_at_fork(
        before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_changing.release
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


def _inherited_num_threads() -> int:
    counts: list[int] = []
    _run_in_thread(lambda: counts.append(torch.get_num_threads()))
    return counts[0]


def _run_in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function, name="asyncdp-threads")
    thread.start()
    thread.join()
