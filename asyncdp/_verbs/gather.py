"""Put the outputs of the shards together again."""

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

# The very sentence of torch.nn.parallel, so that filters written for it go on working.
SCALAR_WARNING = (
    "Was asked to gather along dimension 0, but all input tensors were scalars; "
    "will instead unsqueeze and return a vector."
)


def gather(outputs: Sequence[Any], output_device: DeviceLike, *, dim: int = 0) -> Any:
    """Concatenate the outputs of several shards on one device.

    Args:
        outputs: one entry per shard, all of the same nested structure.
        output_device: where the result goes.
        dim: dimension along which tensors are put together. Scalars become a vector in shard
            order, with the warning torch.nn.parallel gives.

    Returns:
        The structure of one entry, with whole tensors in it. What is no tensor must be equal in all
        entries and is returned once. Differentiable.

    Raises:
        GatherError: structures, sizes or values that are no tensors differ.
    """
    return gather_to(outputs, parse_devices(output_device)[0], dim)


def gather_to(outputs: Sequence[Any], device: torch.device, dim: int) -> Any:
    """As `gather`, for a device that is known to exist."""
    if not outputs:
        raise GatherError("there are none")
    if len(outputs) == 1:
        if isinstance(outputs[0], Tensor):
            return _alone(outputs[0], device)
        return _tree.map_leaves(lambda leaf: _alone(leaf, device), outputs[0])
    if all(isinstance(output, Tensor) for output in outputs):
        return _gather_tensors(outputs, device, dim)
    flat = [_tree.flatten(output) for output in outputs]
    spec = flat[0][1]
    for index, (_, other) in enumerate(flat):
        if other != spec:
            raise GatherError(f"shard 0 returned {spec} and shard {index} {other}")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    names = _tree.paths(spec)
    return _tree.unflatten(
        spec,
        [
            _gather_leaf(column, device, dim, name or "the output")
            for column, name in zip(columns, names, strict=True)
        ],
    )


def _alone(leaf: Any, device: torch.device) -> Any:
    """A lone shard is the whole; only its scalars change, to what more shards would have given."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.dim() == 0:
        return _gather_tensors([leaf], device, 0)
    return leaf if leaf.device == device else leaf.to(device)


def _gather_leaf(column: Sequence[Any], device: torch.device, dim: int, name: str) -> Any:
    if all(isinstance(leaf, Tensor) for leaf in column):
        return _gather_tensors(column, device, dim)
    first = column[0]
    for leaf in column[1:]:
        if isinstance(leaf, Tensor) or isinstance(first, Tensor) or not _equal(leaf, first):
            raise GatherError(f"{name} is {first!r} in one shard and {leaf!r} in another")
    return first


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:
        return False


def _gather_tensors(shards: Sequence[Tensor], device: torch.device, dim: int) -> Tensor:
    if all(shard.dim() == 0 for shard in shards):
        warnings.warn(SCALAR_WARNING, stacklevel=2)
        shards, dim = [shard.unsqueeze(0) for shard in shards], 0
    if torch.is_grad_enabled() and any(shard.requires_grad for shard in shards):
        return Gather.apply(device, dim, *shards)  # type: ignore[no-any-return]
    return concatenate(shards, dim, device)
