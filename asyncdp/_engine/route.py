"""The way of a pass over lanes: scatter, replicate, apply, gather."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .._replicas.replica_set import LaneModule, ReplicaSet
from .._runtime import Lane, Scheduler, Task
from .._runtime.passes import NextStage, Stage
from .._verbs.gather import gather_to
from .._verbs.inplace import Wholes
from .._verbs.parallel_apply import apply, apply_and_move
from .._verbs.scatter import split_arguments


@dataclass(frozen=True)
class Route:
    """Which lanes the passes of a module take, and where their results go."""

    scheduler: Scheduler
    lanes: tuple[Lane, ...]
    output: torch.device
    dim: int

    async def run(
        self,
        module: nn.Module,
        replicas: ReplicaSet,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        num_lanes: int | None = None,
    ) -> Any:
        """Scatter, replicate, apply and gather on `num_lanes` lanes (all, if None).

        Only views are made on the calling thread; everything else happens on lanes.
        """
        most = len(self.lanes) if num_lanes is None else num_lanes
        wholes = Wholes()
        shards = split_arguments(args, kwargs, most, self.dim, wholes)
        positions = self._positions(len(shards), module, replicas)

        def apply_stage(modules: Sequence[LaneModule]) -> Stage:
            return [
                Task(
                    self.lanes[position],
                    partial(apply, each, shard[0], shard[1], self.lanes[position].device),
                    "run",
                    True,
                )
                for position, each, shard in zip(positions, modules, shards, strict=True)
            ]

        def gather_stage(outputs: Sequence[Any], last: Lane) -> Stage:
            return [Task(self._gather_lane(last), partial(self.gather, outputs, wholes), "gather")]

        num_threads = self.scheduler.thread_share(len(positions))
        following: list[NextStage] = [gather_stage]
        ready = replicas.prepare_nowait(module, positions)
        if ready is not None:
            stage = apply_stage(ready)
        else:
            stage = [Task(self.lanes[0], partial(replicas.prepare, module, positions), "replicate")]
            following.insert(0, lambda results, _: apply_stage(results[0]))
        outputs = await self.scheduler.run(stage, following, num_threads=num_threads, lanes=self.lanes)
        return outputs[0]

    async def run_on_one_lane(
        self,
        module: nn.Module,
        replicas: ReplicaSet,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run a whole batch on the lane that `pick` picks; a lone lane needs no replicas."""
        position = self.pick(module, replicas)
        run = partial(self.run_here, position, module, replicas, args, kwargs)
        return await self._run_task(Task(self.lanes[position], run, "run"), len(self.lanes))

    def pick(self, module: nn.Module, replicas: ReplicaSet) -> int:
        """The position of the lane for a whole batch: the least busy, or lane 0 where buffers change."""
        return self._positions(1, module, replicas)[0]

    def run_here(
        self,
        position: int,
        module: nn.Module,
        replicas: ReplicaSet,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run a whole batch on this thread, which is that of the lane at `position`.

        A lone lane runs the module itself, which moves to its device.
        """
        device = self.lanes[position].device
        each: Callable[..., Any]
        if len(self.lanes) == 1:
            each = module if replicas.snapshots.parts(module).is_on(device) else module.to(device)
        else:
            each = replicas.prepare(module, [position])[0]
        return apply_and_move(each, args, kwargs, device, self.output)

    async def run_whole(
        self, module: nn.Module, replicas: ReplicaSet, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run a whole batch on one lane with all the machine's intra-op threads.

        The first lane runs the module itself where it can. While that lane is busy another one works,
        with its own share of the threads: no lane's thread count ever changes.
        """
        lane = self.scheduler.least_busy(self.lanes)[0]
        if lane is not self.lanes[0] and not replicas.snapshots.parts(module).updates_buffers:
            return await self.run_on_one_lane(module, replicas, args, kwargs)
        lane = self.lanes[0]

        def whole() -> Any:
            parts = replicas.snapshots.parts(module)
            is_able = parts.is_on(lane.device) and not parts.moves_weights(lane.device)
            runner = module if is_able else replicas.prepare(module, [0])[0]
            return gather_to([apply(runner, args, kwargs, lane.device)], self.output, self.dim)

        return await self._run_task(Task(lane, whole, "run"), 1)

    async def _run_task(self, task: Task, num_lanes: int) -> Any:
        num_threads = self.scheduler.thread_share(num_lanes)
        return (await self.scheduler.run([task], num_threads=num_threads))[0]

    def _positions(self, count: int, module: nn.Module, replicas: ReplicaSet) -> list[int]:
        """Which lanes run `count` shards. Where buffers change, lane 0 is needed: its own survive."""
        if count == len(self.lanes) or replicas.snapshots.parts(module).updates_buffers:
            return list(range(count))
        chosen = self.scheduler.least_busy(self.lanes, count)
        return [self.lanes.index(lane) for lane in chosen]

    def gather(self, outputs: Sequence[Any], wholes: Wholes) -> Any:
        """Put the outputs of a pass's shards together, and end its forward."""
        whole = gather_to(outputs, self.output, self.dim)
        wholes.end_forward(whole)
        return whole

    def _gather_lane(self, last: Lane) -> Lane:
        """A lane on the output device, the one that is awake already if it is one."""
        if last.device == self.output:
            return last
        return next((lane for lane in self.lanes if lane.device == self.output), last)
