"""Split the inputs of a pass into shards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._devices import Devices, parse_devices
from .._runtime import trace
from .._runtime.schedule import split_sizes
from ..errors import LengthMismatchError, UnsplittableError
from .inplace import Wholes


def scatter(inputs: Any, devices: Devices, *, dim: int = 0) -> list[Any]:
    """Split nested inputs over devices.

    Tensors are split along `dim` into balanced shards (9 rows on 4 devices: 3, 2, 2, 2); with fewer
    rows than devices there are fewer shards, and no rows at all give one empty shard. Everything
    else, and tensors that have no such dimension, is repeated in every shard.

    Args:
        inputs: a tensor, or tuples, lists, dicts, named tuples and dataclasses of them, nested at will.
        devices: one shard goes to each, as far as there are rows; see `parse_devices`.
        dim: the dimension to split, negative ones counted from each tensor's end.

    Returns:
        One entry per shard, shaped like `inputs`. Shards on the input's device are views of it.
        Differentiable.

    Raises:
        LengthMismatchError: tensors differ in length along `dim`.
        UnsplittableError: an input cannot be split along one dimension (a PackedSequence).
    """
    targets = parse_devices(devices)
    shards = split(inputs, len(targets), dim, Wholes(as_views=True))
    return [move(shard, device) for shard, device in zip(shards, targets, strict=False)]


def split(inputs: Any, num_lanes: int, dim: int, wholes: Wholes | None = None) -> list[Any]:
    """Split nested inputs into at most `num_lanes` shards, without moving them to another device.

    Forwards may write into the shards, unless `wholes` gives views.
    """
    leaves, spec = _tree.flatten(inputs)
    for leaf in leaves:
        if isinstance(leaf, _tree.Packed):
            raise UnsplittableError(leaf.sequence)
    num_rows = _common_length(leaves, spec, dim)
    if num_rows is None:
        return [inputs] * num_lanes
    sizes = split_sizes(num_rows, num_lanes)
    to_split = [leaf for leaf in leaves if isinstance(leaf, Tensor) and _has_dim(leaf, dim)]
    shards = iter((wholes or Wholes()).split(to_split, sizes, dim))
    columns = [
        next(shards) if isinstance(leaf, Tensor) and _has_dim(leaf, dim) else [leaf] * len(sizes)
        for leaf in leaves
    ]
    return [_tree.unflatten(spec, row) for row in zip(*columns, strict=True)]


def split_arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], num_lanes: int, dim: int, wholes: Wholes
) -> list[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Split the arguments of a call into those of at most `num_lanes` calls; one if there are none."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and _has_dim(args[0], dim):
        # By far the most frequent call; spared the detour over trees, which takes as long as the rest.
        sizes = split_sizes(args[0].shape[dim], num_lanes)
        return [((shard,), kwargs) for shard in wholes.split_one(args[0], sizes, dim)]
    shards: list[tuple[tuple[Any, ...], Mapping[str, Any]]]
    shards = split((args, dict(kwargs)), num_lanes if args or kwargs else 1, dim, wholes)
    return shards


def move(tree: Any, device: torch.device) -> Any:
    """Move every tensor of a tree to `device`; what is there already is not copied."""
    if isinstance(tree, Tensor):
        return _move_tensor(tree, device)
    leaves, spec = _tree.flatten(tree)
    moved = [_move_tensor(leaf, device) for leaf in leaves]
    if all(one is other for one, other in zip(leaves, moved, strict=True)):
        return tree
    return _tree.unflatten(spec, moved)


def bring(tree: Any, device: torch.device) -> Any:
    """As `move`, for what a work needs on its lane's device; a trace shows the copies."""
    if isinstance(tree, Tensor) and tree.device == device:
        return tree
    recorder = trace.recorder
    if recorder is None:
        return move(tree, device)
    begun = time.perf_counter()
    moved = move(tree, device)
    if moved is not tree:
        recorder.scattered(begun)
    return moved


def _move_tensor(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, _tree.Packed) and leaf.sequence.data.device != device:
        return _tree.Packed(leaf.sequence.to(device))
    if not isinstance(leaf, Tensor) or leaf.device == device:
        return leaf
    # Only towards CUDA: the other way the copy might be read on the host before it has arrived.
    return leaf.to(device, non_blocking=device.type == "cuda")


def _has_dim(tensor: Tensor, dim: int) -> bool:
    return -tensor.dim() <= dim < tensor.dim()


def _common_length(leaves: Sequence[Any], spec: Any, dim: int) -> int | None:
    """The length all splittable tensors share along `dim`; None if there is no such tensor."""
    splittable = [
        (position, leaf.shape[dim])
        for position, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and _has_dim(leaf, dim)
    ]
    if not splittable:
        return None
    first, num_rows = splittable[0]
    for position, length in splittable[1:]:
        if length != num_rows:
            names = [name or "the input" for name in _tree.paths(spec)]
            raise LengthMismatchError(dim, (names[first], num_rows), (names[position], length))
    return int(num_rows)
