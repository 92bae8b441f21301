"""Training: an awaitable backward, and whole steps whose lanes each compute their own loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio
import torch
from torch import Tensor, nn

from .. import _tree
from .._replicas.snapshot import LatestSnapshot, ModuleSnapshot
from .._runtime import Lane, Scheduler, Task
from .._runtime.passes import NextStage, Stage
from .._runtime.task import begin_stage
from .._verbs.parallel_apply import arguments
from .._verbs.scatter import split
from .commit import AccumulatedGradients, StepOptions
from .lanes import TrainingLanes
from .step import Shard, Step, recording


class Trainer:
    """Runs the training steps of one module, one after the other.

    Args:
        module: what to train.
        scheduler: whose lanes these are.
        lanes: a step uses the first ones of them.
        output: where losses go.
        dim: the dimension that is split.
    """

    def __init__(
        self, module: nn.Module, scheduler: Scheduler, lanes: Sequence[Lane], output: torch.device, dim: int
    ) -> None:
        self._scheduler = scheduler
        self._lanes = lanes
        self._output = output
        self._dim = dim
        self._replicas = TrainingLanes([lane.device for lane in lanes])
        self._accumulated = AccumulatedGradients(len(lanes))
        self._module = module
        self._all_threads = scheduler.thread_share(1)
        self._snapshots = LatestSnapshot()
        self._one_at_a_time = anyio.Lock(fast_acquire=True)
        self.num_steps = 0
        """Optimizer steps taken, also those whose caller was cancelled too late to hold them up."""

    def snapshot(self) -> ModuleSnapshot:
        """Return what the module consists of now."""
        return self._snapshots.current(self._module)

    async def step(
        self,
        inputs: Any,
        targets: Any,
        options: StepOptions,
        num_lanes: int,
        snapshot: ModuleSnapshot,
        *,
        accumulate: bool,
        record: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Take one step; see `DataParallel.train_step`. `record` gets the seconds that it took."""
        shards, num_rows = _divide(inputs, targets, num_lanes, self._dim)
        is_weighed = len(shards) > 1 and options.loss_reduction == "mean"
        weights = _weights(num_rows) if is_weighed else [1.0] * len(shards)
        lanes = self._lanes[: len(shards)]
        step = Step(snapshot, self._replicas, self._accumulated, lanes, shards, weights, options, accumulate)
        stage, following = self._stages(step, lanes)
        share = self._all_threads if len(lanes) == 1 else self._scheduler.thread_share(len(lanes))
        if not self._one_at_a_time.locked():
            self._one_at_a_time.acquire_nowait()
            ambient = None
        else:  # a step that has to wait must not find the state that torch has by then
            # In a forked child the step that it waits for never ends.
            self._scheduler.check_open()
            ambient = self._scheduler.ambient()
            await self._one_at_a_time.acquire()
        started = time.perf_counter()
        try:
            results = await self._scheduler.run(stage, following, num_threads=share, ambient=ambient)
        except BaseException:
            step.undo()
            raise
        finally:
            self._one_at_a_time.release()
        if record is not None:
            record(time.perf_counter() - started)
        return results[0]  # type: ignore[no-any-return]

    def _stages(self, step: Step, lanes: Sequence[Lane]) -> tuple[Stage, Sequence[NextStage]]:
        if len(lanes) == 1:
            return [Task(lanes[0], partial(self._run_alone, step), "train", True)], ()

        def last_stage(shares: list[Any], last: Lane) -> Stage:
            # The lane that is awake already, if it can reach the first lane's tensors. But only the
            # first lane ever has many threads: OpenMP threads of two lanes together outnumber the
            # cores, and the waits of all of them get slow for good.
            is_able = last.device == lanes[0].device and not (step.takes_all_threads or step.needs_first_lane)
            lane = last if is_able else lanes[0]
            return [Task(lane, partial(self._finish, step, shares), "reduce")]

        stage = [Task(lane, partial(step.run_lane, index), "train", True) for index, lane in enumerate(lanes)]
        return stage, [last_stage]

    def _run_alone(self, step: Step) -> Tensor | None:
        """A whole step on this thread, that of its only lane; None if it was cancelled on the way."""
        with recording():
            share = step.compute_in_place()
            if share is None:
                share = step.compute(0)
            return self._end(step, [share]) if begin_stage() else None

    def discard_accumulated(self) -> None:
        """Forget the gradients of steps under `no_sync`."""
        self._accumulated.clear()

    def _finish(self, step: Step, shares: Sequence[Tensor]) -> Tensor:
        """After every lane has succeeded: add up the loss, and keep the gradients or step with them."""
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


def _divide(inputs: Any, targets: Any, num_lanes: int, dim: int) -> tuple[list[Shard], list[int | None]]:
    """Each lane's positional arguments and targets, and the length of each along `dim`."""
    if num_lanes == 1 and _is_plain(inputs, targets, dim):
        return [((inputs,), targets)], [inputs.shape[dim]]
    shards: list[Shard] = split(_as_data((arguments(inputs), targets)), num_lanes, dim)
    num_rows = [count_rows(shard, dim) for shard in shards]
    if None in num_rows:  # nothing to split: every lane would do the whole work
        return shards[:1], [None]
    return shards, num_rows


def _is_plain(inputs: Any, targets: Any, dim: int) -> bool:
    """Whether a batch is two tensors of one length and nothing else, as most are: no need of trees."""
    return (
        isinstance(inputs, Tensor)
        and isinstance(targets, Tensor)
        and not (inputs.requires_grad or targets.requires_grad)
        and -inputs.dim() <= dim < inputs.dim()
        and -targets.dim() <= dim < targets.dim()
        and inputs.shape[dim] == targets.shape[dim]
    )


def _as_data(batch: Any) -> Any:
    """A batch that no gradient leads back to: the lanes' backwards would race for it."""
    leaves, spec = _tree.flatten(batch)
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        return batch
    return _tree.unflatten(spec, [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def count_rows(tree: Any, dim: int) -> int | None:
    """The length along `dim` of the first tensor that has one; None if none has."""
    for leaf in _tree.flatten(tree)[0]:
        if isinstance(leaf, Tensor) and -leaf.dim() <= dim < leaf.dim():
            return leaf.shape[dim]
    return None


def _weights(num_rows: Sequence[int | None]) -> list[float]:
    """Each shard's part of the batch's mean."""
    known = [count or 0 for count in num_rows]
    total = sum(known)
    if total == 0:
        return [1.0] * len(known)
    return [count / total for count in known]
