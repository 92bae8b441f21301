"""The order of all that reads or changes modules: passes of event loops, and their tasks on lanes.

Steps of one module run one after the other, whichever engine and event loop they come from, and nothing
reads weights while an optimizer changes them. The same holds for modules that share what a step trains.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from .. import _loops
from .snapshot import ModuleSnapshot


class Use:
    """What a pass or a task reads and changes, from its arrival to its end.

    Args:
        snapshot: the module whose tensors are read.
        changes: whether parameters that require gradients, and buffers, are changed.
        optimizer: is read too, and changed if they are.

    Attributes:
        is_waiting: whether its turn has yet to come.
        wake: called when its turn comes, if it has to wait.
        loop: the event loop it needs; without one, it has a lane's thread.
    """

    __slots__ = ("_changed", "_read", "changes", "is_waiting", "loop", "optimizer", "snapshot", "wake")

    def __init__(
        self,
        snapshot: ModuleSnapshot,
        *,
        changes: bool = False,
        optimizer: object = None,
        loop: _loops.Loop | None = None,
    ) -> None:
        self.snapshot = snapshot
        self.changes = changes
        self.optimizer = optimizer
        self.loop = loop
        self.is_waiting = True
        self.wake: Callable[[], object] | None = None
        self._read: frozenset[int] | None = None
        self._changed: frozenset[int] = frozenset()

    def conflicts_with(self, other: Use) -> bool:
        """Return whether one of the two changes what the other reads."""
        if not self.changes and not other.changes:
            return False
        if self.snapshot.has_same_root(other.snapshot):
            return True
        if self.optimizer is not None and self.optimizer is other.optimizer:
            return True
        mine, others = self._tensors(), other._tensors()
        return not (self._changed.isdisjoint(others) and other._changed.isdisjoint(mine))

    def _tensors(self) -> frozenset[int]:
        """Return the `id` of every tensor that is read; found out only when two modules meet."""
        if self._read is None:
            self._read = frozenset(map(id, self.snapshot.tensors))
            if self.changes:
                self._changed = frozenset(map(id, [*self.snapshot.trainable(), *self.snapshot.buffers]))
        return self._read


class Order:
    """Uses in order of arrival: the turn of each comes once no earlier one conflicts with it.

    For any number of threads and event loops. Nobody waits in here.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget all uses, and who holds the lock."""
        # Reentrant: a garbage collection in here may end a coroutine, which leaves.
        self._lock = threading.RLock()
        self._uses: list[Use] = []
        self._num_changing = 0

    @property
    def changes_anything(self) -> bool:
        """Whether some use changes something, or waits to."""
        return self._num_changing > 0

    def arrive(self, use: Use) -> bool:
        """Take the next place; return whether the turn has come already. Call `leave` in any case."""
        with self._lock:
            self._uses.append(use)
            self._num_changing += use.changes
            if self._num_changing == 0 or len(self._uses) == 1:
                use.is_waiting = False
                return True
            begun = self._begin_next()
        for wake in begun:
            wake()
        return not use.is_waiting

    def wake_by(self, use: Use, wake: Callable[[], object]) -> bool:
        """Have `wake` called when the turn of a use comes; return False if it has come."""
        with self._lock:
            if use.is_waiting:
                use.wake = wake
            return use.is_waiting

    def leave(self, use: Use) -> None:
        """End a use, or give up its place. A second time does nothing."""
        with self._lock:
            may_wait = self._num_changing > 0
            self._remove(use)
            begun = self._begin_next() if may_wait and self._uses else ()
        for wake in begun:
            wake()

    def give_up(self, use: Use) -> None:
        """Give up the place of a use, and end its wait, unless its turn has come."""
        with self._lock:
            wake = use.wake if use.is_waiting else None
            use.is_waiting = False
        if wake is not None:
            self.leave(use)
            wake()

    def _remove(self, use: Use) -> None:
        if use in self._uses:
            self._uses.remove(use)
            self._num_changing -= use.changes

    def _begin_next(self) -> list[Callable[[], object]]:
        """Begin what no longer has to wait; return what wakes it."""
        begun: list[Callable[[], object]] = []
        earlier: list[Use] = []
        for use in [*self._uses]:
            is_blocked = use.is_waiting and any(map(use.conflicts_with, earlier))
            if not is_blocked and use.loop is not None and use.loop.is_closed():
                self._remove(use)  # its task will never go on
                continue
            earlier.append(use)
            if use.is_waiting and not is_blocked:
                use.is_waiting = False
                if use.wake is not None:
                    begun.append(use.wake)
                    use.wake = None  # it refers to a task
        return begun


passes = Order()
"""Training steps, and calls that are split over lanes."""

tasks = Order()
"""On lanes: commits of steps, copies of whole modules, and forwards that met one of these."""


def _forget_parent() -> None:
    """Begin anew in a forked child: its parent's passes and lanes never end here."""
    passes.forget()
    tasks.forget()


os.register_at_fork(after_in_child=_forget_parent)


async def wait_turn(use: Use) -> None:
    """Wait for the turn of a pass that has arrived; a cancellation gives up its place."""
    use.loop = _loops.current()
    completion = use.loop.completion(lambda: passes.give_up(use))
    if passes.wake_by(use, completion.finish):
        await completion
