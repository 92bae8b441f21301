"""Tasks and calls that belong to the event loop and not to whoever started them.

A task group would turn every exception of its body into a group, and has to be left by the task that
entered it; fixtures and generators do not promise that.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any


def spawn(function: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], object]:
    """Start a task on the event loop that runs in this thread.

    Args:
        function: the task; raises nothing but its own cancellation.

    Returns:
        What cancels the task, callable from any thread. Keep it: it keeps the task alive.
    """
    trio = sys.modules.get("trio")
    if trio is None or not trio.lowlevel.in_trio_run():
        loop = asyncio.get_running_loop()
        return partial(_soon_on_asyncio, loop, loop.create_task(function()).cancel)
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            await function()

    trio.lowlevel.spawn_system_task(run, context=contextvars.copy_context())
    return partial(_soon_on_trio, trio.lowlevel.current_trio_token(), scope.cancel)


def call_soon_of_loop() -> Callable[[Callable[[], object]], object]:
    """What has the event loop of this thread call a function in its next turn; that must not raise."""
    trio = sys.modules.get("trio")
    if trio is None or not trio.lowlevel.in_trio_run():
        return asyncio.get_running_loop().call_soon
    return trio.lowlevel.current_trio_token().run_sync_soon  # type: ignore[no-any-return]


def call_later(seconds: float, function: Callable[[], object]) -> Callable[[], object]:
    """Have the event loop of this thread call a function after some time; returns what calls it off."""
    trio = sys.modules.get("trio")
    if trio is None or not trio.lowlevel.in_trio_run():
        return asyncio.get_running_loop().call_later(seconds, function).cancel
    scope = trio.CancelScope()

    async def call() -> None:
        with scope:
            await trio.sleep(seconds)
            function()

    trio.lowlevel.spawn_system_task(call)
    return scope.cancel  # type: ignore[no-any-return]


def is_cancelled() -> bool:
    """Whether the task that runs in this thread was cancelled; also if none does, for a coroutine closed."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return bool(trio.current_effective_deadline() == -math.inf)
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return True
    return task is None or task.cancelling() > 0


def ends_tasks(error: BaseException) -> bool:
    """Whether `error` is of the kind that event loops end a task with."""
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return True
    trio = sys.modules.get("trio")
    return trio is not None and isinstance(error, trio.Cancelled)


def _soon_on_asyncio(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    # A loop that is closed has no task left to cancel.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


def _soon_on_trio(token: Any, function: Callable[[], object]) -> None:
    with contextlib.suppress(sys.modules["trio"].RunFinishedError):
        token.run_sync_soon(function)
