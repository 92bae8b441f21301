"""The places that run batches: one per lane, each running one batch at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .._parallel_apply import arguments
from .._runtime import Lane, LaneState, Runtime, default_runtime
from ..errors import NotServableError
from .steps import Collate, Split

if TYPE_CHECKING:
    from .._data_parallel import DataParallel


class Slot(Protocol):
    """A place that runs one batch at a time."""

    @property
    def lost(self) -> str | None:
        """The name of the lane under this slot, if its device is lost."""

    async def run(self, samples: Sequence[Any]) -> Sequence[Any]:
        """Collate the samples, run the batch and split what comes out."""


@dataclass(frozen=True)
class _Steps:
    """How samples become a batch and an output becomes results."""

    collate: Collate
    split: Split

    def over(self, function: Callable[..., Any], samples: Sequence[Any]) -> Sequence[Any]:
        """All of it in one go, on a lane. Serving never learns, so nothing is recorded for a backward."""
        with torch.no_grad():
            return self.split(function(*arguments(self.collate(samples))), samples)


@dataclass(frozen=True)
class _LaneSlot:
    """Runs batches on one lane."""

    runtime: Runtime
    lane: Lane
    num_threads: int
    on_lane: Callable[[Sequence[Any]], Sequence[Any]]

    @property
    def lost(self) -> str | None:
        return self.lane.name if self.lane.state is LaneState.LOST else None

    async def run(self, samples: Sequence[Any]) -> Sequence[Any]:
        return await self.runtime.run(self.on_lane, samples, lane=self.lane, num_threads=self.num_threads)


@dataclass(frozen=True)
class _AsyncSlot:
    """Awaits an async callable on the loop; collating and splitting still happen on a lane."""

    runtime: Runtime
    function: Callable[..., Any]
    steps: _Steps

    @property
    def lost(self) -> str | None:
        return None

    async def run(self, samples: Sequence[Any]) -> Sequence[Any]:
        batch = await self.runtime.run(self.steps.collate, samples)
        output = await self.function(*arguments(batch))
        return await self.runtime.run(self.steps.split, output, samples)


def open_slots(
    engine: DataParallel | Callable[..., Any],
    collate: Collate,
    split: Split,
    runtime: Runtime | None,
    max_in_flight: int | None,
) -> list[Slot]:
    """Make the slots over an engine or a callable.

    Args:
        engine: see `Batcher`.
        collate: samples to a batch.
        split: output to results.
        runtime: whose lanes run a callable; the process's own if None. An engine has its own.
        max_in_flight: how many slots; one per lane if None.

    Raises:
        NotServableError: `engine` cannot be called.
    """
    from .._data_parallel import DataParallel

    steps = _Steps(collate, split)
    if isinstance(engine, DataParallel):
        return _engine_slots(engine, steps, max_in_flight)
    if not callable(engine):
        raise NotServableError(engine)
    runtime = runtime or default_runtime()
    lanes = _repeated(runtime.lanes, max_in_flight)
    if _is_async(engine):
        return [_AsyncSlot(runtime, engine, steps) for _ in lanes]
    num_threads = runtime.thread_share(len(set(lanes)))
    return [_LaneSlot(runtime, lane, num_threads, partial(steps.over, engine)) for lane in lanes]


def _engine_slots(engine: DataParallel, steps: _Steps, max_in_flight: int | None) -> list[Slot]:
    lanes = engine.lanes
    num_threads = engine.runtime.thread_share(len(lanes))

    def on_lane(position: int, samples: Sequence[Any]) -> Sequence[Any]:
        return steps.over(partial(engine.run_here, position), samples)

    return [
        _LaneSlot(engine.runtime, lane, num_threads, partial(on_lane, lanes.index(lane)))
        for lane in _repeated(lanes, max_in_flight)
    ]


def _repeated(lanes: Sequence[Lane], count: int | None) -> list[Lane]:
    """The lanes in turn, `count` of them."""
    return [lanes[position % len(lanes)] for position in range(len(lanes) if count is None else count)]


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  the method is looked at, not called
    )
