"""How a call goes over lanes: scatter, replicate, apply, gather."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .._replicas.lane_module import LaneModule, ModuleState
from .._replicas.order import Use, passes, wait_turn
from .._replicas.replica_set import ReplicaSet
from .._replicas.snapshot import ModuleSnapshot
from .._runtime import Lane, Runtime, Scheduler, Task
from .._runtime.ambient import Ambient
from .._runtime.passes import NextStage, Stage
from .._runtime.schedule import split_sizes
from .._runtime.task import driver_of
from .._verbs.batch import Batch
from .._verbs.gather import check_rows, gather_to
from .._verbs.inplace import SplitInputs
from .._verbs.moving import fetched, move, prefetched


class Route:
    """The lanes that calls of one module go over.

    Args:
        module: what to run.
        replicas: its replicas, one per lane.
        scheduler: the scheduler of the lanes.
        lanes: where to run.
        output: the device that results go to.
        dim: the dimension that is split and concatenated.
        training: the mode that all submodules run in; None for the one that each of them is in.
    """

    def __init__(
        self,
        module: nn.Module,
        replicas: ReplicaSet,
        scheduler: Scheduler,
        lanes: Sequence[Lane],
        output: torch.device,
        dim: int,
        training: bool | None = None,
    ) -> None:
        self.module = module
        self.replicas = replicas
        self.scheduler = scheduler
        self.lanes = tuple(lanes)
        self.output = output
        self.dim = dim
        self._training = training
        self.num_passes = 0
        self._counting = threading.Lock()  # loops and lanes count, each on a thread of its own

    def in_mode(self, training: bool) -> Route:
        """Make a route over the same lanes whose calls always run in one mode."""
        return Route(self.module, self.replicas, self.scheduler, self.lanes, self.output, self.dim, training)

    def parts(self) -> ModuleSnapshot:
        """Return what the module consists of now, in the route's own mode, if it has one."""
        return self.in_own_mode(self.replicas.snapshots.parts(self.module))

    def in_own_mode(self, snapshot: ModuleSnapshot) -> ModuleSnapshot:
        """Return a snapshot as if the module were in the route's own mode, if it has one."""
        return snapshot if self._training is None else snapshot.in_mode(self._training)

    def capture(self, *, records: bool | None = None) -> ModuleState:
        """Return the state of the module as it is now, but in the route's own mode, if it has one."""
        return self.replicas.capture(self.module, self._training, records=records)

    def count_pass(self) -> None:
        """Count a pass that succeeded."""
        with self._counting:
            self.num_passes += 1

    async def run_split(self, batch: Batch, num_lanes: int, state: ModuleState | None = None) -> Any:
        """Scatter, replicate, apply and gather on at most `num_lanes` lanes.

        All shards get the weights of one moment: no training step runs meanwhile. Only views are made on the
        calling thread; everything else happens on lanes.

        Args:
            batch: what to run.
            num_lanes: how many lanes at most.
            state: of the module at the call; None for now.
        """
        if batch.rows_over(num_lanes) is None:
            return await self.run_whole(batch, state)
        split_inputs = SplitInputs()
        suspects = self.scheduler.schedule.suspects
        if suspects:
            num_suspect = sum(lane._index in suspects for lane in self.lanes)
            num_lanes = max(1, min(num_lanes, len(self.lanes) - num_suspect))
        shards = batch.split(num_lanes, split_inputs)
        state = self.capture() if state is None else state
        use = Use(state.snapshot)
        try:
            ambient = None if passes.arrive(use) else await self._wait_turn(use)
            positions = self._positions(len(shards), state)
            lanes = list(map(self.lanes.__getitem__, positions))

            def apply_stage(modules: Sequence[LaneModule]) -> Stage:
                return [
                    Task(lane, partial(self._apply, batch, position, module, shard), "run", is_replica=True)
                    for lane, position, module, shard in zip(lanes, positions, modules, shards, strict=True)
                ]

            def gather_stage(outputs: Sequence[Any], last: Lane) -> Stage:
                function = partial(self.gather, outputs, batch, split_inputs)
                return [Task(self._gather_lane(last), function, "gather")]

            following: list[NextStage] = [gather_stage]
            # What had to wait may find another grad mode here than at its call.
            ready = self.replicas.prepare_nowait(state, positions) if ambient is None else None
            if ready is not None:
                stage = apply_stage(ready)
            else:
                first = positions[0] if suspects else 0
                prepare = partial(self._prepare, first, positions, state)
                stage = [Task(self.lanes[first], prepare, "replicate")]
                following.insert(0, lambda results, _: apply_stage(results[0]))
            num_threads = self.scheduler.thread_share(len(lanes))
            results = await self.scheduler.run(
                stage, following, num_threads=num_threads, ambient=ambient, lanes=self.lanes
            )
            return results[0]
        finally:
            passes.leave(use)

    async def _wait_turn(self, use: Use) -> Ambient:
        """Wait for the turn of a pass; return what was switched on at its call."""
        self.scheduler.check_open()
        ambient = self.scheduler.ambient()
        await wait_turn(use)
        return ambient

    def _prepare(self, position: int, positions: Sequence[int], state: ModuleState) -> list[LaneModule]:
        """Make the replicas of some lanes up to date, on the thread of the lane at `position`."""
        with self.replicas.readers[position]:
            return self.replicas.prepare(self.module, positions, state)

    def _apply(self, batch: Batch, position: int, module: Callable[..., Any], shard: list[Any]) -> Any:
        """Run one lane's shard, on its thread."""
        with self.replicas.readers[position]:
            return batch.apply(module, self.lanes[position].device, shard)

    async def run_whole(self, batch: Batch, state: ModuleState | None = None) -> Any:
        """Run a whole batch on the lane that `pick` picks."""
        state = self.capture() if state is None else state
        position = self.pick(state)
        task = Task(self.lanes[position], partial(self.run_whole_batch, position, batch, state), "run")
        num_threads = self.scheduler.thread_share(len(self.lanes))
        return (await self.scheduler.run([task], num_threads=num_threads))[0]

    async def run_whole_with_all_threads(self, batch: Batch, state: ModuleState | None = None) -> Any:
        """Run a whole batch on the first lane, with the intra-op threads of all lanes.

        While that lane is busy another one runs it, with its own share of the threads: no lane's thread
        count ever changes.
        """
        first = self.lanes[0]
        state = self.capture() if state is None else state
        if self.scheduler.least_busy(self.lanes)[0] is not first and not self._needs_first_lane(state):
            return await self.run_whole(batch, state)

        def whole() -> Any:
            with self.replicas.readers[0]:
                module = self.replicas.prepare(self.module, [0], state)[0]
                output = batch.apply(module, first.device, batch.leaves)
            if batch.num_rows is None:
                return move(output, self.output)
            return gather_to([output], self.output, self.dim)

        num_threads = self.scheduler.thread_share(1)
        return (await self.scheduler.run([Task(first, whole, "run")], num_threads=num_threads))[0]

    def pick(self, state: ModuleState | None = None) -> int:
        """Return the position of the lane for a whole batch: the least busy, or 0 if buffers change."""
        if len(self.lanes) == 1 or self._needs_first_lane(state):
            return 0
        return self.lanes.index(self.scheduler.least_busy(self.lanes)[0])

    def run_whole_batch(self, position: int, batch: Batch, state: ModuleState) -> Any:
        """Copy the inputs of a batch beside what the lane's device computes, if it can, and run it."""
        # Not into the batch, which may run again elsewhere.
        leaves = prefetched(batch.leaves, driver_of(self.lanes[position]))()
        return self.run_batch(position, batch, state, leaves)

    def run_batch(
        self, position: int, batch: Batch, state: ModuleState, leaves: list[Any] | None = None
    ) -> Any:
        """Run one whole batch on this thread; the module of a single lane is moved to its device.

        The output has its values once the lane's task is complete.

        Args:
            position: of the lane.
            batch: what to run.
            state: of the module, as it was at the call.
            leaves: those of the batch, as far as they have been copied.
        """
        lane = self.lanes[position]
        with self.replicas.readers[position]:
            moves = len(self.lanes) == 1
            module = self.replicas.prepare(self.module, [position], state, moves=moves)[0]
            args, kwargs = batch.arguments_on(lane.device, leaves or batch.leaves)
            output = module(*args, **kwargs)
        return fetched(output, driver_of(lane), self.output)

    def gather(self, outputs: Sequence[Any], batch: Batch, split_inputs: SplitInputs) -> Any:
        """Gather the outputs of a batch's shards, and end its forward."""
        num_rows = batch.num_rows
        if num_rows is not None:
            check_rows(outputs, split_sizes(num_rows, len(outputs)))
        output = gather_to(outputs, self.output, self.dim)
        split_inputs.end_forward(output)
        return output

    def _positions(self, count: int, state: ModuleState) -> list[int]:
        """Return the lanes for `count` shards. If buffers change, lane 0 must run: its own survive."""
        if count == len(self.lanes) or self._needs_first_lane(state):
            return list(range(count))
        return [self.lanes.index(lane) for lane in self.scheduler.least_busy(self.lanes, count)]

    def _needs_first_lane(self, state: ModuleState | None) -> bool:
        """Return whether forwards are likely to change what survives, which is lane 0's."""
        parts = self.parts() if state is None else self.in_own_mode(state.snapshot)
        return parts.updates_buffers or bool(self.replicas.written.known)

    def _gather_lane(self, last: Lane) -> Lane:
        """Return a lane on the output device: the one that ended last, if it is there."""
        if last.device == self.output:
            return last
        return next((lane for lane in self.lanes if lane.device == self.output), last)


class EngineLanes:
    """The lanes of an engine for whole batches, as `StatefulLaneRunner` describes them.

    Args:
        runtime: whose lanes these are.
        route: how calls go over them.

    Attributes:
        capture: returns the state of the module as it is now; called for every sample of a `Batcher`.
    """

    def __init__(self, runtime: Runtime, route: Route) -> None:
        self.runtime = runtime
        self.route = route
        self.capture = route.capture

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes to choose from."""
        return self.route.lanes

    def pick(self) -> int:
        """Return the position of the lane for the next batch: the least busy, or 0 if buffers change."""
        return self.route.pick()

    def run_on(self, position: int, /, *args: Any, **kwargs: Any) -> Any:
        """Run one whole batch on this thread, that of the lane at `position`, and count it."""
        return self.run_as(position, self.capture(), *args, **kwargs)

    def run_as(self, position: int, state: ModuleState, /, *args: Any, **kwargs: Any) -> Any:
        """Do what `run_on` does, in the state that the module had earlier."""
        result = self.route.run_batch(position, Batch(args, kwargs, self.route.dim), state)
        self.route.count_pass()
        return result
