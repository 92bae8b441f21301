"""A task waits, another wakes it: the cheapest such thing on asyncio and on trio.

Unlike the completions of the runtime this never leaves the event loop's thread.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import Any, Protocol


class Waiter(Protocol):
    """Waited for once by one task, woken by another of the same event loop."""

    woken: bool

    def wake(self) -> None:
        """End the wait; more than once does no harm."""

    def wait(self, timeout: float | None = None) -> Awaitable[bool]:
        """To await for `wake`, at most `timeout` seconds; tells whether it came."""


def new_waiter() -> Waiter:
    """Make a waiter for the event loop that runs in this thread.

    Raises:
        RuntimeError: neither an asyncio nor a trio event loop runs in this thread.
    """
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return _TrioWaiter(trio)
    return _AsyncioWaiter()


def current_loop() -> object:
    """The event loop of this thread, to compare by identity.

    Raises:
        RuntimeError: there is none.
    """
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return trio.lowlevel.current_trio_token()
    return asyncio.get_running_loop()


class _AsyncioWaiter:
    __slots__ = ("_future", "woken")

    def __init__(self) -> None:
        self._future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.woken = False

    def wake(self) -> None:
        self.woken = True
        self._end()

    def wait(self, timeout: float | None = None) -> Awaitable[bool]:
        return self._future if timeout is None else self._wait_at_most(timeout)

    async def _wait_at_most(self, timeout: float) -> bool:
        timer = self._future.get_loop().call_later(timeout, self._end)
        try:
            await self._future
        finally:
            timer.cancel()
        return self.woken

    def _end(self) -> None:
        if not self._future.done():
            self._future.set_result(self.woken)


class _TrioWaiter:
    __slots__ = ("_task", "_trio", "woken")

    def __init__(self, trio: Any) -> None:
        self._trio = trio
        self._task: Any = None
        self.woken = False

    def wake(self) -> None:
        self.woken = True
        task, self._task = self._task, None
        if task is not None:
            self._trio.lowlevel.reschedule(task)

    async def wait(self, timeout: float | None = None) -> bool:
        if self.woken:
            await self._trio.lowlevel.checkpoint()
        elif timeout is None:
            await self._park()
        else:
            with self._trio.move_on_after(timeout):
                await self._park()
        return self.woken

    async def _park(self) -> None:
        self._task = self._trio.lowlevel.current_task()
        await self._trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> Any:
        self._task = None
        return self._trio.lowlevel.Abort.SUCCEEDED
