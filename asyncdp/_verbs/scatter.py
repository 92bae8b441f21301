"""Split the inputs of a pass into shards."""

from __future__ import annotations

from typing import Any

from .._checks import check_dim
from .._devices import Devices, parse_devices
from .batch import Batch
from .inplace import SplitInputs


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
    check_dim(dim)
    targets = parse_devices(devices)
    batch = Batch((inputs,), {}, dim, names=("inputs",))
    shards = batch.split(len(targets), SplitInputs(as_views=True))
    return [batch.arguments_on(device, shard)[0][0] for shard, device in zip(shards, targets, strict=False)]
