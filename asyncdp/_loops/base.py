"""What the rest of the package needs of an event loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any, Protocol


class Finishable(Protocol):
    """Finished once, by any thread; the event loop it was made on hears of it."""

    def finish(self) -> None:
        """Let the loop know. Never blocks."""


class Completion(Finishable, Protocol):
    """Awaited by the one task that made it.

    A cancellation of that task calls `on_cancel` at once, and goes on only after `finish`: until then
    other threads may still use what the task owns.
    """

    def __await__(self) -> Generator[Any, Any, None]:
        """Wait for `finish`; raise a cancellation that came in between."""


class Waiter(Protocol):
    """Awaited by one task, once, and woken on the loop's own thread; on asyncio a future."""

    def done(self) -> bool:
        """Return whether it was woken, or its task is cancelled."""

    def set_result(self, result: None, /) -> None:
        """Wake the task; see `wake`."""

    def __await__(self) -> Generator[Any, Any, None]:
        """Wait until woken."""


class Loop(Protocol):
    """One event loop. Everything but `finish` of what it makes is called on its own thread.

    Functions handed in must not raise. Tasks and calls belong to the loop and not to the task that started
    them: a task group would turn every exception of its body into a group, and has to be left by the
    task that entered it, which fixtures and generators do not promise.
    """

    def completion(self, on_cancel: Callable[[], object]) -> Completion:
        """Make a completion for the running task; `on_cancel` is called once, if it is cancelled."""

    def callback(self, function: Callable[[], object]) -> Finishable:
        """Have `function` called on the loop, outside of any task, once the result is finished."""

    def waiter(self) -> Waiter:
        """Make a waiter."""

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function in the loop's next turn."""

    def call_later(self, seconds: float, function: Callable[[], object]) -> Callable[[], object]:
        """Call a function after some time; return what calls it off."""

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], object]:
        """Start a task that raises nothing but its own cancellation.

        Returns:
            What cancels the task, callable from any thread. Keep it: it keeps the task alive.
        """

    def is_closed(self) -> bool:
        """Return whether the loop has ended for good, and its tasks with it; from any thread."""

    def is_cancelled(self) -> bool:
        """Return whether the running task was cancelled, or there is none."""


def wake(waiter: Waiter) -> None:
    """End the wait; more than once does no harm."""
    if not waiter.done():
        waiter.set_result(None)
