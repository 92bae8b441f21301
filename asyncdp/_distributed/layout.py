"""Gradients as flat tensors, in the same order on every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._replicas.copies import buckets
from .._torch_private import foreach_copy_

FIRST_BUCKET_BYTES = 2**20
BUCKET_BYTES = 25 * 2**20
"""As DistributedDataParallel has them: small first, so that there is something to send early."""

Gradients = Sequence[Tensor | None] | Mapping[int, Tensor | None]
"""By their places among all; of a mapping, as many as are asked for."""


class Bucket(NamedTuple):
    """Gradients that are summed by one collective; all of one dtype, on one device.

    Attributes:
        places: which ones, by their places among all.
        views: shape, strides and offset of each in the flat tensor.
        num_elements: of the flat tensor.
    """

    places: Sequence[int]
    views: Sequence[tuple[torch.Size, tuple[int, ...], int]]
    num_elements: int
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        """Return what a process adds that has nothing to add."""
        return torch.zeros(self.num_elements, dtype=self.dtype, device=self.device)

    def flat(self, gradients: Gradients) -> Tensor:
        """Return a copy of this bucket's gradients; zeros where there is none."""
        own = [gradients[place] for place in self.places]
        flat = torch.empty(self.num_elements, dtype=self.dtype, device=self.device)
        if any(each is None for each in own):
            flat.zero_()
        pairs = [
            (view, each.to_dense() if each.layout is not torch.strided else each)
            for view, each in zip(self.split(flat), own, strict=True)
            if each is not None
        ]
        if pairs:
            with torch.no_grad():
                foreach_copy_([view for view, _ in pairs], [each for _, each in pairs])
        return flat

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return the gradients that a flat tensor is made of, which share its memory."""
        # Through .data: as views they would share one version, and a change of one would count for all.
        return [flat.as_strided(*view).data for view in self.views]


class Layout:
    """How the gradients of some tensors are divided into buckets.

    Args:
        tensors: what the gradients belong to.
        num_trainable: how many of them, the first ones, a backward reaches as leaves of the module.

    Attributes:
        is_early: which buckets are worth giving before the backward has ended: not the last, and none that
            has changed after it was given.
    """

    def __init__(self, tensors: Sequence[Tensor], num_trainable: int) -> None:
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        self.num_tensors = len(tensors)
        self.buckets = [
            _bucket(bucket, [places[id(tensor)] for tensor in bucket])
            for group in groups.values()
            for bucket in _divided(group)
        ]
        self.is_early = [
            bucket.device.type == "cpu" and max(bucket.places) < num_trainable for bucket in self.buckets
        ]
        if self.is_early:
            self.is_early[-1] = False

    def triggers(self) -> list[tuple[int, int]]:
        """Return each bucket worth giving early, and the place of the tensor that a backward reaches last."""
        return [
            (number, bucket.places[-1]) for number, bucket in enumerate(self.buckets) if self.is_early[number]
        ]

    def describe(self) -> str:
        """Return what must be the same everywhere, in one line."""
        return "buckets of " + ", ".join(str(bucket.num_elements) for bucket in self.buckets)


def _divided(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Divide tensors into buckets in reverse order, the first of which is small."""
    first = buckets(tensors, FIRST_BUCKET_BYTES)[0]
    return [first, *buckets(tensors[: len(tensors) - len(first)], BUCKET_BYTES)]


def _bucket(tensors: Sequence[Tensor], places: Sequence[int]) -> Bucket:
    views, offset = [], 0
    for tensor in tensors:
        views.append((tensor.shape, strides_of(tensor), offset))
        offset += tensor.numel()
    return Bucket(places, views, offset, tensors[0].dtype, tensors[0].device)


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor's gradient: its own, if it fills its memory without gaps."""
    if tensor.layout is torch.strided:
        return torch.empty_like(tensor, device="meta").stride()
    return torch.empty(tensor.shape, device="meta").stride()
