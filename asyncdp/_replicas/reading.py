"""What lanes may do at the same time: forwards that read a module, and tasks that change or copy it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn

from .order import Use, tasks
from .snapshot import LatestSnapshot


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
        with _all_lock:
            _all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        if tasks.changes_anything:
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


_all: weakref.WeakSet[Reader] = weakref.WeakSet()
_all_lock = threading.RLock()


def _forget_parent() -> None:
    """Begin anew in a forked child, where no forward of its parent's ever ends."""
    global _all_lock
    _all.clear()
    _all_lock = threading.RLock()


os.register_at_fork(after_in_child=_forget_parent)


@contextmanager
def in_turn(use: Use) -> Iterator[None]:
    """Run a block on this lane, beside nothing that changes what it reads, or reads what it changes."""
    try:
        _wait_turn(use)
        if not use.changes:
            yield
            return
        with _all_lock:
            readers = [*_all]
        # One that begins only now finds this use in its order.
        concerned = [
            each for each in readers if (each._lock.locked() or each._was_read) and each.wait_read(use)
        ]
        devices = {tensor.device for tensor in use.snapshot.tensors if tensor.device.type == "cuda"}
        streams = [torch.cuda.current_stream(device) for device in devices]
        for reader in concerned:
            reader.follow(streams)
        try:
            yield
        finally:
            events = [stream.record_event() for stream in streams]
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
