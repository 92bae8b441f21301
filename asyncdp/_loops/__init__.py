"""The only room that knows asyncio and trio: everything else asks the `Loop` it runs on."""

from __future__ import annotations

import sys
from asyncio import CancelledError, get_running_loop

from .base import Completion, Finishable, Loop, Waiter, wake
from .on_asyncio import AsyncioLoop, known

__all__ = [
    "Completion",
    "Finishable",
    "Loop",
    "Waiter",
    "current",
    "ends_tasks",
    "is_cancelled",
    "is_running",
    "wake",
]


def current() -> Loop:
    """Return the event loop that runs in this thread; the same object as long as it runs.

    Raises:
        RuntimeError: neither an asyncio nor a trio event loop runs in this thread.
    """
    trio = sys.modules.get("trio")
    # Asked before asyncio, which may host trio as a guest on the same thread.
    if trio is not None and (trio.lowlevel.in_trio_task() or trio.lowlevel.in_trio_run()):
        return _on_trio()
    loop = get_running_loop()
    return known.get(loop) or known.setdefault(loop, AsyncioLoop(loop))


def is_running() -> bool:
    """Return whether an event loop runs in this thread."""
    try:
        current()
    except RuntimeError:
        return False
    return True


def is_cancelled() -> bool:
    """Return whether the running task was cancelled; so was one whose coroutine is closed without a loop."""
    return not is_running() or current().is_cancelled()


def ends_tasks(error: BaseException) -> bool:
    """Return whether `error` is of the kind that event loops end a task with."""
    trio = sys.modules.get("trio")
    return isinstance(error, (CancelledError, GeneratorExit)) or (
        trio is not None and isinstance(error, trio.Cancelled)
    )


def _on_trio() -> Loop:
    from .on_trio import loop_of_run  # trio is no dependency: imported where it runs already

    return loop_of_run()
