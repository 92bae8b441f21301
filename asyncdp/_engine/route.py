"""How a call goes over lanes: scatter, replicate, apply, gather."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .._replicas.replica_set import LaneModule, ReplicaSet, updates_buffers
from .._replicas.snapshot import is_on, moves_weights
from .._runtime import Lane, LaneState, Runtime, Scheduler, Task
from .._runtime.passes import NextStage, Stage
from .._verbs.batch import Batch, move
from .._verbs.gather import gather_to
from .._verbs.inplace import SplitInputs


class Route:
    """The lanes that calls of one module go over.

    Args:
        module: what to run.
        replicas: its replicas, one per lane; a single lane uses none.
        scheduler: the scheduler of the lanes.
        lanes: where to run.
        output: the device that results go to.
        dim: the dimension that is split and concatenated.
    """

    def __init__(
        self,
        module: nn.Module,
        replicas: ReplicaSet,
        scheduler: Scheduler,
        lanes: Sequence[Lane],
        output: torch.device,
        dim: int,
    ) -> None:
        self.module = module
        self.replicas = replicas
        self.scheduler = scheduler
        self.lanes = tuple(lanes)
        self.output = output
        self.dim = dim
        self.num_passes = 0
        self._counting = threading.Lock()  # loops and lanes count, each on a thread of its own

    def count_pass(self) -> None:
        """Count a pass that succeeded."""
        with self._counting:
            self.num_passes += 1

    async def run_split(self, batch: Batch, num_lanes: int) -> Any:
        """Scatter, replicate, apply and gather on at most `num_lanes` lanes.

        Only views are made on the calling thread; everything else happens on lanes.
        """
        split_inputs = SplitInputs()
        suspects = [lane for lane in self.lanes if lane.state is LaneState.SUSPECT]
        shards = batch.split(max(1, min(num_lanes, len(self.lanes) - len(suspects))), split_inputs)
        positions = self._positions(len(shards))
        lanes = list(map(self.lanes.__getitem__, positions))

        def apply_stage(modules: Sequence[LaneModule]) -> Stage:
            return [
                Task(lane, partial(batch.apply, module, lane.device, shard), "run", is_replica=True)
                for lane, module, shard in zip(lanes, modules, shards, strict=True)
            ]

        def gather_stage(outputs: Sequence[Any], last: Lane) -> Stage:
            return [Task(self._gather_lane(last), partial(self.gather, outputs, split_inputs), "gather")]

        following: list[NextStage] = [gather_stage]
        ready = self.replicas.prepare_nowait(self.module, positions)
        if ready is not None:
            stage = apply_stage(ready)
        else:
            prepare = partial(self.replicas.prepare, self.module, positions)
            stage = [Task(lanes[0] if suspects else self.lanes[0], prepare, "replicate")]
            following.insert(0, lambda results, _: apply_stage(results[0]))
        num_threads = self.scheduler.thread_share(len(lanes))
        results = await self.scheduler.run(stage, following, num_threads=num_threads, lanes=self.lanes)
        return results[0]

    async def run_whole(self, batch: Batch) -> Any:
        """Run a whole batch on the lane that `pick` picks."""
        position = self.pick()
        task = Task(self.lanes[position], partial(self.run_batch, position, batch), "run")
        num_threads = self.scheduler.thread_share(len(self.lanes))
        return (await self.scheduler.run([task], num_threads=num_threads))[0]

    async def run_whole_with_all_threads(self, batch: Batch) -> Any:
        """Run a whole batch on the first lane, with the intra-op threads of all lanes.

        While that lane is busy another one runs it, with its own share of the threads: no lane's thread
        count ever changes.
        """
        first = self.lanes[0]
        if self.scheduler.least_busy(self.lanes)[0] is not first and not updates_buffers(self.module):
            return await self.run_whole(batch)

        def whole() -> Any:
            is_ready = is_on(self.module, first.device) and not moves_weights(self.module, first.device)
            module = self.module if is_ready else self.replicas.prepare(self.module, [0])[0]
            output = batch.apply(module, first.device, batch.leaves)
            return gather_to([output], self.output, self.dim)

        num_threads = self.scheduler.thread_share(1)
        return (await self.scheduler.run([Task(first, whole, "run")], num_threads=num_threads))[0]

    def pick(self) -> int:
        """Return the position of the lane for a whole batch: the least busy, or 0 if buffers change."""
        if len(self.lanes) == 1 or updates_buffers(self.module):
            return 0
        return self.lanes.index(self.scheduler.least_busy(self.lanes)[0])

    def run_batch(self, position: int, batch: Batch) -> Any:
        """Run one whole batch on this thread; a single lane runs the module itself, moved to its device."""
        device = self.lanes[position].device
        module: Callable[..., Any]
        if len(self.lanes) == 1:
            module = self.module if is_on(self.module, device) else self.module.to(device)
        else:
            module = self.replicas.prepare(self.module, [position])[0]
        args, kwargs = batch.arguments_on(device, batch.leaves)
        return move(module(*args, **kwargs), self.output)

    def gather(self, outputs: Sequence[Any], split_inputs: SplitInputs) -> Any:
        """Gather the outputs of a pass's shards, and end its forward."""
        output = gather_to(outputs, self.output, self.dim)
        split_inputs.end_forward(output)
        return output

    def _positions(self, count: int) -> list[int]:
        """Return the lanes for `count` shards. If buffers change, lane 0 must run: its own survive."""
        if count == len(self.lanes) or updates_buffers(self.module):
            return list(range(count))
        return [self.lanes.index(lane) for lane in self.scheduler.least_busy(self.lanes, count)]

    def _gather_lane(self, last: Lane) -> Lane:
        """Return a lane on the output device: the one that ended last, if it is there."""
        if last.device == self.output:
            return last
        return next((lane for lane in self.lanes if lane.device == self.output), last)


@dataclass(frozen=True)
class EngineLanes:
    """The lanes of an engine for whole batches, as `LaneRunner` describes them."""

    runtime: Runtime
    route: Route

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes to choose from."""
        return self.route.lanes

    def pick(self) -> int:
        """Return the position of the lane for the next batch: the least busy, or 0 if buffers change."""
        return self.route.pick()

    def run_on(self, position: int, /, *args: Any, **kwargs: Any) -> Any:
        """Run one whole batch on this thread, that of the lane at `position`, and count it."""
        result = self.route.run_batch(position, Batch(args, kwargs, self.route.dim))
        self.route.count_pass()
        return result
