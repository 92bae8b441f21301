"""An awaitable backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._checks import check_flags, check_list, shown
from .._runtime import Task, default_runtime, scheduler_of


async def backward(
    tensors: Tensor | Sequence[Tensor],
    grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Compute gradients as `torch.autograd.backward` does, on a lane, without blocking the event loop.

    Gradients are added to `.grad` of the leaves while it runs, so two backwards that share leaves
    must not run at the same time, and one that fails or is cancelled may have changed some of them.
    A running backward is never interrupted: a cancellation goes on once it has ended.

    Args:
        tensors: where to start.
        grad_tensors: their gradients; not needed for tensors of one element.
        retain_graph: as in `torch.autograd.backward`.
        create_graph: as in `torch.autograd.backward`.
        inputs: as in `torch.autograd.backward`.

    Raises:
        ValueError: there are no tensors.
        RuntimeError: from torch, as of `torch.autograd.backward`.
    """
    roots = _tensors("tensors", tensors)
    if not roots:
        raise ValueError("there are no tensors to start a backward from. Pass a loss.")
    check_flags(create_graph=create_graph)
    if retain_graph is not None:
        check_flags(retain_graph=retain_graph)
    if grad_tensors is not None:
        grad_tensors = _tensors("grad_tensors", grad_tensors, type(None))
    if inputs is not None:
        inputs = _tensors("inputs", inputs, torch.autograd.graph.GradientEdge)
    scheduler = scheduler_of(default_runtime())
    device = roots[0].device
    scheduler.lanes_for([device])
    lanes = [lane for lane in scheduler.lanes if lane.device == device]
    run = partial(
        torch.autograd.backward,
        roots,
        grad_tensors,
        retain_graph=retain_graph,
        create_graph=create_graph,
        inputs=inputs,
    )
    lane = scheduler.least_busy(lanes)[0]
    await scheduler.run([Task(lane, run, "backward")], num_threads=scheduler.thread_share(1))


def _tensors(name: str, given: Any, *others: type) -> tuple[Any, ...]:
    """Return one tensor or several as a tuple; entries may be of other types, too."""
    if isinstance(given, Tensor):
        return (given,)
    check_list(name, given)
    for each in given:
        if not isinstance(each, (Tensor, *others)):
            raise TypeError(f"an entry of {name} must be a tensor, but got {shown(each)}.")
    return tuple(given)
