"""Memory that was freed but still counts for the process."""

from __future__ import annotations

import ctypes
import sys


def release_memory() -> None:
    """Return unused pages inside the heap to the system, where the C library can do that.

    Batches of changing shapes leave holes that the next ones do not quite fill.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
