"""Whole training steps, whose lanes each compute their own loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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
from .step import Step, recording


class Trainer:
    """Runs the training steps of one module, one after the other.

    Args:
        module: what to train.
        modules: its replicas for passes.
        scheduler: whose lanes these are.
        lanes: a step uses the first ones of them.
        output: where losses go.
    """

    def __init__(
        self,
        module: nn.Module,
        modules: ReplicaSet,
        scheduler: Scheduler,
        lanes: Sequence[Lane],
        output: torch.device,
    ) -> None:
        self._scheduler = scheduler
        self._lanes = lanes
        self._output = output
        self._replicas = TrainingLanes([lane.device for lane in lanes])
        self._accumulated = AccumulatedGradients(len(lanes))
        self._module = module
        self._modules = modules
        self._all_threads = scheduler.thread_share(1)
        self.num_steps = 0
        """Optimizer steps taken, including those whose caller was cancelled too late to stop them."""

    def capture(self) -> ModuleState:
        """Return the state of the module as it is now."""
        return self._modules.capture(self._module, records=True)

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
        shards, weights = _divide(batch, num_lanes, options.loss_reduction)
        lanes = self._lanes[: len(shards)]
        step = Step(
            state,
            self._modules,
            self._replicas,
            self._accumulated,
            lanes,
            batch,
            shards,
            weights,
            options,
            accumulate,
        )
        stage, following = self._stages(step, lanes)
        share = self._all_threads if len(lanes) == 1 else self._scheduler.thread_share(len(lanes))
        use = Use(state.snapshot, changes=True, optimizer=options.optimizer, loop=_loops.current())
        ambient = None
        try:
            if not passes.arrive(use):  # what has to wait must not find the state that torch has by then
                self._scheduler.check_open()
                ambient = self._scheduler.ambient()
                await wait_turn(use)
            started = time.perf_counter()
            results = await self._scheduler.run(stage, following, num_threads=share, ambient=ambient)
        except BaseException:
            step.undo()
            raise
        finally:
            passes.leave(use)
        if record is not None:
            record(time.perf_counter() - started)
        return results[0]  # type: ignore[no-any-return]

    def _stages(self, step: Step, lanes: Sequence[Lane]) -> tuple[Stage, Sequence[NextStage]]:
        if len(lanes) == 1:
            return [Task(lanes[0], partial(self._run_single_lane, step), "train", is_replica=True)], ()

        def last_stage(shares: list[Any], last: Lane) -> Stage:
            # The lane that is awake, if it can reach the first lane's tensors. But only the first lane
            # may have many threads: if the OpenMP threads of two lanes outnumber the cores, all their
            # waits become slow for good.
            is_able = last.device == lanes[0].device and not (step.takes_all_threads or step.needs_first_lane)
            lane = last if is_able else lanes[0]
            return [Task(lane, partial(self._finish, step, shares), "reduce")]

        stage = [
            Task(lane, partial(step.run_lane, index), "train", is_replica=True)
            for index, lane in enumerate(lanes)
        ]
        return stage, [last_stage]

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
        if step.accumulate:
            step.accumulate_gradients()
        else:
            step.commit(self._all_threads)
            self.num_steps += not step.options.reduce_only
        return loss


def _divide(batch: Batch, num_lanes: int, loss_reduction: str) -> tuple[list[list[Any]], list[float]]:
    """Return the shards of a batch, and the weight of each one's loss."""
    # With nothing to split, every lane would do the whole step.
    num_rows = batch.rows_over(num_lanes)
    if num_rows is None or num_lanes == 1:
        return [batch.leaves], [1.0]
    shards = batch.split(num_lanes)
    if loss_reduction == "sum" or num_rows == 0:
        return shards, [1.0] * len(shards)
    return shards, [size / num_rows for size in split_sizes(num_rows, len(shards))]
