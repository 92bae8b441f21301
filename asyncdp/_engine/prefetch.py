"""Inputs of coming batches on their way to a device while it still computes the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .. import _tree
from .._devices import LaneDevice
from .._runtime import Lane
from .._runtime.task import driver_of


class Prefetcher:
    """Brings batches to lanes ahead of their turn, where the lanes' devices can copy and compute at once.

    Memory is pinned and copies are issued on threads of its own, one per such lane: pinning may take
    long, and neither the loop nor a lane that has work to issue should wait for it.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        count = sum(driver_of(lane).prefetches for lane in lanes)
        self._threads = ThreadPoolExecutor(count, "asyncdp-prefetch") if count else None

    def start(self, lane: Lane, inputs: tuple[Any, ...]) -> Callable[[], tuple[Any, ...]]:
        """Begin to bring the inputs of a work; the work on `lane` gets them by calling the result once."""
        if self._threads is None or not driver_of(lane).prefetches:
            return lambda: inputs
        under_way = [self._threads.submit(_bring, driver_of(lane), inputs)]
        # Taken out, lest an error and the frames that it went through keep each other alive.
        return lambda: under_way.pop().result()()

    def close(self) -> None:
        """Let the threads end; what no work has asked for is dropped."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _bring(driver: LaneDevice, inputs: tuple[Any, ...]) -> Callable[[], tuple[Any, ...]]:
    leaves, spec = _tree.flatten(inputs)
    places = [place for place, leaf in enumerate(leaves) if _is_prefetchable(leaf)]
    if not places:
        return lambda: inputs
    take = driver.prefetch([leaves[place] for place in places])

    def put_together() -> tuple[Any, ...]:
        for place, copy in zip(places, take(), strict=True):
            leaves[place] = copy
        moved: tuple[Any, ...] = _tree.unflatten(spec, leaves)
        return moved

    return put_together


def _is_prefetchable(leaf: Any) -> bool:
    """Tell whether a leaf is plain data of the host; the lane itself brings everything else."""
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not leaf.requires_grad
    )
