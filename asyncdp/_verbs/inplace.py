"""The tensors that a pass splits, whose shards are to be written and saved as they would be themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _tree
from .._autograd import Scatter, Written


class _Whole(NamedTuple):
    tensor: Tensor
    dim: int
    shards: Sequence[Tensor]


class Wholes:
    """The tensors that one pass has split.

    Shards share their whole's memory. As views they would share its count of versions too: no lane could
    write into its shard, or another lane's backward would miss what that lane had saved. So autograd takes
    them for tensors of their own, and what it then cannot know is told it here: to the whole, that it was
    written; to the shards, that the whole was.

    Args:
        as_views: give views, of which torch lets nobody write any where a graph records it.
    """

    def __init__(self, *, as_views: bool = False) -> None:
        self._as_views = as_views
        self._wholes: list[_Whole] = []

    def split(self, tensors: Sequence[Tensor], sizes: Sequence[int], dim: int) -> list[Sequence[Tensor]]:
        """Split each tensor into shards of these lengths along `dim`; the same tensor into the same."""
        distinct = {id(tensor): tensor for tensor in tensors}
        storages = Counter(map(_storage_of, distinct.values())) if len(distinct) > 1 else None
        found = {
            # Nobody could tell what else is changed by writing into one of several that share memory.
            key: self.split_one(tensor, sizes, dim, storages is None or storages[_storage_of(tensor)] == 1)
            for key, tensor in distinct.items()
        }
        return [found[id(tensor)] for tensor in tensors]

    def split_one(
        self, tensor: Tensor, sizes: Sequence[int], dim: int, is_alone: bool = True
    ) -> Sequence[Tensor]:
        """As `split`, for one tensor, and whether it is the only one that is split with its memory."""
        if self._as_views or not is_alone or not _is_ordinary(tensor):
            return _split(tensor, sizes, dim, apart=False)
        if len(sizes) == 1:
            return (tensor,)
        shards = _split(tensor, sizes, dim, apart=True)
        self._wholes.append(_Whole(tensor, dim, shards))
        return shards

    def end_forward(self, outputs: Any) -> None:
        """After all forwards: what they wrote into shards has been written into the wholes.

        Args:
            outputs: of the whole pass. What the caller writes into a whole from now on makes a backward from
                them fail if it needs what was there, as it would on one device.
        """
        if not self._wholes:
            return
        wholes = [each for each in self._wholes if not each.tensor.is_inference()]
        for tensor, dim, shards in wholes:
            if not any(shard._version for shard in shards):
                continue
            if torch.is_grad_enabled() and any(shard.requires_grad for shard in shards):
                Written.apply(dim, tensor, *shards)
            else:
                increment_version(tensor)
        if wholes and torch.is_grad_enabled():
            _watch(wholes, outputs)


def _split(tensor: Tensor, sizes: Sequence[int], dim: int, apart: bool) -> Sequence[Tensor]:
    if tensor.requires_grad and torch.is_grad_enabled():
        return Scatter.apply(dim, sizes, tensor, apart)  # type: ignore[no-any-return]
    return tensor.unsafe_split_with_sizes(sizes, dim) if apart else tensor.split_with_sizes(sizes, dim)


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a forward could write into a tensor, and splits of it are what torch makes them."""
    return type(tensor) is Tensor and not (tensor.requires_grad and tensor.is_leaf)


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _watch(wholes: Sequence[_Whole], outputs: Any) -> None:
    leaves = [outputs] if isinstance(outputs, Tensor) else _tree.flatten(outputs)[0]
    nodes = {leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn}
    if nodes:
        pass_on = partial(_pass_on, [(each.tensor._version, _counts(each)) for each in wholes])
        for node in nodes:
            node.register_prehook(pass_on)


def _counts(whole: _Whole) -> list[Tensor]:
    """Empty tensors that count versions together with a whole and its shards, and keep none of the memory."""
    counts = [whole.tensor.detach(), *(shard.detach() for shard in whole.shards)]
    nothing = whole.tensor.new_empty(0)
    for count in counts:
        count.data = nothing
    return counts


def _pass_on(counts: Sequence[tuple[int, list[Tensor]]], _grads: Any) -> None:
    """Before a backward: saved shards of a whole that has been written since are no longer what they were."""
    for version, (whole, *shards) in counts:
        if whole._version != version:
            increment_version(shards)
