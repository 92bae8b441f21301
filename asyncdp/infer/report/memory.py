"""The memory of the process: what it costs to look through, and what was freed but still counts."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_freezes_itself = False  # whether somebody else in this process was seen to freeze objects


@contextlib.contextmanager
def heap_set_aside() -> Iterator[None]:
    """Have the collector of cyclic garbage pass over all objects that were there before the block.

    Else it walks through all that torch has made, again and again while records come and go: 200,000 rows of
    JSON through a model that costs nothing (the job of `scripts/bench_infer jsonl`) took 2.7 s without and
    2.2 s with this on an idle machine, 3.4 and 2.6 s beside two busy processes (medians of 7 in turns,
    2026-11-30). What becomes garbage among those objects is freed after the block. A process that has frozen
    some itself is left alone, from the first time that this is seen: it takes 43 ms to count the 460,000
    objects of torch, transformers and scikit-learn once they are frozen (process time, 2026-11-30).
    """
    global _freezes_itself
    if not _freezes_itself:
        _freezes_itself = gc.get_freeze_count() > 0
    if _freezes_itself:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
