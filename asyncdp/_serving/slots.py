"""The places that run batches: one per lane, each running one batch at a time."""

from __future__ import annotations

import contextvars
import inspect
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .. import _loops
from .._loops import ends_tasks, is_cancelled
from .._runtime import Lane, Runtime, Scheduler, Task, default_runtime, scheduler_of
from .._runtime.schedule import PassState
from .._runtime.task import is_lost, last_seconds
from .._verbs.batch import positional
from ..errors import NotServableError, SplitError
from .collate import Collate, Split

if TYPE_CHECKING:
    from .._engine.data_parallel import DataParallel
    from .._runtime.ambient import Ambient
    from .._runtime.passes import Pass

Values = Any
"""One result for each sample, or CANCELLED."""

CANCELLED = object()
"""Instead of results: the batch was given up."""

# Up to here the batches of two lanes, for most of which Python's lock is held, take longer than one of both.
_QUICK_SECONDS = 250e-6

OnEnd = Callable[[Values, BaseException | None], object]
"""Told of results, or of what the engine raised."""


class Slot(Protocol):
    """A place that runs one batch at a time."""

    @property
    def lost(self) -> str | None:
        """The name of the lane under this slot, if its device is lost."""

    @property
    def is_quick(self) -> bool:
        """Whether its batches take no longer than it costs to make two of one."""

    def move_on(self) -> bool:
        """Change to a living lane that no slot is on; tell whether there was one."""

    def open(self) -> None:
        """Note what is switched on in this thread and task: every batch runs under it.

        Raises:
            NestedPassError: this is a thread of the very lanes.
        """

    def begin(self, samples: Sequence[Any], on_end: OnEnd) -> Callable[[], object]:
        """Collate the samples, run the batch and split what comes out: one result for each.

        Args:
            samples: the batch.
            on_end: called on this event loop, in a later turn.

        Returns:
            What gives the batch up; `on_end` is still told, once everything has drained.
        """


@dataclass(frozen=True)
class _Steps:
    """How samples become a batch and an output becomes results; called on a lane."""

    collate: Collate
    split: Split

    def over(self, function: Callable[..., Any], samples: Sequence[Any]) -> Sequence[Any]:
        """All of it in one go."""
        batch = self.collate(samples)
        output = function(*batch) if type(batch) is tuple else function(batch)
        return self.results(output, samples)

    def arguments(self, samples: Sequence[Any]) -> tuple[Any, ...]:
        """What to call an engine with."""
        return positional(self.collate(samples))

    def results(self, output: Any, samples: Sequence[Any]) -> Sequence[Any]:
        """One result for each sample."""
        values = self.split(output, samples)
        if type(values) not in (tuple, list):
            values = list(values)
        if len(values) != len(samples):
            raise SplitError(f"split gave {len(values)} results instead of one for each", len(samples))
        return values


def _ambient(scheduler: Scheduler) -> Ambient:
    """What is switched on here, without gradients: serving never learns."""
    scheduler.check_not_nested()
    with torch.no_grad():
        return scheduler.ambient()


@dataclass
class _LaneSlot:
    """Runs batches on one lane."""

    scheduler: Scheduler
    lane: Lane
    spares: list[Lane]  # lanes that no slot is on; all slots share it
    num_threads: int
    steps: _Steps
    function_of: Callable[[Lane], Callable[..., Any]]
    ambient: Ambient = field(init=False)

    @property
    def lost(self) -> str | None:
        return self.lane.name if is_lost(self.lane) else None

    @property
    def is_quick(self) -> bool:
        return last_seconds(self.lane) < _QUICK_SECONDS

    def move_on(self) -> bool:
        for lane in self.spares:
            if not is_lost(lane):
                self.spares.remove(lane)
                self.lane = lane
                return True
        return False

    def open(self) -> None:
        self.ambient = _ambient(self.scheduler)

    def begin(self, samples: Sequence[Any], on_end: OnEnd) -> Callable[[], object]:
        run = partial(self.steps.over, self.function_of(self.lane), samples)
        pass_ = self.scheduler.start(
            Task(self.lane, run, "run"),
            partial(_report, on_end),
            num_threads=self.num_threads,
            ambient=self.ambient.copy(),
        )
        return partial(self.scheduler.cancel, pass_)


def _report(on_end: OnEnd, pass_: Pass) -> None:
    if pass_.results:
        on_end(pass_.results[0], None)
    elif pass_.state is PassState.CANCELLED:
        on_end(CANCELLED, None)
    else:
        on_end(None, pass_.take_failure())


@dataclass
class _AsyncSlot:
    """Awaits an async callable on the loop; collating and splitting still happen on a lane."""

    scheduler: Scheduler
    function: Callable[..., Any]
    steps: _Steps
    ambient: Ambient = field(init=False)
    context: contextvars.Context = field(init=False)

    @property
    def lost(self) -> str | None:
        return None

    @property
    def is_quick(self) -> bool:
        return False

    def move_on(self) -> bool:
        return True

    def open(self) -> None:
        self.ambient = _ambient(self.scheduler)
        self.context = contextvars.copy_context()

    def begin(self, samples: Sequence[Any], on_end: OnEnd) -> Callable[[], object]:
        # Whoever ended the batch before, its own context variables are of no concern to this one.
        return self.context.copy().run(_loops.current().spawn, partial(self._run, samples, on_end))

    async def _run(self, samples: Sequence[Any], on_end: OnEnd) -> None:
        try:
            batch = await self._on_lane(partial(self.steps.arguments, samples), "collate")
            output = await _without_grad(self._call(batch))
            values = await self._on_lane(partial(self.steps.results, output, samples), "split")
        except BaseException as error:
            if ends_tasks(error) and is_cancelled():
                on_end(CANCELLED, None)
                raise
            on_end(None, error)
        else:
            on_end(values, None)

    async def _on_lane(self, function: Callable[[], Any], label: str) -> Any:
        lane = self.scheduler.least_busy(self.scheduler.lanes)[0]
        return (await self.scheduler.run([Task(lane, function, label)], ambient=self.ambient.copy()))[0]

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
    from .._engine.data_parallel import DataParallel

    steps = _Steps(collate, split)
    if isinstance(engine, DataParallel):
        return _engine_slots(engine, steps, max_in_flight)
    if not callable(engine):
        raise NotServableError(engine)
    scheduler = scheduler_of(runtime or default_runtime())
    if _is_async(engine):
        return [_AsyncSlot(scheduler, engine, steps) for _ in _repeated(scheduler.lanes, max_in_flight)]
    return _lane_slots(scheduler, scheduler.lanes, max_in_flight, steps, lambda _: engine)


def _engine_slots(engine: DataParallel, steps: _Steps, max_in_flight: int | None) -> list[Slot]:
    runner = engine.__asyncdp_lane_runner__()
    calls = {lane: partial(runner.run_on, position) for position, lane in enumerate(runner.lanes)}
    return _lane_slots(scheduler_of(runner.runtime), runner.lanes, max_in_flight, steps, calls.__getitem__)


def _lane_slots(
    scheduler: Scheduler,
    lanes: Sequence[Lane],
    max_in_flight: int | None,
    steps: _Steps,
    function_of: Callable[[Lane], Callable[..., Any]],
) -> list[Slot]:
    taken = _repeated(lanes, max_in_flight)
    spares = [lane for lane in lanes if lane not in taken]
    num_threads = scheduler.thread_share(len(set(taken)))
    return [_LaneSlot(scheduler, lane, spares, num_threads, steps, function_of) for lane in taken]


def _repeated(lanes: Sequence[Lane], count: int | None) -> list[Lane]:
    """The lanes in turn, `count` of them."""
    return [lanes[position % len(lanes)] for position in range(len(lanes) if count is None else count)]


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  the method is looked at, not called
    )
