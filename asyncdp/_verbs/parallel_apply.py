"""Run modules side by side, each on its own lane."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _tree
from .._devices import Devices, parse_devices
from .._runtime import Lane, Scheduler, Task, default_lanes, default_runtime, scheduler_of
from ..errors import CountMismatchError, NotAModuleError
from .scatter import bring, move


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
    stage = [
        Task(lane, partial(apply_and_move, module, arguments(one), keywords, device, device), "run", True)
        for lane, module, one, keywords, device in zip(
            lanes, modules, inputs, every_kwargs, targets, strict=True
        )
    ]
    return await scheduler.run(stage, num_threads=scheduler.thread_share(len(set(lanes))))


def arguments(inputs: Any) -> tuple[Any, ...]:
    """The positional arguments that one entry of inputs means."""
    return inputs if type(inputs) is tuple else (inputs,)


def apply(
    module: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> Any:
    """Call a module on a lane, with its inputs on the lane's device; the output stays where it is."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return module(bring(args[0], device))
    args, kwargs = bring((args, dict(kwargs)), device)
    return module(*args, **kwargs)


def apply_and_move(
    module: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    output: torch.device,
) -> Any:
    """As `apply`, with the output moved to another device."""
    return move(apply(module, args, kwargs, device), output)


def _check_counts(
    modules: Sequence[nn.Module],
    inputs: Sequence[Any],
    kwargs: Sequence[Mapping[str, Any]] | None,
    devices: Sequence[torch.device] | None,
) -> None:
    for module in modules:
        if not isinstance(module, nn.Module):
            raise NotAModuleError(module)
    for what, given in (("inputs", inputs), ("kwargs", kwargs), ("devices", devices)):
        if given is not None and len(given) != len(modules):
            raise CountMismatchError(what, len(modules), len(given))


def _device_of(inputs: Any) -> torch.device:
    for leaf in _tree.flatten(inputs)[0]:
        if isinstance(leaf, Tensor):
            return leaf.device
    return torch.device("cpu")


def _lanes_in_turn(targets: Sequence[torch.device]) -> tuple[Scheduler, list[Lane]]:
    """One lane per target; on the CPU the default lanes in turn, however many modules there are."""
    scheduler = scheduler_of(default_runtime())
    lanes = []
    for position, device in enumerate(targets):
        known = [lane for lane in scheduler.lanes if lane.device == device] or scheduler.lanes_for([device])
        lanes.append(known[position % len(known)])
    return scheduler, lanes
