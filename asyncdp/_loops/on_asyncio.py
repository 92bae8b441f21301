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


known: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncioLoop] = weakref.WeakKeyDictionary()
"""The one object of each event loop; only the loop's own thread ever asks for it."""


class _Letter:
    """What travels to an event loop once it is finished, from any thread."""

    __slots__ = ()
    _mailbox: _Mailbox

    def finish(self) -> None:
        mailbox = self._mailbox
        mailbox.letters.append(self)
        if not mailbox.is_signalled:
            mailbox.signal()

    def deliver(self) -> None:
        """Do what is due; on the loop."""
        raise NotImplementedError


class _Completion(_Letter, asyncio.Future[None]):
    """A future whose cancellation takes effect when it is finished, not before."""

    __slots__ = ("_is_cancelled", "_mailbox", "_message", "_on_cancel")

    def __init__(self, mailbox: _Mailbox, on_cancel: Callable[[], object]) -> None:
        super().__init__(loop=get_running_loop())
        self._mailbox = mailbox
        self._on_cancel: Callable[[], object] | None = on_cancel
        self._is_cancelled = False
        self._message: Any = None

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


class _Callback(_Letter):
    __slots__ = ("_function", "_mailbox")

    def __init__(self, mailbox: _Mailbox, function: Callable[[], object]) -> None:
        self._mailbox = mailbox
        self._function: Callable[[], object] | None = function

    def deliver(self) -> None:
        """Call the function."""
        function, self._function = self._function, None  # it may refer to the owner of this callback
        assert function is not None
        function()


class _Mailbox:
    """Carries finished completions and callbacks from any thread to one event loop.

    An `eventfd` costs less per wake-up than `call_soon_threadsafe`, which is used where the loop or the
    system has none. Many letters may travel on one wake-up.

    Attributes:
        letters: what the loop has to deliver.
        is_signalled: whether the loop is about to look.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self.letters: deque[_Letter] = deque()
        self.is_signalled = False
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

    def signal(self) -> None:
        """Have the loop look for letters; from any thread."""
        self.is_signalled = True
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
        self.is_signalled = False
        try:
            # Only those of now: what comes to an end meanwhile follows all else that is due on the loop.
            for _ in range(len(self.letters)):
                self.letters.popleft().deliver()
        finally:
            # A KeyboardInterrupt may end the loop here; the others are delivered when it runs again.
            if self.letters and not self.is_signalled:
                self.signal()


def _open_eventfd() -> int | None:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if hasattr(os, "eventfd") else None


def _call_from_any_thread(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: no task is left on it
        loop.call_soon_threadsafe(function)
