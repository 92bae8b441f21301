"""Which threads build and load a device's compiled kernels: those that may wait, never an event loop's."""

from __future__ import annotations

import threading

import torch

from .._loops import is_running
from .chain import forced, implementation, with_index

_loaded: set[torch.device] = set()
_loading: set[torch.device] = set()
_lock = threading.Lock()


def compiled(device: torch.device) -> bool:
    """Return whether a call on this thread runs the compiled kernels of a CUDA device.

    Until all of them are loaded, a thread that must not wait runs plain torch, while another thread loads
    them; a thread that may wait builds and loads what it calls.

    Raises:
        KernelsUnavailableError: `ASYNCDP_KERNELS=numba` and part of the chain is missing.
    """
    device = with_index(device)
    if device not in _loaded:
        choice = forced()
        if not _may_wait(choice):
            # Examining the machine takes milliseconds, so on this thread only an explicit choice is checked.
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
    """Return whether this thread may spend seconds on a first use.

    An event loop's thread may not. Nor may a thread of autograd, which is not one of Python's: the caller of
    the backward waits for it and may be a loop. There `ASYNCDP_KERNELS=numba` takes precedence.
    """
    if is_running():
        return False
    return choice == "numba" or not isinstance(threading.current_thread(), threading._DummyThread)


def _load(device: torch.device) -> None:
    try:
        warm_up(device)
    except Warning:
        # Numba's import warns. Warning filters belong to the process, so another thread may have replaced
        # those of the import by ones that raise, as pytest does between tests. The next call tries again.
        with _lock:
            _loading.discard(device)


def _load_soon(device: torch.device) -> None:
    """Load the kernels on a thread of their own, once per device."""
    with _lock:
        if device in _loading:
            return
        _loading.add(device)
    # Not a daemon: the interpreter must not end in the middle of the compiler's native code.
    threading.Thread(target=_load, args=(device,), name=f"asyncdp-kernels-{device}").start()
