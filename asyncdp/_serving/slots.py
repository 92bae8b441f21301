"""The places that run batches: one per lane, each running one batch at a time."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .._parallel_apply import arguments
from .._runtime import Lane, LaneState, Runtime, default_runtime
from ..errors import NotServableError, SplitError
from .steps import Collate, Split

if TYPE_CHECKING:
    from .._data_parallel import DataParallel


class Slot(Protocol):
    """A place that runs one batch at a time."""

    @property
    def lost(self) -> str | None:
        """The name of the lane under this slot, if its device is lost."""

    def move_on(self) -> bool:
        """Change to a living lane that no slot is on; tell whether there was one."""

    async def run(self, samples: Sequence[Any]) -> Sequence[Any]:
        """Collate the samples, run the batch and split what comes out: one result for each."""


@dataclass(frozen=True)
class _Steps:
    """How samples become a batch and an output becomes results; called on a lane.

    Serving never learns, so nothing is recorded for a backward.
    """

    collate: Collate
    split: Split

    def over(self, function: Callable[..., Any], samples: Sequence[Any]) -> Sequence[Any]:
        """All of it in one go."""
        with torch.no_grad():
            return self._split(function(*arguments(self.collate(samples))), samples)

    def arguments(self, samples: Sequence[Any]) -> tuple[Any, ...]:
        """What to call an engine with."""
        with torch.no_grad():
            return arguments(self.collate(samples))

    def results(self, output: Any, samples: Sequence[Any]) -> Sequence[Any]:
        """One result for each sample."""
        with torch.no_grad():
            return self._split(output, samples)

    def _split(self, output: Any, samples: Sequence[Any]) -> Sequence[Any]:
        values = self.split(output, samples)
        if type(values) not in (tuple, list):
            values = list(values)
        if len(values) != len(samples):
            raise SplitError(f"split gave {len(values)} results instead of one for each", len(samples))
        return values


@dataclass
class _LaneSlot:
    """Runs batches on one lane."""

    runtime: Runtime
    lane: Lane
    spares: list[Lane]  # lanes that no slot is on; all slots share it
    num_threads: int
    on_lane: Callable[[Lane, Sequence[Any]], Sequence[Any]]

    @property
    def lost(self) -> str | None:
        return self.lane.name if self.lane.state is LaneState.LOST else None

    def move_on(self) -> bool:
        for lane in self.spares:
            if lane.state is not LaneState.LOST:
                self.spares.remove(lane)
                self.lane = lane
                return True
        return False

    async def run(self, samples: Sequence[Any]) -> Sequence[Any]:
        return await self.runtime.run(
            self.on_lane, self.lane, samples, lane=self.lane, num_threads=self.num_threads
        )


@dataclass(frozen=True)
class _AsyncSlot:
    """Awaits an async callable on the loop; collating and splitting still happen on a lane."""

    runtime: Runtime
    function: Callable[..., Any]
    steps: _Steps

    @property
    def lost(self) -> str | None:
        return None

    def move_on(self) -> bool:
        return True

    async def run(self, samples: Sequence[Any]) -> Sequence[Any]:
        batch = await self.runtime.run(self.steps.arguments, samples)
        output = await _without_grad(self._call(batch))
        return await self.runtime.run(self.steps.results, output, samples)

    async def _call(self, batch: tuple[Any, ...]) -> Any:
        return await self.function(*batch)


@types.coroutine
def _without_grad(coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Await a coroutine with grad mode off, unless it switches it on itself.

    The mode belongs to the thread: it is switched for each step, so that other tasks have theirs.
    """
    is_on = False
    resume: Callable[[], Any] = partial(coroutine.send, None)
    while True:
        others = torch.is_grad_enabled()
        torch.set_grad_enabled(is_on)
        try:
            wanted = resume()
        except StopIteration as stop:
            return stop.value
        finally:
            del resume  # it may hold an error, whose traceback refers to this frame
            is_on = torch.is_grad_enabled()
            torch.set_grad_enabled(others)
        try:
            resume = partial(coroutine.send, (yield wanted))
        except BaseException as error:
            resume = partial(coroutine.throw, error)


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
    if _is_async(engine):
        return [_AsyncSlot(runtime, engine, steps) for _ in _repeated(runtime.lanes, max_in_flight)]
    return _lane_slots(
        runtime, runtime.lanes, max_in_flight, lambda lane, samples: steps.over(engine, samples)
    )


def _engine_slots(engine: DataParallel, steps: _Steps, max_in_flight: int | None) -> list[Slot]:
    positions = {lane: position for position, lane in enumerate(engine.lanes)}

    def on_lane(lane: Lane, samples: Sequence[Any]) -> Sequence[Any]:
        return steps.over(partial(engine.run_here, positions[lane]), samples)

    return _lane_slots(engine.runtime, engine.lanes, max_in_flight, on_lane)


def _lane_slots(
    runtime: Runtime,
    lanes: Sequence[Lane],
    max_in_flight: int | None,
    on_lane: Callable[[Lane, Sequence[Any]], Sequence[Any]],
) -> list[Slot]:
    taken = _repeated(lanes, max_in_flight)
    spares = [lane for lane in lanes if lane not in taken]
    num_threads = runtime.thread_share(len(set(taken)))
    return [_LaneSlot(runtime, lane, spares, num_threads, on_lane) for lane in taken]


def _repeated(lanes: Sequence[Lane], count: int | None) -> list[Lane]:
    """The lanes in turn, `count` of them."""
    return [lanes[position % len(lanes)] for position in range(len(lanes) if count is None else count)]


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  the method is looked at, not called
    )
