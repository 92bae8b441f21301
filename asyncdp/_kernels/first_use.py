"""Who builds and loads a device's compiled kernels: whoever may wait, never an event loop's thread."""

from __future__ import annotations

import asyncio
import sys
import threading

import torch

from .chain import forced, implementation, with_index

_loaded: set[torch.device] = set()
_asked: set[torch.device] = set()
_lock = threading.Lock()


def compiled(device: torch.device) -> bool:
    """Tell whether a call on this thread runs the compiled kernels of `device`.

    Until all of them are loaded, a thread that must not wait gets the reference, and another thread loads
    them in the meantime; one that may wait builds and loads what it calls.

    Raises:
        KernelsUnavailableError: `ASYNCDP_KERNELS=numba` on a CUDA device whose chain is incomplete.
    """
    if device.type != "cuda":
        return False
    device = with_index(device)
    if device not in _loaded:
        choice = forced()
        if not _may_wait(choice):
            # Looking at the machine takes milliseconds too, so here only an explicit choice is looked into.
            if not choice or implementation(device) == "numba":
                _load_soon(device)
            return False
    return implementation(device) == "numba"


def warm_up(device: torch.device) -> None:
    """Build and load every kernel of `device`, so that no later call compiles; takes seconds when not cached.

    Call it on a lane's thread, never on the loop's. Does nothing where the plain torch kernels run.
    """
    if implementation(device) == "torch":
        return
    from . import launch

    device = with_index(device)
    launch.load_all(device)
    _loaded.add(device)


def _may_wait(choice: str) -> bool:
    """Tell whether this thread may spend seconds on a first use.

    An event loop's thread may not. Nor may one of autograd's, which are none of Python's: whoever called
    the backward waits for it and may be a loop. There the choice of compiled kernels goes first.
    """
    if asyncio._get_running_loop() is not None:
        return False
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return False
    return choice == "numba" or not isinstance(threading.current_thread(), threading._DummyThread)


def _load(device: torch.device) -> None:
    try:
        warm_up(device)
    except Warning:
        # Of Numba's import. Filters belong to the process: another thread, pytest's between two tests say,
        # has put some that raise in the place of the import's own. The next call asks again.
        with _lock:
            _asked.discard(device)


def _load_soon(device: torch.device) -> None:
    """Load the kernels on a thread of their own, once per device."""
    with _lock:
        if device in _asked:
            return
        _asked.add(device)
    # No daemon: the interpreter must not end in the middle of the compiler's native code.
    threading.Thread(target=_load, args=(device,), name=f"asyncdp-kernels-{device}").start()
