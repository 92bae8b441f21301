"""A task waits, another wakes it: the cheapest such thing on asyncio and on trio.

Unlike the completions of the runtime this never leaves the event loop's thread.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Protocol


class Waiter(Protocol):
    """Awaited by one task, once; on asyncio a future, of which this is a part."""

    def done(self) -> bool:
        """Whether it was woken, or its task is cancelled."""

    def set_result(self, result: None, /) -> None:
        """Wake the task; see `wake`."""

    def __await__(self) -> Generator[Any, Any, None]:
        """Wait until woken."""


def new_waiter() -> Waiter:
    """Make a waiter for the event loop that runs in this thread.

    Raises:
        RuntimeError: neither an asyncio nor a trio event loop runs in this thread.
    """
    return waiters_of_loop()()


def waiters_of_loop() -> Callable[[], Waiter]:
    """What makes waiters for the event loop that runs in this thread now, without another look for it."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return partial(_TrioWaiter, trio)
    return asyncio.get_running_loop().create_future


def wake(waiter: Waiter) -> None:
    """End the wait; more than once does no harm."""
    if not waiter.done():
        waiter.set_result(None)


def current_loop() -> object:
    """The event loop of this thread, to compare by identity.

    Raises:
        RuntimeError: there is none.
    """
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return trio.lowlevel.current_trio_token()
    return asyncio.get_running_loop()


class _TrioWaiter:
    __slots__ = ("_is_done", "_task", "_trio")

    def __init__(self, trio: Any) -> None:
        self._trio = trio
        self._task: Any = None
        self._is_done = False

    def done(self) -> bool:
        return self._is_done

    def set_result(self, _: None) -> None:
        self._is_done = True
        task, self._task = self._task, None
        if task is not None:
            self._trio.lowlevel.reschedule(task)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        if self._is_done:
            await self._trio.lowlevel.checkpoint()
        else:
            self._task = self._trio.lowlevel.current_task()
            await self._trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> Any:
        self._task = None
        self._is_done = True
        return self._trio.lowlevel.Abort.SUCCEEDED
