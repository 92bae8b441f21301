"""Gather the outputs of the shards."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._autograd import Gather, concatenate
from .._devices import DeviceLike, parse_devices
from ..errors import GatherError

# The sentence of torch.nn.parallel, so that warning filters written for it keep working.
SCALAR_WARNING = (
    "Was asked to gather along dimension 0, but all input tensors were scalars; "
    "will instead unsqueeze and return a vector."
)


def gather(outputs: Sequence[Any], output_device: DeviceLike, *, dim: int = 0) -> Any:
    """Concatenate the outputs of several shards on one device.

    Args:
        outputs: one entry per shard, all of one nested structure.
        output_device: where the result goes.
        dim: dimension along which tensors are concatenated. Scalars become a vector in shard order,
            with the warning of torch.nn.parallel.

    Returns:
        The structure of one entry, with concatenated tensors in it. Other values must be equal in all
        entries and are returned once. Differentiable.

    Raises:
        GatherError: structures, sizes or other values differ.
    """
    return gather_to(outputs, parse_devices(output_device)[0], dim)


def gather_to(outputs: Sequence[Any], device: torch.device, dim: int) -> Any:
    """As `gather`, for a device that is known to exist."""
    if not outputs:
        raise GatherError("there are none")
    rows, specs = zip(*map(_tree.flatten, outputs), strict=True)
    spec = specs[0]
    for index, other in enumerate(specs):
        if other != spec:
            raise GatherError(f"shard 0 returned {spec} and shard {index} {other}")
    columns = zip(*rows, strict=True)
    return _tree.unflatten(
        spec, [_gather_leaf(column, device, dim, spec, place) for place, column in enumerate(columns)]
    )


def _gather_leaf(column: Sequence[Any], device: torch.device, dim: int, spec: Any, place: int) -> Any:
    num_dims = [leaf.dim() for leaf in column if isinstance(leaf, Tensor)]
    if len(num_dims) < len(column):
        return _equal_value(column, spec, place)
    if not any(num_dims):
        warnings.warn(SCALAR_WARNING, stacklevel=2)
        column, dim = [leaf.unsqueeze(0) for leaf in column], 0
    elif len(column) == 1:
        return column[0].to(device)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in column):
        return Gather.apply(device, dim, *column)
    return concatenate(column, dim, device)


def _equal_value(column: Sequence[Any], spec: Any, place: int) -> Any:
    """Return the value that is no tensor and that all shards have at one place."""
    first = column[0]
    for leaf in column[1:]:
        if isinstance(leaf, Tensor) or isinstance(first, Tensor) or not _equal(leaf, first):
            name = _tree.paths(spec)[place] or "the output"
            raise GatherError(f"{name} is {first!r} in one shard and {leaf!r} in another")
    return first


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:
        return False
