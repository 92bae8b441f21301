"""One pass on its way: stages of work on lanes, the first failure kept, everything drained."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .._loops.completion import Callback, new_callback, new_completion
from ..errors import AsyncDPError, StopIterationInLaneError
from . import trace
from .ambient import Ambient
from .lane import Lane, Work

if TYPE_CHECKING:
    from .core import Core

Stage = Sequence[tuple[Lane, Callable[[], Any]]]
"""What each lane does; the calls run at the same time, one after another where a lane repeats."""

NextStage = Callable[[list[Any], Lane], Stage]
"""Makes the following stage from the results of one and the lane that ended last.

Called under the runtime's lock: it only pairs lanes with calls and does no work itself. After a stage
of no works the lane is the runtime's first.
"""


_NOTHING: dict[torch.device, Any] = {}


class PassState(enum.IntEnum):
    """How far a pass has come."""

    WAITING = 0
    RUNNING = 1
    DONE = 2
    FAILED = 3
    CANCELLED = 4


# Looked up once: an enumeration's members are slow to get at.
_WAITING, _RUNNING, _DONE = PassState.WAITING, PassState.RUNNING, PassState.DONE


class Pass:
    """The stages of one pass; made, submitted and awaited by one task, or told of by a callback.

    A stage begins when all works of the one before have succeeded, without a detour through the
    event loop: the lane that ends last queues it. Once a work has failed or the task is cancelled,
    no further stage begins, and the pass ends when what runs has drained.

    The fields below are guarded by the runtime's lock while works are under way.

    Args:
        core: the runtime's.
        stage: the first stage.
        following: makes each of the others.
        num_threads: intra-op threads of each work on a CPU lane.
        replica_stage: which stage's works are replicas, for the notes on exceptions; None if none's.
        ambient: what the caller had switched on; what it has now, if None.
        lanes: all that stages may use; those of the first if None.
        on_end: called with the pass on the event loop that made it, for one that no task awaits.
    """

    __slots__ = (
        "__weakref__",
        "_cancelled",
        "_completion",
        "_core",
        "_failures",
        "_following",
        "_num_left",
        "_to_replicas",
        "_works",
        "ambient",
        "captured",
        "lanes",
        "num_threads",
        "results",
        "state",
    )

    def __init__(
        self,
        core: Core,
        stage: Stage,
        following: Sequence[NextStage],
        num_threads: int,
        replica_stage: int | None,
        ambient: Ambient | None = None,
        lanes: Iterable[Lane] | None = None,
        on_end: Callable[[Pass], object] | None = None,
    ) -> None:
        self._core = core
        self.num_threads = num_threads
        self.ambient = ambient or Ambient(core.device_types)
        self.captured: Mapping[torch.device, Any] = (
            core.capture(lanes or [lane for lane, _ in stage]) if core.captures else _NOTHING
        )
        self._following = following
        self._completion: Callback = (
            new_completion(self.cancel) if on_end is None else new_callback(partial(on_end, self))
        )
        self._failures: Sequence[tuple[str | None, BaseException]] = ()
        self._to_replicas = replica_stage  # stages until then, negative once past it
        self._cancelled = False
        self.state = _WAITING
        self._prepare(stage)

    def __repr__(self) -> str:
        return f"<Pass {self.state.name.lower()}: {self._num_left} of {len(self._works)} works left>"

    async def run(self, *, waits: bool = True) -> list[Any]:
        """Submit the pass, wait for its end and return the results of the last stage.

        Args:
            waits: whether to wait for room in the lanes' queues, if need be.

        Raises:
            QueueFullError: there is no room, and the pass does not wait.
            BaseException: the first failure in time, the very object a lane raised.
        """
        self.submit(waits=waits)
        try:
            await self._completion  # type: ignore[misc]
        except BaseException:
            # The traceback of a failure refers to this pass: they would keep each other alive.
            self._failures = ()
            raise
        error = self.take_failure()
        if error is None:
            return self.results
        try:
            raise error
        finally:
            # The traceback refers to this frame: without this, frame and error keep each other alive.
            del error, self

    def submit(self, *, waits: bool = True) -> None:
        """Begin the pass; `waits` for room, or is refused. Its end is told on the loop, not here."""
        # Asked before the lane gets its work; the lanes of one stage do alike.
        is_short = bool(self._works) and self._works[0].lane.is_alert
        with self._core.lock:
            self._core.submit(self, waits)
        self._core.wake()
        if is_short:
            self._completion.expect()

    def cancel(self) -> None:
        """Drop what has not started; the pass ends once what runs has drained."""
        with self._core.lock:
            if self.state > _RUNNING:
                return
            self._cancelled = True
            behind = self._core.schedule.withdraw(self)
            if behind is not None:
                self._core.act(behind)
                self._finish()
            else:
                for work in list(self._works):
                    if work.lane.remove(work):
                        self.drop(work)
        self._core.wake()

    @property
    def was_cancelled(self) -> bool:
        """Whether an ended pass was given up; then nothing else about it means anything."""
        return self.state is PassState.CANCELLED

    def take_failure(self) -> BaseException | None:
        """The first failure of an ended pass, told where it was and what else failed; only once."""
        failures, self._failures = self._failures, ()
        return _first_failure(failures) if failures else None

    # Called by the runtime, under its lock.

    def enqueue(self, *, first: bool = False) -> None:
        """Put the works of the current stage on their lanes."""
        self.state = _RUNNING
        for work in self._works:
            work.lane.put(work, first=first)
        if not self._works:
            self._go_over(self._core.lanes[0])

    def refuse(self, error: AsyncDPError) -> None:
        """End a pass that was never admitted."""
        self._keep(None, error)
        self._finish()

    def drop(self, work: Work, error: BaseException | None = None) -> None:
        """Count a work that left its lane's queue unstarted, because of `error` or a cancellation."""
        work.function = None
        if error is not None:
            self._keep(self._place(work), error)
        self._num_left -= 1
        self._core.act(self._core.schedule.finish(work.lane.index))
        if self._num_left == 0:
            self._finish()

    def ended(self, work: Work) -> None:
        """Take note of a work's end, and begin the next stage or end the pass."""
        actions = self._core.schedule.finish(work.lane.index)
        if actions:
            self._core.act(actions)
        if work.error is None:
            self.results[work.index] = work.value
            work.value = None
        else:
            self._fail(work)
        self._num_left -= 1
        if self._num_left == 0:
            self._go_over(work.lane)

    # Called by a work of the pass itself, without the lock.

    def go_on(self) -> bool:
        """Begin the next stage within the only work of this one, unless the pass was cancelled.

        It costs less than a stage of its own. Returns whether it may begin.
        """
        if self._to_replicas is not None:
            self._to_replicas -= 1
        return not self._cancelled

    # Called by a device, from any thread, without the lock.

    def complete(self, work: Work, _function: object, error: BaseException | None) -> None:
        """Report a work whose end on the device came after its end on the lane."""
        if error is not None:
            work.error = error
            work.lost = work.lane.driver.lost(error)
        if trace.recorder is not None:
            trace.recorder.completed(work)
        with self._core.lock:
            self.ended(work)
        self._core.wake()

    # The rest runs on whichever thread ends a work, or on the loop's; under the lock.

    def _prepare(self, stage: Stage) -> None:
        bind = self.ambient.bind
        works: list[Work] = []
        lanes: list[int] = []
        for lane, function in stage:
            works.append(Work(lane, bind(function, len(works)), self, len(works)))
            lanes.append(lane.index)
        self._works: Sequence[Work] = works
        self.lanes: Sequence[int] = lanes
        """The lanes of the current stage."""
        self._num_left = len(works)
        self.results: list[Any] = [None] * self._num_left

    def _keep(self, place: str | None, error: BaseException) -> None:
        """Keep a failure, and where it was if on a lane."""
        self._failures = (*self._failures, (place, error))

    def _fail(self, work: Work) -> None:
        error, work.error = work.error, None
        assert error is not None
        self._keep(self._place(work), error)
        if work.lost:
            self._core.lose(work.lane, error)

    def _place(self, work: Work) -> str:
        lane = f"lane {work.lane.name}"
        return f"replica {work.index} on {lane}" if self._to_replicas == 0 else lane

    def _go_over(self, lane: Lane) -> None:
        """Begin the next stage or end the pass: the current stage has ended, with a work of `lane`."""
        if self._following and not self._failures and not self._cancelled:
            self._advance(lane)
        else:
            self._finish()

    def _advance(self, lane: Lane) -> None:
        """Begin the next stage."""
        if self._to_replicas is not None:
            self._to_replicas -= 1
        try:
            make_stage, *self._following = self._following
            stage = make_stage(self.results, lane)
        except BaseException as error:
            self._keep(f"lane {lane.name}", error)
            self._finish()
            return
        self._prepare(stage)
        refusal = self._core.proceed(self)
        if refusal is None:
            self.enqueue(first=True)
        else:
            self.refuse(refusal)

    def _finish(self) -> None:
        """End the pass."""
        if self.state > _RUNNING:
            return
        if self._failures or self._cancelled:
            # Whoever was cancelled is told only that, whatever else has failed.
            self.state = PassState.CANCELLED if self._cancelled else PassState.FAILED
            self.results = []
        else:
            self.state = _DONE
        # Nothing of a finished pass but its result may stay referenced by the task that awaits it.
        self._works = ()
        self._following = ()
        self.captured = _NOTHING
        self._core.finished(self, self._completion)


def _first_failure(failures: Sequence[tuple[str | None, BaseException]]) -> BaseException:
    """The first failure in time, told where it happened and what else failed."""
    place, error = failures[0]
    if isinstance(error, StopIteration):
        wrapped = StopIterationInLaneError()
        wrapped.__cause__ = error
        error = wrapped
    if place is not None:
        _add_note(error, f"in {place}" if place.startswith("replica") else f"on {place}")
    for other_place, other in failures[1:]:
        if other_place is not None and other is not error:
            _add_note(error, f"also failed: {other_place}: {other!r}")
    return error


def _add_note(error: BaseException, note: str) -> None:
    # An exception object that is raised again and again must not collect notes without end.
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
