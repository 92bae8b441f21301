"""The four verbs composed: scatter, replicate, apply, gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ._devices import DeviceLike, Devices, parse_devices
from ._gather import gather_to
from ._parallel_apply import apply, apply_and_move, arguments
from ._replica_set import LaneModule, ReplicaSet, replica_set_of, updates_buffers
from ._runtime import Lane, Runtime, RuntimeStatistics, default_runtime
from ._runtime.passes import NextStage, Stage
from ._scatter import split_arguments
from .errors import NotAModuleError


async def data_parallel(
    module: nn.Module,
    inputs: Any,
    devices: Devices = None,
    output_device: DeviceLike | None = None,
    dim: int = 0,
    *,
    module_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Run a module on a batch split over several devices.

    The module's replicas are kept for as long as the module lives, so that calling this in a loop
    copies nothing again.

    Args:
        module: what to run. Its forward may get fewer rows per call than the batch has.
        inputs: a tuple holds positional arguments, anything else is the only one; nested at will.
        devices: one lane per entry; see `parse_devices`.
        output_device: where the result goes; the first of `devices` if None.
        dim: dimension of inputs and outputs that is split and put together again.
        module_kwargs: keyword arguments, split like the inputs.

    Returns:
        What `module` would return for the whole batch, on `output_device`. With gradients enabled it
        leads them back to inputs and parameters.

    Raises:
        NotAModuleError, LazyModuleError, UnsupportedModuleError: the module cannot be replicated.
        UnknownDeviceError, NoCudaDeviceError, NoDevicesError: a device cannot be used.
        LengthMismatchError: inputs differ in length along `dim`.
        GatherError: outputs of the shards do not fit together.
        BaseException: the first exception in time that a replica raised, after all have ended.
    """
    if not isinstance(module, nn.Module):
        raise NotAModuleError(module)
    targets = parse_devices(devices)
    output = targets[0] if output_device is None else parse_devices(output_device)[0]
    runtime = default_runtime()
    route = Route(runtime, tuple(runtime.lanes_for(targets)), output, dim)
    args, kwargs = arguments(inputs), dict(module_kwargs or {})
    if len(targets) == 1:
        return await route.run_in_place(module, args, kwargs)
    return await route.run(module, replica_set_of(module, targets), args, kwargs)


@dataclass(frozen=True)
class Route:
    """Which lanes the passes of a module take, and where their results go."""

    runtime: Runtime
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
        shards = split_arguments(args, kwargs, most, self.dim)
        positions = self._positions(len(shards), module)

        def apply_stage(modules: Sequence[LaneModule]) -> Stage:
            return [
                (self.lanes[position], partial(apply, each, shard[0], shard[1], self.lanes[position].device))
                for position, each, shard in zip(positions, modules, shards, strict=True)
            ]

        def gather_stage(outputs: Sequence[Any], last: Lane) -> Stage:
            return [(self._gather_lane(last), partial(gather_to, outputs, self.output, self.dim))]

        num_threads = self.runtime.thread_share(len(positions))
        ready = replicas.prepare_nowait(module, positions)
        if ready is not None:
            following: list[NextStage] = [gather_stage]
            stage = apply_stage(ready)
        else:
            following = [lambda results, _: apply_stage(results[0]), gather_stage]
            stage = [(self.lanes[0], partial(replicas.prepare, module, positions))]
        return (await self.runtime.run_pass(stage, following, num_threads=num_threads))[0]

    async def run_on_one_lane(
        self, module: nn.Module, replicas: ReplicaSet, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run a whole batch on the least busy lane."""
        lane = self.runtime.least_busy(self.lanes)[0]
        position = self.lanes.index(lane)

        def whole() -> Any:
            each = replicas.prepare(module, [position])[0]
            return apply_and_move(each, args, kwargs, lane.device, self.output)

        return await self.runtime.run(
            whole, lane=lane, num_threads=self.runtime.thread_share(len(self.lanes))
        )

    async def run_in_place(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Move the module itself to the only lane's device and run it there."""
        lane = self.lanes[0]

        def whole() -> Any:
            module.to(lane.device)
            return apply_and_move(module, args, kwargs, lane.device, self.output)

        return await self.runtime.run(whole, lane=lane, num_threads=self.runtime.thread_share(1))

    def _positions(self, count: int, module: nn.Module) -> list[int]:
        """Which lanes run `count` shards. Where buffers change, lane 0 is needed: its own survive."""
        if count == len(self.lanes) or updates_buffers(module):
            return list(range(count))
        chosen = self.runtime.least_busy(self.lanes, count)
        return [self.lanes.index(lane) for lane in chosen]

    def _gather_lane(self, last: Lane) -> Lane:
        """A lane on the output device, the one that is awake already if it is one."""
        if last.device == self.output:
            return last
        return next((lane for lane in self.lanes if lane.device == self.output), last)


@dataclass(frozen=True)
class DataParallelStatistics:
    """An engine at one moment."""

    num_passes: int
    """Passes that ended well."""
    num_lanes: int
    runtime: RuntimeStatistics


class DataParallel:
    """A module with persistent replicas on several lanes.

    An async context manager. Replicas that share the module's device share its parameters, so that
    nothing is copied; changes of the module are noticed at the next call.

    Args:
        module: what to run.
        devices: one lane per entry; see `parse_devices`. With `runtime` given, which of its lanes.
        output_device: where results go; the first lane's device if None.
        dim: dimension of inputs and outputs that is split and put together again.
        num_lanes: how many lanes a call is split over: "all", a number, or "auto".
        runtime: run on these lanes instead of on own ones. It is not closed with the engine.

    Raises:
        NotAModuleError, LazyModuleError, UnsupportedModuleError: the module cannot be replicated.
        UnknownDeviceError, NoCudaDeviceError, NoDevicesError: a device cannot be used.
        ValueError: `num_lanes` is none of the above.
    """

    def __init__(
        self,
        module: nn.Module,
        devices: Devices = None,
        output_device: DeviceLike | None = None,
        dim: int = 0,
        *,
        num_lanes: int | str = "auto",
        runtime: Runtime | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise NotAModuleError(module)
        output = None if output_device is None else parse_devices(output_device)[0]
        self._owns_runtime = runtime is None
        self.runtime = Runtime(devices) if runtime is None else runtime
        lanes = self._choose_lanes(devices)
        self.module = module
        self._num_lanes = _check_num_lanes(num_lanes, len(lanes))
        self._route = Route(self.runtime, lanes, lanes[0].device if output is None else output, dim)
        self._replicas = ReplicaSet(module, [lane.device for lane in lanes])
        self._num_passes = 0

    def _choose_lanes(self, devices: Devices) -> tuple[Lane, ...]:
        if self._owns_runtime or devices is None:
            return self.runtime.lanes
        return tuple(self.runtime.lanes_for(parse_devices(devices)))

    def __repr__(self) -> str:
        names = ", ".join(lane.name for lane in self._route.lanes)
        return f"<DataParallel {type(self.module).__name__} on [{names}]: {self._num_passes} passes done>"

    async def __aenter__(self) -> DataParallel:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Drain what runs and end the lanes, if they are the engine's own."""
        if self._owns_runtime:
            await self.runtime.aclose()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on one batch, split over the lanes.

        Returns, raises: as `asyncdp.data_parallel`.
        """
        if len(self._route.lanes) == 1:
            result = await self._route.run_in_place(self.module, args, kwargs)
        else:
            result = await self._route.run(self.module, self._replicas, args, kwargs, self._num_lanes)
        self._num_passes += 1
        return result

    async def on_one_lane(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on one whole batch, on whichever lane is least busy.

        For many independent batches this beats splitting each of them: keep several calls in flight.

        Returns, raises: as `asyncdp.data_parallel`.
        """
        result = await self._route.run_on_one_lane(self.module, self._replicas, args, kwargs)
        self._num_passes += 1
        return result

    def refresh(self) -> None:
        """Notice changes made behind autograd's back (`parameter.data.add_(...)`) at the next call.

        Needed only for lanes on another device than the module's.
        """
        self._replicas.refresh()

    def statistics(self) -> DataParallelStatistics:
        """A snapshot of the engine and its runtime."""
        return DataParallelStatistics(self._num_passes, len(self._route.lanes), self.runtime.statistics())


def _check_num_lanes(num_lanes: int | str, available: int) -> int:
    if num_lanes in ("auto", "all"):
        return available
    if isinstance(num_lanes, bool) or not isinstance(num_lanes, int) or not 1 <= num_lanes <= available:
        raise ValueError(
            f'num_lanes must be "auto", "all" or a number from 1 to {available}, but got {num_lanes!r}. '
            "Name more devices to get more lanes."
        )
    return num_lanes
