"""How the end of a pass gets to the event loop, on asyncio and on trio.

A pass ends on some lane's thread; its completion wakes the task that awaits it. When that task is
cancelled, the completion asks the pass to drop what has not started and lets the cancellation go on
only after everything that runs has drained. A callback is for those who have no task that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import sys
import threading
import time
import weakref
from asyncio import get_running_loop
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Protocol

from .._runtime.wakeup import Look

LOOK_SECONDS = 400e-6
"""How long an event loop looks for the end of a short pass at most: no longer than a callback may take."""

_NUM_SKIPPED = 4  # looks that are left out after one in vain


class Callback(Protocol):
    """Finished once by any thread, heard of on the event loop it was made on."""

    def expect(self) -> None:
        """It is likely to be finished in a moment: the loop may wait for that awake; called on the loop."""

    def finish(self) -> None:
        """Let the loop know. Callable from any thread; never blocks."""


class Completion(Callback, Protocol):
    """A callback that wakes the one task which awaits it."""

    def __await__(self) -> Generator[Any, Any, None]:
        """Wait for `finish`; raise a cancellation that came in between."""


def new_completion(on_cancel: Callable[[], None]) -> Completion:
    """Make a completion for the running task.

    Args:
        on_cancel: called on the loop's thread, once, when the waiting task is cancelled.

    Raises:
        RuntimeError: neither an asyncio nor a trio event loop runs in this thread.
    """
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return _TrioCompletion(on_cancel)
    return _AsyncioCompletion(on_cancel)


def new_callback(function: Callable[[], object]) -> Callback:
    """Have `function` called by the event loop that runs in this thread; it must not raise.

    Raises:
        RuntimeError: neither an asyncio nor a trio event loop runs in this thread.
    """
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return _TrioCallback(trio, function)
    return _AsyncioCallback(function)


def look_of_loop() -> Callable[[], object]:
    """What has the event loop of this thread look for the callbacks it expects, and call them.

    To be called on the loop, outside of any task, after callbacks were made that are expected; for
    completions it happens by itself. On trio it does nothing: that cannot be spared its sleep.
    """
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return bool
    return _waker_of(get_running_loop()).look


# --- asyncio ---------------------------------------------------------------------------------


class _AsyncioCompletion(asyncio.Future[None]):
    """A future whose cancellation takes effect when it is finished, not before.

    The task that awaits it goes on at once when it is settled: a future's own way, by the loop's next
    turn, costs that turn, which is a good part of a short call.
    """

    __slots__ = ("_cancelling", "_go_on", "_message", "_on_cancel", "_waker")

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        loop = get_running_loop()
        super().__init__(loop=loop)
        self._on_cancel: Callable[[], None] | None = on_cancel
        self._waker = _waker_of(loop)
        self._go_on: tuple[contextvars.Context, Callable[[Any], object]] | None = None
        self._cancelling = False
        self._message: Any = None

    def expect(self) -> None:
        if self._waker.expect():
            self.get_loop().call_soon(self._waker.look)  # after all that is due by then

    def finish(self) -> None:
        self._waker.put(self)

    def cancel(self, msg: Any = None) -> bool:
        if self.done():
            return False
        self._message = msg
        if not self._cancelling:
            self._cancelling = True
            assert self._on_cancel is not None
            self._on_cancel()
        return True

    def add_done_callback(
        self, fn: Callable[[Any], object], /, *, context: contextvars.Context | None = None
    ) -> None:
        """Keep the first, by which a task waits, for `settle` to call."""
        if self._go_on is None and context is not None and not self.done():
            self._go_on = context, fn
        else:
            super().add_done_callback(fn, context=context)

    def settle(self) -> None:
        """End the future, and let the task that awaits it go on; called on the loop, outside of any task."""
        self._on_cancel = None  # the pass it belongs to refers to this future: break the cycle
        if self._cancelling:
            super().cancel(msg=self._message)
        else:
            self.set_result(None)
        if self._go_on is not None:
            (context, fn), self._go_on = self._go_on, None
            context.run(fn, self)


class _AsyncioCallback:
    __slots__ = ("_function", "_waker")

    def __init__(self, function: Callable[[], object]) -> None:
        self._waker = _waker_of(get_running_loop())
        self._function: Callable[[], object] | None = function

    def expect(self) -> None:
        self._waker.expect()

    def finish(self) -> None:
        self._waker.put(self)

    def settle(self) -> None:
        """Call the function; called on the loop, outside of any task."""
        function, self._function = self._function, None  # the function may refer to whoever holds this
        assert function is not None
        function()


class _LoopWaker:
    """Carries completions and callbacks to settle from any thread to one event loop.

    An eventfd costs less per wake-up than `call_soon_threadsafe`, which is used where the loop or
    the system has none. Many may travel on one wake-up.

    A loop that looks for them is spared its sleep: on a virtual machine, to be woken from it takes
    longer than all the code of a call.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self.outbox: deque[_AsyncioCompletion | _AsyncioCallback] = deque()
        self.is_signalled = False
        self._lock = threading.Lock()
        self._look = Look(LOOK_SECONDS)
        self._is_look_due = False
        self._is_looking = False
        self._num_to_skip = 0
        self._fd = _open_eventfd()
        if self._fd is not None:
            try:
                loop.add_reader(self._fd, self._drain)
            except NotImplementedError:
                self.close()

    def close(self) -> None:
        """Release the descriptor; the lock keeps a late `signal` from writing to its next owner."""
        with self._lock:
            fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def put(self, ended: _AsyncioCompletion | _AsyncioCallback) -> None:
        """Have the loop settle one more; from any thread."""
        self.outbox.append(ended)
        if not self.is_signalled:
            self.is_signalled = True
            # Asked after the append; the loop stops looking before it empties the outbox.
            if self._is_looking:
                self._look.give()
            else:
                self.signal()

    def expect(self) -> bool:
        """Let the next `look` be one; tell whether it is now, and was not before."""
        if self._num_to_skip:
            self._num_to_skip -= 1
            return False
        was_due, self._is_look_due = self._is_look_due, True
        return not was_due

    def look(self) -> None:
        """Wait awake for something to settle, if it is expected, and settle it; on the loop, in no task."""
        if not self._is_look_due:
            return
        self._is_look_due = False
        try:
            if not self.outbox and self._look.is_worth_it(time.perf_counter()):
                self._is_looking = True
                self._look.take()
        finally:
            self._is_looking = False
            self._look.clear()
            if self.outbox:
                self._settle_all()
            else:
                self._num_to_skip = _NUM_SKIPPED

    def signal(self) -> None:
        """Have the loop settle what is in the outbox; `is_signalled` tells that it is going to."""
        with self._lock:
            if self._fd is not None:
                os.eventfd_write(self._fd, 1)
                return
        loop = self._loop()
        if loop is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed in between: nobody waits any more
                loop.call_soon_threadsafe(self._settle_all)

    def _drain(self) -> None:
        assert self._fd is not None
        os.eventfd_read(self._fd)
        self._settle_all()

    def _settle_all(self) -> None:
        # Cleared first: a completion appended during the loop below signals again.
        self.is_signalled = False
        # Nor may a look that nobody came to take, for what has ended by now, keep later ones from being due.
        self._is_look_due = False
        try:
            # Only those of now: what tasks that go on here bring to an end comes after all else that is
            # due on the loop, such as cancellations.
            for _ in range(len(self.outbox)):
                self.outbox.popleft().settle()
        finally:
            # A task may end the loop by a KeyboardInterrupt; the others go on when it runs again.
            if self.outbox and not self.is_signalled:
                self.is_signalled = True
                self.signal()


def _open_eventfd() -> int | None:
    if not hasattr(os, "eventfd"):
        return None
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


_wakers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWaker] = weakref.WeakKeyDictionary()


class _Latest(threading.local):
    """The loop this thread asked about last, which is nearly always the one it asks about next."""

    loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
    waker: _LoopWaker


_latest = _Latest()


def _waker_of(loop: asyncio.AbstractEventLoop) -> _LoopWaker:
    latest = _latest.loop
    if latest is not None and latest() is loop:
        return _latest.waker
    _latest.waker = waker = _find_waker(loop)
    _latest.loop = weakref.ref(loop)
    return waker


def _find_waker(loop: asyncio.AbstractEventLoop) -> _LoopWaker:
    waker = _wakers.get(loop)
    if waker is None:
        waker = _LoopWaker(loop)
        _wakers[loop] = waker  # only this loop's own thread ever asks for it
        weakref.finalize(loop, waker.close)
    return waker


# --- trio ------------------------------------------------------------------------------------


class _TrioCompletion:
    def __init__(self, on_cancel: Callable[[], None]) -> None:
        import trio

        self._trio = trio
        self._token = trio.lowlevel.current_trio_token()
        self._on_cancel: Callable[[], None] | None = on_cancel
        self._task: Any = None
        self._raise_cancel: Callable[[], None] | None = None
        self._finished = False

    def expect(self) -> None:
        pass

    def finish(self) -> None:
        with contextlib.suppress(self._trio.RunFinishedError):  # nobody waits any more
            self._token.run_sync_soon(self._settle)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        if not self._finished:
            self._task = self._trio.lowlevel.current_task()
            await self._trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, raise_cancel: Callable[[], None]) -> Any:
        self._raise_cancel = raise_cancel
        if self._on_cancel is not None:
            self._on_cancel()
        return self._trio.lowlevel.Abort.FAILED

    def _settle(self) -> None:
        self._finished = True
        self._on_cancel = None  # the pass it belongs to refers to this completion: break the cycle
        if self._task is None:
            return
        import outcome

        # In no variable: a cancellation's traceback keeps this frame, and itself keeps many, alive.
        self._trio.lowlevel.reschedule(
            self._task,
            outcome.Value(None) if self._raise_cancel is None else outcome.capture(self._raise_cancel),
        )


class _TrioCallback:
    def __init__(self, trio: Any, function: Callable[[], object]) -> None:
        self._trio = trio
        self._token = trio.lowlevel.current_trio_token()
        self._function: Callable[[], object] | None = function

    def expect(self) -> None:
        pass

    def finish(self) -> None:
        with contextlib.suppress(self._trio.RunFinishedError):  # nobody is there any more
            self._token.run_sync_soon(self._settle)

    def _settle(self) -> None:
        function, self._function = self._function, None  # the function may refer to whoever holds this
        assert function is not None
        function()
