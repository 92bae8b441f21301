"""Run modules side by side, each on its own lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import _tree
from .._checks import check_list, shown
from .._devices import Devices, parse_devices
from .._runtime import Lane, Scheduler, Task, default_lanes, default_runtime, scheduler_of
from ..errors import CountMismatchError, NotAModuleError
from .batch import Batch, positional
from .moving import move


async def parallel_apply(
    modules: Sequence[nn.Module],
    inputs: Sequence[Any],
    *,
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    devices: Devices = None,
) -> list[Any]:
    """Call each module with its own input, all at the same time.

    Args:
        modules: one per input.
        inputs: a tuple holds positional arguments, anything else is the only one.
        kwargs: keyword arguments for each module.
        devices: one per module; inputs and outputs are moved there. If None, every module runs where
            the first tensor of its input is, on the default lanes if that is the CPU.

    Returns:
        One output per module.

    Raises:
        CountMismatchError: the sequences differ in length.
        NotAModuleError: one of the modules is none.
        BaseException: the first exception in time that a module raised, after all have ended.
    """
    named = None if devices is None else parse_devices(devices)
    _check_counts(modules, inputs, kwargs, named)
    if not modules:
        return []
    targets = named if named is not None else [_device_of(each) for each in inputs]
    scheduler, lanes = default_lanes(named) if named is not None else _lanes_in_turn(targets)
    every_kwargs = kwargs if kwargs is not None else [{}] * len(modules)
    batches = [
        Batch(positional(each), keywords, dim=0) for each, keywords in zip(inputs, every_kwargs, strict=True)
    ]
    stage = [
        Task(lane, partial(apply_and_move, batch, module, device), "run", is_replica=True)
        for lane, module, batch, device in zip(lanes, modules, batches, targets, strict=True)
    ]
    return await scheduler.run(stage, num_threads=scheduler.thread_share(len(set(lanes))))


def apply_and_move(batch: Batch, module: nn.Module, device: torch.device) -> Any:
    """Call a module on a lane, and move the output to the lane's device, wherever it was made."""
    return move(batch.apply(module, device, batch.leaves), device)


def _check_counts(
    modules: Sequence[nn.Module],
    inputs: Sequence[Any],
    kwargs: Sequence[Mapping[str, Any]] | None,
    devices: Sequence[torch.device] | None,
) -> None:
    for name, given in (("modules", modules), ("inputs", inputs), ("kwargs", kwargs)):
        if given is not None or name != "kwargs":
            check_list(name, given, sized=True)
    for each in kwargs or ():
        if not isinstance(each, Mapping):
            raise TypeError(f"an entry of kwargs must be a dict, but got {shown(each)}.")
    for module in modules:
        if not isinstance(module, nn.Module):
            raise NotAModuleError(module)
    for what, given in (("inputs", inputs), ("kwargs", kwargs), ("devices", devices)):
        if given is not None and len(given) != len(modules):
            raise CountMismatchError(what, len(modules), len(given))


def _device_of(inputs: Any) -> torch.device:
    tensors = _tree.tensors(inputs)
    return tensors[0].device if tensors else torch.device("cpu")


def _lanes_in_turn(targets: Sequence[torch.device]) -> tuple[Scheduler, list[Lane]]:
    """Return one lane per target; on the CPU the default lanes in turn, for any number of modules."""
    scheduler = scheduler_of(default_runtime())
    lanes = []
    for position, device in enumerate(targets):
        known = [lane for lane in scheduler.lanes if lane.device == device] or scheduler.lanes_for([device])
        lanes.append(known[position % len(known)])
    return scheduler, lanes
