"""The places that run batches: one per lane, each running one batch at a time."""

from __future__ import annotations

import contextvars
import inspect
import itertools
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from .. import _loops
from .._loops import ends_tasks, is_cancelled
from .._runtime import Lane, LaneState, Runtime, Scheduler, Task, default_runtime, scheduler_of, trace
from .._runtime.ambient import Ambient
from .._runtime.lane_runner import LaneRunner
from .._runtime.passes import Pass, Stage
from .._runtime.schedule import PassState
from .._runtime.task import driver_of, last_seconds, load_of
from ..errors import NotServableError
from .collate import StatedSample, Steps

# Up to here the batches of two lanes, for most of which Python's lock is held, take longer than one of both.
_QUICK_SECONDS = 250e-6

within: contextvars.ContextVar[frozenset[object]] = contextvars.ContextVar("within", default=frozenset())
"""The batchers whose batches wait for what runs in this context."""

OnEnd = Callable[[Sequence[Any] | None, BaseException | None], object]
"""Called with one result for each sample, or with an error; with neither if the batch was cancelled."""


@dataclass
class Slot(ABC):
    """A place that runs one batch at a time."""

    scheduler: Scheduler
    steps: Steps
    ambient: Ambient = field(init=False)

    @property
    def lost(self) -> str | None:
        """The name of the lane of this slot, if its device is lost."""
        return None

    @property
    def place(self) -> str:
        """Where its batches run, as errors say it."""
        return "of an async function"

    @property
    def where(self) -> Hashable:
        """The lane of this slot, if it has one; else it shares it with nobody."""
        return id(self)

    @property
    def load(self) -> int:
        """How many tasks its lane has."""
        return 0

    @property
    def is_suspect(self) -> bool:
        """Whether its lane hangs."""
        return False

    @property
    def is_quick(self) -> bool:
        """Whether its batches take no longer than it costs to make two of one."""
        return False

    def change_lane(self) -> bool:
        """Change from a lost or suspect lane to one that no slot is on; return whether there was one."""
        return True

    def substitute(self) -> Slot | None:
        """Return a slot for a lane that no slot is on, while this one hangs; None if there is none."""
        return None

    def leave(self) -> None:  # noqa: B027 - nothing to leave without a lane
        """Leave the lane to others, once a substitute has the place."""

    def open(self) -> None:
        """Capture what is switched on in this thread and task: every batch runs under it.

        Raises:
            NestedPassError: this is a thread of the very lanes.
        """
        self.scheduler.check_not_nested()
        with torch.no_grad():  # results carry no graph
            self.ambient = self.scheduler.ambient()

    def _ambient_of(self, waiting: frozenset[object]) -> Ambient:
        ambient = self.ambient.copy()
        if waiting:
            ambient.run(_add_within, waiting)
        return ambient

    @abstractmethod
    def begin(
        self, samples: Sequence[Any], on_end: OnEnd, waiting: frozenset[object]
    ) -> Callable[[], object]:
        """Collate the samples, run the batch and split its output: one result for each.

        Args:
            samples: the batch.
            on_end: called on this event loop, in a later turn.
            waiting: batchers whose batches wait for this one, see `within`.

        Returns:
            What cancels the batch; `on_end` is still called, once everything has drained.
        """


@dataclass
class LaneSlot(Slot):
    """Runs batches on one lane, by the function and the steps that belong to it.

    Attributes:
        spares: lanes that no slot is on; all slots share the list.
    """

    lane: Lane
    spares: list[Lane]
    ways: Mapping[Lane, tuple[Steps, Callable[..., Any]]]
    num_threads: int

    @property
    def lost(self) -> str | None:
        return self.lane.name if self.lane.state is LaneState.LOST else None

    @property
    def place(self) -> str:
        return f"on lane {self.lane.name}"

    @property
    def where(self) -> Lane:
        return self.lane

    @property
    def load(self) -> int:
        return load_of(self.lane)

    @property
    def is_suspect(self) -> bool:
        return self.lane.state is LaneState.SUSPECT

    @property
    def is_quick(self) -> bool:
        return last_seconds(self.lane) < _QUICK_SECONDS

    def change_lane(self) -> bool:
        lane = self._take_spare()
        if lane is None:
            return False
        if self.lost is None:
            self.leave()
        self.lane = lane
        return True

    def substitute(self) -> Slot | None:
        lane = self._take_spare()
        if lane is None:
            return None
        substitute = replace(self, lane=lane)
        substitute.ambient = self.ambient
        return substitute

    def leave(self) -> None:
        self.spares.append(self.lane)

    def _take_spare(self) -> Lane | None:
        for lane in self.spares:
            if lane.state is LaneState.OPEN:
                self.spares.remove(lane)
                return lane
        return None

    def begin(
        self, samples: Sequence[Any], on_end: OnEnd, waiting: frozenset[object]
    ) -> Callable[[], object]:
        steps, function = self.ways[self.lane]
        run = steps.run_as_called if isinstance(samples[0], StatedSample) else steps.run
        begin = partial(run, function, samples)
        pass_ = self.scheduler.start(
            Task(self.lane, begin if steps.splits_later else partial(_at_once, begin), "run"),
            partial(_report, on_end),
            [_split_stage] if steps.splits_later else (),
            num_threads=self.num_threads,
            ambient=self._ambient_of(waiting),
        )
        return partial(self.scheduler.cancel, pass_)


def _add_within(batchers: frozenset[object]) -> None:
    within.set(within.get() | batchers)


def _at_once(begin: Callable[[], Callable[[], Any]]) -> Any:
    return begin()()


def _split_stage(splits: list[Any], lane: Lane) -> Stage:
    return [Task(lane, splits[0], "split")]


def _report(on_end: OnEnd, pass_: Pass) -> None:
    if pass_.results:
        on_end(pass_.results[0], None)
    else:
        on_end(None, None if pass_.state is PassState.CANCELLED else pass_.take_failure())


@dataclass
class AsyncSlot(Slot):
    """Awaits an async function on the loop; collating and splitting still happen on a lane."""

    function: Callable[..., Any]
    context: contextvars.Context = field(init=False)

    def open(self) -> None:
        super().open()
        self.context = contextvars.copy_context()

    def begin(
        self, samples: Sequence[Any], on_end: OnEnd, waiting: frozenset[object]
    ) -> Callable[[], object]:
        # A copy, since the context variables that one batch sets are not for the next.
        context, ambient = self.context.copy(), self._ambient_of(waiting)
        context.run(_add_within, waiting)
        return context.run(_loops.current().spawn, partial(self._run, samples, on_end, ambient))

    async def _run(self, samples: Sequence[Any], on_end: OnEnd, ambient: Ambient) -> None:
        try:
            args, kwargs = await self._on_lane(partial(self.steps.arguments, samples), "collate", ambient)
            begun = time.perf_counter()
            try:
                output = await _without_grad(self._call(args, kwargs))
            finally:
                if trace.recorder is not None:
                    trace.recorder.add("event loop", "awaiting", "model", begun, time.perf_counter())
            results = await self._on_lane(partial(self.steps.results, output, samples), "split", ambient)
        except BaseException as error:
            if ends_tasks(error) and is_cancelled():
                on_end(None, None)
                raise
            on_end(None, error)
        else:
            on_end(results, None)

    async def _on_lane(self, function: Callable[[], Any], label: str, ambient: Ambient) -> Any:
        lane = self.scheduler.least_busy(self.scheduler.lanes)[0]
        return (await self.scheduler.run([Task(lane, function, label)], ambient=ambient.copy()))[0]

    async def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return await self.function(*args, **kwargs)


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


def open_slots(engine: Any, steps: Steps, runtime: Runtime | None, max_in_flight: int | None) -> list[Slot]:
    """Make the slots over an engine or a function.

    Args:
        engine: what has `__asyncdp_lane_runner__` runs on its own lanes, as `LaneRunner` says.
        steps: around each batch.
        runtime: whose lanes run a function; the process's own if None.
        max_in_flight: how many slots; if None one per lane, and two for an engine on a device that copies
            while it computes: the next batch is there, and launched, when the one before ends.

    Raises:
        NotServableError: `engine` cannot be called.
    """
    is_async = False
    doubled: tuple[Lane, ...] = ()
    if hasattr(engine, "__asyncdp_lane_runner__"):
        runner: LaneRunner = engine.__asyncdp_lane_runner__()
        scheduler, lanes = scheduler_of(runner.runtime), runner.lanes
        run = getattr(runner, "run_as", runner.run_on)  # as `Batcher` captures states
        ways = {
            lane: (steps.on(driver_of(lane)), partial(run, position)) for position, lane in enumerate(lanes)
        }
        doubled = tuple(lane for lane in lanes if driver_of(lane).prefetches)
    elif callable(engine):
        scheduler = scheduler_of(default_runtime() if runtime is None else runtime)
        lanes = tuple(scheduler.lanes)
        ways = dict.fromkeys(lanes, (steps, engine))
        is_async = inspect.iscoroutinefunction(engine) or inspect.iscoroutinefunction(type(engine).__call__)
    else:
        raise NotServableError(engine)
    count = max_in_flight or len(lanes) + len(doubled)
    if is_async:
        return [AsyncSlot(scheduler, steps, engine) for _ in range(count)]
    places = itertools.chain(lanes, doubled if max_in_flight is None else itertools.cycle(lanes))
    taken = list(itertools.islice(places, count))
    spares = [lane for lane in lanes if lane not in taken]
    num_threads = scheduler.thread_share(len(set(taken)))
    return [LaneSlot(scheduler, steps, lane, spares, ways, num_threads) for lane in taken]


def capture_of(engine: Any) -> Callable[..., Any] | None:
    """Return what captures the state of an engine at a call; None if it has none."""
    if not hasattr(engine, "__asyncdp_lane_runner__"):
        return None
    return getattr(engine.__asyncdp_lane_runner__(), "capture", None)
