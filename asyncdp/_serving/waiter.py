"""A task waits, another wakes it: the cheapest such thing on asyncio and on trio.

Unlike the completions of the runtime this never leaves the event loop's thread.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Protocol


class Waiter(Protocol):
    """Waited for once by one task, woken by another of the same event loop."""

    woken: bool

    def wake(self) -> None:
        """End the wait; more than once does no harm."""

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait for `wake`, at most `timeout` seconds; tell whether it came."""


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
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.woken = False

    def wake(self) -> None:
        self.woken = True
        self._end()

    async def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            await self._future
            return True
        timer = self._future.get_loop().call_later(timeout, self._end)
        try:
            await self._future
        finally:
            timer.cancel()
        return self.woken

    def _end(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


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
