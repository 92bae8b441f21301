"""Training steps that follow one another on the lanes, without a detour through the event loop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .. import _loops
from .._loops import Finishable
from .._replicas.lane_module import ModuleState
from .._replicas.order import passes
from .._runtime.ambient import Ambient
from .._runtime.passes import Pass
from .._verbs.batch import Batch
from .commit import StepOptions
from .step import Step
from .trainer import Bring, StepPlan, Trainer


class QueuedStep:
    """A step of a pipeline, from its arrival to its end; it is the completion of its own pass.

    Attributes:
        step: what runs; None once it has ended.
        pass_: its pass.
        is_done: whether the step was taken.
        learning_rate: see `Step`.
        seconds: how long it took: since it began, or since the one before it ended.
    """

    def __init__(
        self, pipeline: Pipeline, plan: StepPlan, pass_: Pass, on_end: Callable[[QueuedStep], object]
    ) -> None:
        self.step: Step | None = plan.step
        self.pass_ = pass_
        self.is_done = False
        self.learning_rate: float | Tensor | None = None
        self.seconds = 0.0
        self.began = 0.0
        self.may_begin = False
        only_lane = plan.lanes[0] if len(plan.lanes) == 1 else None
        loop = _loops.current()
        self.use = plan.use(loop, only_lane)
        self.told: Finishable = loop.callback(partial(on_end, self))
        self._pipeline = pipeline
        pass_.completion = self

    def begin(self) -> None:
        """Begin in its turn among the steps of the pipeline; from any thread."""
        self._pipeline.begin(self)

    def finish(self) -> None:
        """Make way for the next step, and tell the event loop; called when the pass has ended."""
        self._pipeline.end(self)


class Pipeline:
    """The steps of one run, in order; several may be on the lanes or wait for them.

    A step begins on whichever thread ended the one before it; those of a single lane are in its queue by
    then. No step begins after one that failed.

    Args:
        trainer: plans the steps.
        options: what the user said of every step.
        ambient: what was switched on at the call.

    Attributes:
        is_stopped: whether no more steps begin.
        has_failed: whether a step that several processes were to take together has ended without being taken.
    """

    def __init__(self, trainer: Trainer, options: StepOptions, ambient: Ambient) -> None:
        self.is_stopped = False
        self.has_failed = False
        self._trainer = trainer
        self._scheduler = trainer.scheduler
        self._options = options
        self._ambient = ambient
        self._lock = threading.Lock()
        self._steps: dict[QueuedStep, None] = {}  # that have not ended
        self._next: deque[QueuedStep] = deque()  # that have not begun
        self._is_beginning = False
        self._last_ended = 0.0

    def add(
        self,
        batches: Sequence[Batch],
        num_lanes: int,
        state: ModuleState,
        bring: Bring | None,
        on_end: Callable[[QueuedStep], object],
    ) -> None:
        """Take one more step, made up of some batches.

        Args:
            batches: see `Trainer.plan`.
            num_lanes: see there.
            state: see there.
            bring: see there.
            on_end: called on this event loop once the step has ended.
        """
        plan = self._trainer.plan(batches, self._options, num_lanes, state, bring=bring)
        if not plan.following:  # the next one is in the lane's queue before this one has ended
            for task in plan.stage:
                assert task.function is not None
                task.function = partial(self._unless_stopped, task.function)
        pass_ = self._scheduler.make(plan.stage, plan.following, plan.num_threads, self._ambient.copy(), None)
        queued = QueuedStep(self, plan, pass_, on_end)
        with self._lock:
            self._steps[queued] = None
            self._next.append(queued)
        if passes.arrive(queued.use) or not passes.wake_by(queued.use, queued.begin):
            queued.begin()

    def stop(self) -> None:
        """Begin no more steps, and give up those on the lanes that are not whole yet; from any thread."""
        self.is_stopped = True
        with self._lock:
            steps = list(self._steps)
        for queued in steps:
            passes.give_up(queued.use)
            self._scheduler.cancel(queued.pass_)

    def begin(self, queued: QueuedStep) -> None:
        """Let a step begin whose turn has come, once all before it have."""
        with self._lock:
            queued.may_begin = True
            if self._is_beginning:
                return  # whoever is at it goes on with this one
            self._is_beginning = True
        while (ready := self._take_ready()) is not None:
            if self.is_stopped:
                ready.finish()
            else:
                ready.began = time.perf_counter()
                self._scheduler.submit(ready.pass_)

    def end(self, queued: QueuedStep) -> None:
        """Make way for what follows a step that has ended, or that will not begin."""
        now = time.perf_counter()
        queued.seconds = now - max(queued.began, self._last_ended)
        self._last_ended = now
        # Taken away, as this frame may be left only after the event loop has gone on.
        step, queued.step, queued.pass_.completion = queued.step, None, None
        assert step is not None, "it ends once"
        queued.is_done, queued.learning_rate = step.is_done, step.learning_rate
        if not step.is_done or queued.pass_.failures:
            self.is_stopped = True
            step.undo()
            if step.exchange is not None and step.exchange.has_begun:
                self.has_failed = True
                failures = queued.pass_.failures
                step.exchange.fail(failures[0][1] if failures else "its stream of steps was left")
        del step
        with self._lock:
            del self._steps[queued]
        passes.leave(queued.use)
        queued.told.finish()

    def _take_ready(self) -> QueuedStep | None:
        with self._lock:
            if self._next and self._next[0].may_begin:
                return self._next.popleft()
            self._is_beginning = False
            return None

    def _unless_stopped(self, function: Callable[[], Any]) -> Any:
        """Run a step of a single lane, unless one before it has failed."""
        if self.is_stopped:
            return None
        try:
            return function()
        except BaseException:
            self.is_stopped = True
            raise
