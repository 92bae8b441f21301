"""The command line: parse, run, report."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys

_PACKAGES = ("typer", "rich", "pyarrow", "safetensors", "filelock")
_M_ARENA_MAX = -8  # of malloc.h


def _keep_memory_flat() -> None:
    """Let all threads share one heap: freed memory of one is then used by the next.

    With a heap per thread, or one of Arrow's own, memory keeps growing. oneDNN's cache holds a kernel for
    every shape of batch, and making them anew each time costs nothing that can be measured.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)


def main() -> None:
    """Run the command line, or say what to install when its packages are missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"The command line needs {', '.join(missing)}. Install it: pip install 'asyncdp[cli]'")
    _keep_memory_flat()
    from .app import app

    # Until a job handles signals itself, SIGTERM ends the command as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(prog_name="asyncdp")
