"""Tasks that belong to the event loop and not to whoever started them.

A task group would turn every exception of its body into a group, and has to be left by the task that
entered it; fixtures and generators do not promise that.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable, Coroutine
from typing import Any


def spawn(function: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], object]:
    """Start a task on the event loop that runs in this thread.

    Args:
        function: the task; raises nothing but its own cancellation.

    Returns:
        What cancels the task. Keep it: it keeps the task alive.
    """
    trio = sys.modules.get("trio")
    if trio is None or not trio.lowlevel.in_trio_run():
        return asyncio.get_running_loop().create_task(function()).cancel
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            await function()

    trio.lowlevel.spawn_system_task(run, context=contextvars.copy_context())
    return scope.cancel  # type: ignore[no-any-return]
