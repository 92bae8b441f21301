"""Trio: ends of passes travel to a run by `TrioToken.run_sync_soon`. Imported once trio is."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any

import outcome
import trio

from .base import Waiter


class TrioLoop:
    """One run of trio; see `Loop`."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()

    def completion(self, on_cancel: Callable[[], object]) -> _Completion:
        return _Completion(self._token, on_cancel)

    def callback(self, function: Callable[[], object]) -> _Callback:
        return _Callback(self._token, function)

    def waiter(self) -> Waiter:
        return _Waiter()

    def call_soon(self, function: Callable[[], object]) -> None:
        self._token.run_sync_soon(function)

    def call_later(self, seconds: float, function: Callable[[], object]) -> Callable[[], object]:
        scope = trio.CancelScope()

        async def call() -> None:
            with scope:
                await trio.sleep(seconds)
                function()

        trio.lowlevel.spawn_system_task(call)
        return scope.cancel

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], object]:
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await function()

        trio.lowlevel.spawn_system_task(run, context=contextvars.copy_context())
        return partial(_call_from_any_thread, self._token, scope.cancel)

    def is_closed(self) -> bool:
        try:
            self._token.run_sync_soon(int)
        except trio.RunFinishedError:
            return True
        return False

    def is_cancelled(self) -> bool:
        if not trio.lowlevel.in_trio_task():
            return True
        return trio.current_effective_deadline() == -math.inf


_loop: trio.lowlevel.RunVar[TrioLoop] = trio.lowlevel.RunVar("asyncdp_loop")


def loop_of_run() -> TrioLoop:
    """Return the one object for the run of this thread."""
    try:
        return _loop.get()
    except LookupError:
        _loop.set(TrioLoop())
        return _loop.get()


class _Completion:
    def __init__(self, token: trio.lowlevel.TrioToken, on_cancel: Callable[[], object]) -> None:
        self._token = token
        self._on_cancel: Callable[[], object] | None = on_cancel
        self._task: trio.lowlevel.Task | None = None
        self._raise_cancel: Callable[[], Any] | None = None
        self._is_finished = False

    def finish(self) -> None:
        _call_from_any_thread(self._token, self._deliver)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        if not self._is_finished:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
        self._raise_cancel = raise_cancel
        if self._on_cancel is not None:
            self._on_cancel()
        return trio.lowlevel.Abort.FAILED

    def _deliver(self) -> None:
        self._is_finished = True
        self._on_cancel = None  # the pass it belongs to refers to this completion: break the cycle
        if self._task is None:
            return
        # In no variable: a cancellation's traceback keeps this frame, and itself keeps many, alive.
        trio.lowlevel.reschedule(
            self._task,
            outcome.Value(None) if self._raise_cancel is None else outcome.capture(self._raise_cancel),
        )


class _Callback:
    def __init__(self, token: trio.lowlevel.TrioToken, function: Callable[[], object]) -> None:
        self._token = token
        self._function: Callable[[], object] | None = function

    def finish(self) -> None:
        _call_from_any_thread(self._token, self._deliver)

    def _deliver(self) -> None:
        function, self._function = self._function, None  # it may refer to the owner of this callback
        assert function is not None
        function()


class _Waiter:
    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._is_done = False

    def done(self) -> bool:
        return self._is_done

    def set_result(self, _: None) -> None:
        self._is_done = True
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        if self._is_done:
            await trio.lowlevel.checkpoint()
        else:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        self._is_done = True
        return trio.lowlevel.Abort.SUCCEEDED


def _call_from_any_thread(token: trio.lowlevel.TrioToken, function: Callable[[], object]) -> None:
    with contextlib.suppress(trio.RunFinishedError):  # nobody waits any more
        token.run_sync_soon(function)
