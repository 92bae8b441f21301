"""The memory of the process, and what of it was freed but still counts."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path


def release_memory() -> None:
    """Return unused pages inside the heap to the system, where the C library can do that.

    Batches of changing shapes leave holes that the next ones do not quite fill.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def resident_memory() -> int | None:
    """Return the bytes of memory that this process holds, None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
