"""The order of all that reads or changes modules: passes of event loops, and their tasks on lanes.

Steps of one module run one after the other, whichever engine and event loop they come from, and nothing
reads weights while an optimizer changes them. The same holds for modules that share what a step trains.
A lane reads a module within the block of its `Reader`, and changes or copies one within `in_turn`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter

import torch
from torch import nn

from .. import _loops
from .snapshot import LatestSnapshot, ModuleSnapshot

_device = attrgetter("device")


class Use:
    """What a pass or a task reads and changes, from its arrival to its end.

    Args:
        snapshot: the module whose tensors are read.
        changes: whether parameters that require gradients, and buffers, are changed.
        changes_frozen: whether all other parameters are changed too.
        optimizer: is read too, and changed if they are.

    Attributes:
        is_waiting: whether its turn has yet to come.
        wake: called when its turn comes, if it has to wait.
        loop: the event loop it needs; without one, it has a lane's thread.
        lane: what it runs on alone, and in order of arrival; None if that is not so.
    """

    __slots__ = (
        "_changed",
        "_read",
        "changes",
        "changes_frozen",
        "is_waiting",
        "lane",
        "loop",
        "optimizer",
        "snapshot",
        "wake",
    )

    def __init__(
        self,
        snapshot: ModuleSnapshot,
        *,
        changes: bool = False,
        changes_frozen: bool = False,
        optimizer: object = None,
        loop: _loops.Loop | None = None,
        lane: object = None,
    ) -> None:
        self.snapshot = snapshot
        self.changes = changes
        self.changes_frozen = changes_frozen
        self.optimizer = optimizer
        self.loop = loop
        self.lane = lane
        self.is_waiting = True
        self.wake: Callable[[], object] | None = None
        self._read: frozenset[int] | None = None
        self._changed: frozenset[int] = frozenset()

    def conflicts_with(self, other: Use) -> bool:
        """Return whether one of the two changes what the other reads."""
        if not self.changes and not other.changes:
            return False
        if self.lane is not None and self.lane is other.lane:
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
            if self.changes_frozen:
                self._changed = self._read
            elif self.changes:
                self._changed = frozenset(map(id, [*self.snapshot.trainable(), *self.snapshot.buffers]))
        return self._read


class Order:
    """Uses in order of arrival: the turn of each comes once no earlier one conflicts with it.

    For any number of threads and event loops. Nobody waits in here.

    Attributes:
        num_changing: how many uses change something, or wait to.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget all uses, and who holds the lock."""
        # Reentrant: a garbage collection in here may end a coroutine, which leaves.
        self._lock = threading.RLock()
        self._uses: list[Use] = []
        self.num_changing = 0

    def arrive(self, use: Use) -> bool:
        """Take the next place; return whether the turn has come already. Call `leave` in any case."""
        with self._lock:
            self._uses.append(use)
            self.num_changing += use.changes
            if self.num_changing == 0 or len(self._uses) == 1:
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
            if use not in self._uses:
                return
            may_wait = self.num_changing > 0
            self._uses.remove(use)
            self.num_changing -= use.changes
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

    def _begin_next(self) -> list[Callable[[], object]]:
        """Begin what no longer has to wait; return what wakes it."""
        begun: list[Callable[[], object]] = []
        earlier: list[Use] = []
        for use in [*self._uses]:
            is_blocked = use.is_waiting and any(map(use.conflicts_with, earlier))
            if not is_blocked and use.loop is not None and use.loop.is_closed():
                self._uses.remove(use)  # its task will never go on
                self.num_changing -= use.changes
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


async def wait_turn(use: Use) -> None:
    """Wait for the turn of a pass that has arrived; a cancellation gives up its place."""
    use.loop = _loops.current()
    completion = use.loop.completion(lambda: passes.give_up(use))
    if passes.wake_by(use, completion.finish):
        await completion


class Reader:
    """One lane's right to read a module, as a block around each forward.

    While the block runs, nothing changes the module. A task that is to change it waits for forwards that
    run, never for ones that are queued, so that no two lanes wait for each other.

    Args:
        module: what the lane reads; referred to weakly.
        snapshots: answer what it consists of.
        device: the lane's.
    """

    def __init__(self, module: nn.Module, snapshots: LatestSnapshot, device: torch.device) -> None:
        self._module = weakref.ref(module)
        self._snapshots = snapshots
        self._device = device
        self._lock = threading.Lock()  # held within the block
        self._place: Use | None = None
        self._was_read: torch.cuda.Event | None = None
        self._was_changed: Sequence[torch.cuda.Event] = ()
        with _readers_lock:
            _readers.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        if tasks.num_changing:
            self._lock.release()  # what changes the module waits for this lock
            self._place = self._use()
            _wait_turn(self._place)
            self._lock.acquire()
        for event in self._was_changed:
            torch.cuda.current_stream(self._device).wait_event(event)
        self._was_changed = ()

    def __exit__(self, *exc_info: object) -> None:
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # the device is lost: the task has that error already
                self._was_read = torch.cuda.current_stream(self._device).record_event()
        place, self._place = self._place, None
        self._lock.release()
        if place is not None:
            tasks.leave(place)

    def wait_read(self, use: Use) -> bool:
        """Wait for a forward that runs, if `use` changes what it reads; return whether that is so."""
        try:
            is_concerned = self._use().conflicts_with(use)
        except Exception:  # the module is no longer what can be run, or changes right now
            is_concerned = True
        if is_concerned:
            self._lock.acquire()
            self._lock.release()
        return is_concerned

    def follow(self, streams: Sequence[torch.cuda.Stream]) -> None:
        """Let streams wait for what the lane's own was to read."""
        if self._was_read is not None:
            for stream in streams:
                stream.wait_event(self._was_read)

    def precede(self, events: Sequence[torch.cuda.Event]) -> None:
        """Let the next forward wait for events."""
        self._was_changed = events

    def _use(self) -> Use:
        module = self._module()
        assert module is not None, "whoever runs or changes it holds it"
        return Use(self._snapshots.parts(module))


_readers: weakref.WeakSet[Reader] = weakref.WeakSet()
_readers_lock = threading.RLock()


def _forget_parent() -> None:
    """Begin anew in a forked child: its parent's passes and lanes never end here."""
    global _readers_lock
    passes.forget()
    tasks.forget()
    _readers.clear()
    _readers_lock = threading.RLock()


os.register_at_fork(after_in_child=_forget_parent)


@contextmanager
def in_turn(use: Use) -> Iterator[None]:
    """Run a block on this lane, beside nothing that changes what it reads, or reads what it changes."""
    try:
        _wait_turn(use)
        if not use.changes:
            yield
            return
        with _readers_lock:
            readers = [*_readers]
        # One that begins only now finds this use in its order.
        concerned = [
            each for each in readers if (each._lock.locked() or each._was_read) and each.wait_read(use)
        ]
        devices = {*map(_device, use.snapshot.tensors)} - {torch.device("cpu")}
        streams = [*map(torch.cuda.current_stream, devices)]
        for reader in concerned:
            reader.follow(streams)
        try:
            yield
        finally:
            events = [*map(torch.cuda.Stream.record_event, streams)]
            for reader in concerned:
                reader.precede(events)
    finally:
        tasks.leave(use)


def _wait_turn(use: Use) -> None:
    """Block this lane's thread until the turn of a use has come."""
    if tasks.arrive(use):
        return
    come = threading.Event()
    if tasks.wake_by(use, come.set):
        come.wait()
