"""Split inputs: shards that a forward may write into, as it may write into its input on one device.

A shard shares the memory of the tensor that it was split from, its base tensor. As a view it would also
share the base's version counter. Then a write of one lane would make another lane's backward fail, and
torch forbids writes into views that a graph records. So shards are made by `unsafe_split`: autograd
takes them for tensors of their own, each with its own version counter, and `SplitInputs` carries over
what autograd then cannot know:

- A forward has written into a shard: at the end of the forwards the base gets a new version, and the
  base's gradient flows to the shards from then on (`MarkWritten`).
- The caller writes into the base after the forwards: before the backward, the version counters of the
  shards are raised, so that torch reports a shard that was saved for it and has changed since.

Shards are views (`as_views=True`) where nobody could write on one device either (a leaf that requires
gradients), where several split tensors share one storage, and for subclasses of `Tensor`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _tree
from .._autograd import MarkWritten, Scatter
from .._torch_private import version_of

_VERSION = attrgetter("_version")
_GRAD_FN = attrgetter("grad_fn")


class _SplitInput(NamedTuple):
    base: Tensor
    dim: int
    shards: Sequence[Tensor]


class SplitInputs:
    """The tensors that one pass has split.

    Args:
        as_views: make all shards views, which nobody may write into while a graph is recorded.
    """

    def __init__(self, *, as_views: bool = False) -> None:
        self._as_views = as_views
        self._split: list[_SplitInput] = []

    def split(self, tensors: Sequence[Tensor], sizes: Sequence[int], dim: int) -> list[Sequence[Tensor]]:
        """Split each tensor into shards of these lengths along `dim`; the same tensor into the same."""
        distinct = dict(zip(map(id, tensors), tensors, strict=True))
        storages = Counter(map(_storage_of, distinct.values())) if len(distinct) > 1 else None
        shards: dict[int, Sequence[Tensor]] = {}
        for key, base in distinct.items():
            # A write into one of several tensors that share memory would go unnoticed in the others.
            shares_memory = storages is not None and storages[_storage_of(base)] > 1
            as_views = self._as_views or shares_memory or not _is_writable(base)
            if len(sizes) == 1 and not as_views:
                shards[key] = (base,)
                continue
            shards[key] = _split(base, sizes, dim, as_views)
            if not as_views and not base.is_inference():
                self._split.append(_SplitInput(base, dim, shards[key]))
        return [shards[id(tensor)] for tensor in tensors]

    def end_forward(self, outputs: Any) -> None:
        """Mark the base tensors of written shards as written, after all forwards.

        Args:
            outputs: of the whole pass. If the caller writes into a base tensor later, a backward from
                them fails where it needs the old values, as on one device.
        """
        for base, dim, shards in self._split:
            if not any(map(_VERSION, shards)):
                continue
            if torch.is_grad_enabled() and any(shard.requires_grad for shard in shards):
                MarkWritten.apply(dim, base, *shards)
            else:
                increment_version(base)
        if self._split and torch.is_grad_enabled():
            _watch(self._split, outputs)


def _split(tensor: Tensor, sizes: Sequence[int], dim: int, as_views: bool) -> Sequence[Tensor]:
    if tensor.requires_grad and torch.is_grad_enabled():
        return Scatter.apply(dim, sizes, tensor, as_views)  # type: ignore[no-any-return]
    return tensor.split_with_sizes(sizes, dim) if as_views else tensor.unsafe_split_with_sizes(sizes, dim)


def _is_writable(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not (tensor.requires_grad and tensor.is_leaf)


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _watch(split: Sequence[_SplitInput], outputs: Any) -> None:
    """Let every backward from `outputs` first compare the versions of base tensors with those of now."""
    nodes = {*map(_GRAD_FN, _tree.tensors(outputs))} - {None}
    if nodes:
        counters = [(version_of(each.base), _version_counters(each)) for each in split]
        for node in nodes:
            node.register_prehook(partial(_raise_versions, counters))


def _version_counters(split: _SplitInput) -> list[Tensor]:
    """Return empty tensors that share version counters with a base tensor and its shards, but no memory."""
    counters = [split.base.detach(), *(shard.detach() for shard in split.shards)]
    nothing = split.base.new_empty(0)
    for counter in counters:
        counter.data = nothing
    return counters


def _raise_versions(counters: Sequence[tuple[int, list[Tensor]]], _grads: Any) -> None:
    for version, (base, *shards) in counters:
        if version_of(base) != version:
            increment_version(shards)
