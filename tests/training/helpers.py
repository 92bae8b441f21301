"""Modules, and what a step could change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it at first use, which reads files: not on an event loop
from torch import Tensor, nn

import asyncdp

from ..runtime.helpers import Latch

Snapshot = dict[str, Any]


def mlp(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> nn.Module:
    """Three small layers."""
    return nn.Sequential(
        nn.Linear(5, 8, bias=bias), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).to(dtype)


def batch(num_rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs for `mlp` and their classes."""
    return torch.randn(num_rows, 5, dtype=dtype), torch.randint(0, 3, (num_rows,))


def serial_step(
    module: nn.Module, optimizer: Any, inputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Tensor]
) -> Tensor:
    """The step of one device with the whole batch, as torch has it."""
    optimizer.zero_grad()
    loss = loss_fn(module(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


def snapshot(module: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Everything a step may change, copied."""
    return copy.deepcopy(
        {
            "state": module.state_dict(),
            "gradients": {name: each.grad for name, each in module.named_parameters()},
            "optimizer": optimizer.state_dict(),
        }
    )


def same(one: Any, other: Any, within: float = 0.0) -> bool:
    """Whether two snapshots agree, to the last bit or within a tolerance."""
    if isinstance(one, Tensor):
        agrees = partial(torch.allclose, rtol=within, atol=within) if within else torch.equal
        return isinstance(other, Tensor) and agrees(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], within) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(partial(same, within=within), one, other))
    return bool(one == other)


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between two modules' parameters and buffers."""
    mine, theirs = one.state_dict(), other.state_dict()
    return max(float((mine[name].double() - theirs[name].double()).abs().max()) for name in mine)


def engine(module: nn.Module, num_lanes: int = 2, home: str = "cpu") -> asyncdp.DataParallel:
    """An engine that always uses all its lanes, which are on the device `home`."""
    return asyncdp.DataParallel(module, [home] * num_lanes, num_lanes="all")


gates: dict[str, Latch] = {}
"""What holds the writing of a checkpoint with a `Gated` scheduler."""


class Gate:
    """Holds whoever pickles it: the thread that writes a checkpoint."""

    def __deepcopy__(self, memo: object) -> Gate:
        return self

    def __reduce__(self) -> Any:
        gates["write"].hold()
        return Gate, ()


class Gated(torch.optim.lr_scheduler.StepLR):
    """A scheduler whose state holds a gate."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "gate": Gate()}
