"""Gather the outputs of the shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._autograd import Gather, concatenate
from .._checks import check_dim, check_list
from .._devices import DeviceLike, parse_devices
from .._tree import PerRow
from ..errors import GatherError
from .moving import move
from .rows import unmarked

# The sentence of torch.nn.parallel, so that warning filters written for it keep working.
SCALAR_WARNING = (
    "Was asked to gather along dimension 0, but all input tensors were scalars; "
    "will instead unsqueeze and return a vector."
)


_requires_grad = attrgetter("requires_grad")


def gather(outputs: Sequence[Any], output_device: DeviceLike, *, dim: int = 0) -> Any:
    """Concatenate the outputs of several shards on one device.

    Args:
        outputs: one entry per shard, all of one nested structure.
        output_device: where the result goes.
        dim: dimension along which tensors are concatenated. Scalars become a vector in shard order,
            with the warning of torch.nn.parallel.

    Returns:
        The structure of one entry, with concatenated tensors in it, and the entries of each `PerRow` joined.
        Key-value caches, and classes that are registered as pytrees or can be made again from what they
        iterate over, are structures too. Other values must be equal in all entries and are returned once.
        Differentiable.

    Raises:
        GatherError: structures, sizes or other values differ.
    """
    check_list("outputs", outputs)
    check_dim(dim)
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


def check_rows(outputs: Sequence[Any], sizes: Sequence[int]) -> None:
    """Refuse outputs whose lists may or may not hold one entry for each row of their shard.

    Args:
        outputs: one per shard.
        sizes: the number of rows of each shard.

    Raises:
        GatherError: there is such a list, or a `PerRow` of another length.
    """
    if isinstance(outputs[0], Tensor):
        return
    for output, size in zip(outputs, sizes, strict=True):
        for leaf in _tree.flatten(output)[0]:
            if isinstance(leaf, PerRow) and len(leaf) != size:
                raise GatherError(
                    f"a PerRow has {len(leaf)} entries in the output of a shard of {size} rows",
                    "Return one entry for each row of the shard.",
                )
    found = [unmarked(output, size) for output, size in zip(outputs, sizes, strict=True)]
    if len(outputs) == 1:
        return
    for path in found[0]:
        if all(path in each for each in found):
            raise GatherError(
                f"{path or 'the output'} is a list with as many entries as its shard has rows, which can be "
                "read in two ways",
                "One entry per row: return asyncdp.PerRow(list), and the entries are joined in order. The "
                "same parts in every shard: return a tuple, and tensors are concatenated part by part.",
            )


def _gather_leaf(column: Sequence[Any], device: torch.device, dim: int, spec: Any, place: int) -> Any:
    num_dims = [leaf.dim() for leaf in column if isinstance(leaf, Tensor)]
    if len(num_dims) < len(column):
        return _gather_others(column, device, dim, spec, place)
    if not any(num_dims):
        warnings.warn(SCALAR_WARNING, stacklevel=2)
        column, dim = [leaf.unsqueeze(0) for leaf in column], 0
    elif len(column) == 1:
        return column[0].to(device)
    if torch.is_grad_enabled() and any(map(_requires_grad, column)):
        return Gather.apply(device, dim, *column)
    return concatenate(column, dim, device)


def _gather_others(column: Sequence[Any], device: torch.device, dim: int, spec: Any, place: int) -> Any:
    """Return what shards have in a place where some have no tensor."""
    first = column[0]
    if all(isinstance(leaf, PerRow) for leaf in column):
        return move(PerRow(chain.from_iterable(column)), device)
    unequal = next((leaf for leaf in column[1:] if not _equal(leaf, first)), column)
    if unequal is column:
        return first
    parts = [_parts(leaf) for leaf in column if type(leaf) is type(first)]
    if len(parts) == len(column) and None not in parts:
        # As torch.nn.parallel does it; caches of models are made for that.
        return type(first)(gather_to(parts, device, dim))
    name = _tree.paths(spec)[place] or "the output"
    raise GatherError(f"{name} is {first!r} in one shard and {unequal!r} in another", _remedy(first))


def _parts(leaf: Any) -> list[Any] | None:
    """Return what an object yields, if it is a collection that holds tensors and may be made of such."""
    if not isinstance(leaf, Iterable) or isinstance(leaf, (Tensor, PerRow, Set, Iterator, str, bytes)):
        return None
    parts = list(leaf)
    return parts if _tree.tensors(parts) else None


def _remedy(leaf: Any) -> str:
    if "cache" in type(leaf).__name__.lower() or hasattr(leaf, "get_seq_length"):
        return "Call the model with use_cache=False, or return the tensors of the cache in a tuple."
    return (
        "Return tensors where values differ, or asyncdp.PerRow(list) for one entry per row. A class of your "
        "own is gathered part by part once torch.utils._pytree.register_pytree_node knows it."
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    try:
        return one is other or bool(one == other)
    except Exception:
        return False
