"""The only rooms that know asyncio and trio."""

from __future__ import annotations

import asyncio
import sys


def is_running() -> bool:
    """Return whether an event loop, asyncio's or trio's, runs in this thread."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return True
    return asyncio._get_running_loop() is not None
