"""Asyncio: ends of passes travel to a loop over an `eventfd`, many at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from asyncio import get_running_loop
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from .base import Waiter


class AsyncioLoop:
    """One asyncio event loop; see `Loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Refers to the loop but weakly: the table of all of these would else keep it for ever.
        self._loop = weakref.ref(loop)
        self._mailbox = _Mailbox(loop)
        weakref.finalize(loop, self._mailbox.close)

    def completion(self, on_cancel: Callable[[], object]) -> _Completion:
        return _Completion(self._mailbox, on_cancel)

    def callback(self, function: Callable[[], object]) -> _Callback:
        return _Callback(self._mailbox, function)

    def waiter(self) -> Waiter:
        return get_running_loop().create_future()

    def call_soon(self, function: Callable[[], object]) -> None:
        get_running_loop().call_soon(function)

    def call_later(self, seconds: float, function: Callable[[], object]) -> Callable[[], object]:
        return get_running_loop().call_later(seconds, function).cancel

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], object]:
        loop = get_running_loop()
        return partial(_call_from_any_thread, loop, loop.create_task(function()).cancel)

    def is_closed(self) -> bool:
        loop = self._loop()
        return loop is None or loop.is_closed()

    def is_cancelled(self) -> bool:
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0


_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncioLoop] = weakref.WeakKeyDictionary()


def loop_of(loop: asyncio.AbstractEventLoop) -> AsyncioLoop:
    """Return the one object for `loop`; only its own thread ever asks."""
    return _loops.get(loop) or _loops.setdefault(loop, AsyncioLoop(loop))


class _Completion(asyncio.Future[None]):
    """A future whose cancellation takes effect when it is finished, not before."""

    __slots__ = ("_is_cancelled", "_mailbox", "_message", "_on_cancel")

    def __init__(self, mailbox: _Mailbox, on_cancel: Callable[[], object]) -> None:
        super().__init__(loop=get_running_loop())
        self._mailbox = mailbox
        self._on_cancel: Callable[[], object] | None = on_cancel
        self._is_cancelled = False
        self._message: Any = None

    def finish(self) -> None:
        self._mailbox.put(self)

    def cancel(self, msg: Any = None) -> bool:
        if self.done():
            return False
        self._message = msg
        if not self._is_cancelled:
            self._is_cancelled = True
            assert self._on_cancel is not None
            self._on_cancel()
        return True

    def deliver(self) -> None:
        """End the future."""
        self._on_cancel = None  # the pass it belongs to refers to this future: break the cycle
        if self._is_cancelled:
            super().cancel(msg=self._message)
        else:
            self.set_result(None)


class _Callback:
    __slots__ = ("_function", "_mailbox")

    def __init__(self, mailbox: _Mailbox, function: Callable[[], object]) -> None:
        self._mailbox = mailbox
        self._function: Callable[[], object] | None = function

    def finish(self) -> None:
        self._mailbox.put(self)

    def deliver(self) -> None:
        """Call the function."""
        function, self._function = self._function, None  # it may refer to the owner of this callback
        assert function is not None
        function()


class _Mailbox:
    """Carries finished completions and callbacks from any thread to one event loop.

    An `eventfd` costs less per wake-up than `call_soon_threadsafe`, which is used where the loop or the
    system has none. Many letters may travel on one wake-up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._letters: deque[_Completion | _Callback] = deque()
        self._is_signalled = False
        self._lock = threading.Lock()
        self._fd = _open_eventfd()
        if self._fd is not None:
            try:
                loop.add_reader(self._fd, self._on_readable)
            except NotImplementedError:
                self.close()

    def close(self) -> None:
        """Release the descriptor; the lock keeps a late signal from writing to its next owner."""
        with self._lock:
            fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def put(self, letter: _Completion | _Callback) -> None:
        """Have the loop deliver one more; from any thread."""
        self._letters.append(letter)
        if not self._is_signalled:
            self._is_signalled = True
            self._signal()

    def _signal(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.eventfd_write(self._fd, 1)
                return
        loop = self._loop()
        if loop is not None:
            _call_from_any_thread(loop, self._deliver_all)

    def _on_readable(self) -> None:
        assert self._fd is not None
        os.eventfd_read(self._fd)
        self._deliver_all()

    def _deliver_all(self) -> None:
        # Cleared first: a letter that is put during the loop below signals again.
        self._is_signalled = False
        try:
            # Only those of now: what comes to an end meanwhile follows all else that is due on the loop.
            for _ in range(len(self._letters)):
                self._letters.popleft().deliver()
        finally:
            # A KeyboardInterrupt may end the loop here; the others are delivered when it runs again.
            if self._letters and not self._is_signalled:
                self._is_signalled = True
                self._signal()


def _open_eventfd() -> int | None:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if hasattr(os, "eventfd") else None


def _call_from_any_thread(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: no task is left on it
        loop.call_soon_threadsafe(function)
