"""Copies the inputs of later batches to a device while it still computes earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .._runtime import Lane
from .._runtime.task import driver_of
from .._verbs.moving import prefetched


class Prefetcher:
    """Copies batches to lanes' devices ahead of their turn, where a device can copy while it computes.

    Memory is pinned and copies are issued on threads of its own, one per such lane: pinning may take
    long, and neither the loop nor a lane with tasks to issue should wait for it.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        count = sum(driver_of(lane).prefetches for lane in lanes)
        self._threads = ThreadPoolExecutor(count, "asyncdp-prefetch") if count else None

    def start(self, lane: Lane, batch: Any) -> Callable[[], Any]:
        """Begin to copy a batch, any tree; the task on `lane` gets it by calling the result once."""
        if self._threads is None or not driver_of(lane).prefetches:
            return lambda: batch
        submitted = [self._threads.submit(prefetched, batch, driver_of(lane))]
        # Popped, lest an error and the frames that it went through keep each other alive.
        return lambda: submitted.pop().result()()

    def close(self) -> None:
        """Let the threads end; what no task has asked for is dropped."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
