"""Whole training steps, whose lanes each compute their own loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _loops
from .._replicas.lane_module import ModuleState
from .._replicas.order import Use, passes, wait_turn
from .._replicas.replica_set import ReplicaSet
from .._runtime import Lane, Scheduler, Task
from .._runtime.passes import NextStage, Stage
from .._runtime.schedule import split_sizes
from .._runtime.task import begin_stage
from .._verbs.batch import Batch
from .commit import AccumulatedGradients, StepOptions
from .lanes import TrainingLanes
from .processes import SharedSteps
from .shared_step import SharedStep
from .step import Piece, Step, recording

Bring = Callable[[Lane, list[Any]], Callable[[], list[Any]]]
"""Begins to copy leaves to a lane's device; the task there gets them by calling the result once."""


class StepPlan(NamedTuple):
    """A step, and what its lanes have to run for it."""

    step: Step
    state: ModuleState
    lanes: Sequence[Lane]
    stage: Stage
    following: Sequence[NextStage]
    num_threads: int

    def use(self, loop: _loops.Loop, lane: Lane | None = None) -> Use:
        """Return what the step does to the module; `lane` puts steps that run on it alone in order itself."""
        optimizer = self.step.options.optimizer
        return Use(self.state.snapshot, changes=True, optimizer=optimizer, loop=loop, lane=lane)


class Trainer:
    """Runs the training steps of one module, one after the other.

    Args:
        module: what to train.
        modules: its replicas for passes.
        scheduler: whose lanes these are.
        lanes: a step uses the first ones of them.
        output: where losses go.
        shared: makes this process's part in steps that several processes take together; None for one process.
    """

    def __init__(
        self,
        module: nn.Module,
        modules: ReplicaSet,
        scheduler: Scheduler,
        lanes: Sequence[Lane],
        output: torch.device,
        shared: SharedSteps | None = None,
    ) -> None:
        self.shared = shared
        self.scheduler = scheduler
        self._lanes = lanes
        self._output = output
        self._replicas = TrainingLanes([lane.device for lane in lanes])
        self._accumulated = AccumulatedGradients(len(lanes))
        self._module = module
        self._modules = modules
        self._all_threads = scheduler.thread_share(1)
        self.num_steps = 0
        """Optimizer steps taken, including those whose caller was cancelled too late to stop them."""

    def capture(self, training: list[bool] | None = None) -> ModuleState:
        """Return the state of the module as it is now, but in the modes of an earlier one, if given."""
        state = self._modules.capture(self._module, records=True)
        if training is None or len(training) != len(state.training):
            return state
        return state._replace(training=training)

    async def step(
        self,
        batch: Batch,
        options: StepOptions,
        num_lanes: int,
        state: ModuleState,
        *,
        accumulate: bool,
        record: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Take one step; see `DataParallel.train_step`. `record` gets its duration in seconds."""
        plan = self.plan([batch], options, num_lanes, state, accumulate=accumulate)
        exchange = plan.step.exchange
        if exchange is not None:
            exchange.take_number()
        use = plan.use(_loops.current())
        ambient = None
        try:
            if not passes.arrive(use):  # what has to wait must not find the state that torch has by then
                self.scheduler.check_open()
                ambient = self.scheduler.ambient()
                await wait_turn(use)
            started = time.perf_counter()
            results = await self.scheduler.run(
                plan.stage, plan.following, num_threads=plan.num_threads, ambient=ambient
            )
        except BaseException as error:
            plan.step.undo()
            if exchange is not None:
                exchange.fail("its caller was cancelled" if _loops.ends_tasks(error) else error)
            raise
        finally:
            passes.leave(use)
        if record is not None:
            record(time.perf_counter() - started)
        return results[0]  # type: ignore[no-any-return]

    def plan(
        self,
        batches: Sequence[Batch],
        options: StepOptions,
        num_lanes: int,
        state: ModuleState,
        *,
        accumulate: bool = False,
        bring: Bring | None = None,
    ) -> StepPlan:
        """Divide a step over lanes; nothing runs yet.

        Args:
            batches: make up the step together, as if they were one with all their rows.
            options: what the user said.
            num_lanes: the most that each of them is split over.
            state: the module's, as of the call.
            accumulate: accumulate the gradients instead of stepping.
            bring: begins to copy the leaves of a shard to its lane's device.
        """
        pieces = _divide(batches, num_lanes, options.loss_reduction, self._lanes, bring)
        lanes = self._lanes[: len(pieces)]
        parts = state, self._modules, self._replicas, self._accumulated, lanes, pieces, options, accumulate
        if self.shared is None:
            step = Step(*parts)
        else:
            exchange = self.shared.exchange(batches, options, state, accumulate=accumulate)
            step = SharedStep(exchange, self.shared.communicator, *parts)
        stage, following = self._stages(step, lanes)
        share = self._all_threads if len(lanes) == 1 else self.scheduler.thread_share(len(lanes))
        return StepPlan(step, state, lanes, stage, following, share)

    def _stages(self, step: Step, lanes: Sequence[Lane]) -> tuple[Stage, Sequence[NextStage]]:
        run = step.run if isinstance(step, SharedStep) else None
        if len(lanes) == 1:
            single = partial(self._run_single_lane, step)
            return [Task(lanes[0], partial(run, single) if run else single, "train", is_replica=True)], ()

        def last_stage(shares: list[Any], last: Lane) -> Stage:
            # The lane that is awake, if it can reach the first lane's tensors. But only the first lane
            # may have many threads: if the OpenMP threads of two lanes outnumber the cores, all their
            # waits become slow for good.
            is_able = last.device == lanes[0].device and not (step.takes_all_threads or step.needs_first_lane)
            lane = last if is_able else lanes[0]
            finish = partial(self._finish, step, shares)
            return [Task(lane, partial(run, finish) if run else finish, "reduce")]

        functions: list[Callable[[], Any]] = [partial(step.run_lane, index) for index in range(len(lanes))]
        if run:
            functions = [partial(run, function) for function in functions]
        return [
            Task(lane, function, "train", is_replica=True)
            for lane, function in zip(lanes, functions, strict=True)
        ], [last_stage]

    def _run_single_lane(self, step: Step) -> Tensor | None:
        """Run a whole step on the thread of its only lane; return None if it was cancelled meanwhile."""
        with recording():
            share = step.compute_in_place()
            if share is None:
                share = step.compute(0)
            return self._end(step, [share]) if begin_stage() else None

    def discard_accumulated(self) -> None:
        """Discard the gradients of steps under `no_sync`."""
        self._accumulated.clear()

    def _finish(self, step: Step, shares: Sequence[Tensor]) -> Tensor:
        """Sum the loss once every lane has succeeded, and save the gradients or step with them."""
        with recording():
            return self._end(step, shares)

    def _end(self, step: Step, shares: Sequence[Tensor]) -> Tensor:
        loss = shares[0].to(self._output)
        for other in shares[1:]:
            loss = loss + other.to(self._output)
        if isinstance(step, SharedStep):
            loss = step.settle(loss)
        if step.accumulate:
            step.accumulate_gradients()
        else:
            try:
                step.commit(self._all_threads)
            finally:
                self.num_steps += step.is_done and not step.options.reduce_only
        return loss


def _divide(
    batches: Sequence[Batch],
    num_lanes: int,
    loss_reduction: str,
    lanes: Sequence[Lane],
    bring: Bring | None,
) -> list[list[Piece]]:
    """Return what each lane computes of some batches, and the weight of each part's loss."""
    pieces: list[list[Piece]] = [[]]
    if len(batches) > 1:  # a mean over no rows is none, and batch norm refuses them
        batches = [batch for batch in batches if batch.rows_if_any != 0] or batches[:1]
    parts = _parts(batches, loss_reduction)
    for batch, part in zip(batches, parts, strict=True):
        for position, (leaves, weight) in enumerate(_split(batch, num_lanes, loss_reduction)):
            if position == len(pieces):
                pieces.append([])
            take = None if bring is None else bring(lanes[position], leaves)
            pieces[position].append(Piece(batch, leaves, weight * part, take))
    return pieces


def _parts(batches: Sequence[Batch], loss_reduction: str) -> list[float]:
    """Return each batch's part in the loss of the step: by their rows, if all have some."""
    if len(batches) <= 1 or loss_reduction == "sum":
        return [1.0] * len(batches)
    rows = [batch.rows_if_any or 0 for batch in batches]
    if not any(rows) or any(batch.rows_if_any is None for batch in batches):
        return [1.0 / len(batches)] * len(batches)
    return [count / sum(rows) for count in rows]


def _split(batch: Batch, num_lanes: int, loss_reduction: str) -> Iterator[tuple[list[Any], float]]:
    """Yield the leaves of each shard of a batch, and the weight of its loss."""
    # With nothing to split, every lane would do the whole step.
    num_rows = batch.rows_over(num_lanes)
    if num_rows is None or num_lanes == 1:
        yield batch.leaves, 1.0
        return
    shards = batch.split(num_lanes)
    for leaves, size in zip(shards, split_sizes(num_rows, len(shards)), strict=True):
        yield leaves, 1.0 if loss_reduction == "sum" or num_rows == 0 else size / num_rows
