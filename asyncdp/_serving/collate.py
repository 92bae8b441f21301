"""Samples to a batch, and a batch's output to results; run on a lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from ..errors import CollateError, SplitError

Collate = Callable[[Sequence[Any]], Any]
"""Makes one batch of some samples; a tuple holds positional arguments, anything else is the only one."""

Split = Callable[[Any, Sequence[Any]], Sequence[Any]]
"""Takes the output of a batch and its samples, gives one result per sample."""


@dataclass(frozen=True)
class Stack:
    """The default `collate`: stack tensors and numbers, leaf by leaf.

    Args:
        pad: what fills tensors up to the longest of the batch, at the end of each dimension; None
            refuses tensors of unlike shapes.
    """

    pad: float | None = None

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Returns a batch of the samples' structure, each leaf of shape [num_samples, ...]."""
        if isinstance(samples[0], Tensor):
            return self._stack(samples)
        columns: list[list[Any]] = []
        first, spec = _tree.flatten(samples[0])
        columns = [[leaf] for leaf in first]
        for sample in samples[1:]:
            leaves, other = _tree.flatten(sample)
            if other != spec:
                raise CollateError(f"samples differ in structure: {spec} and {other}")
            for column, leaf in zip(columns, leaves, strict=True):
                column.append(leaf)
        return _tree.unflatten(spec, [self._stack(column) for column in columns])

    def _stack(self, leaves: Sequence[Any]) -> Tensor:
        tensors = [leaf if isinstance(leaf, Tensor) else _number(leaf) for leaf in leaves]
        dtype, shape = tensors[0].dtype, tensors[0].shape
        other = shape
        for each in tensors:
            if each.dtype != dtype:
                # To convert would change what a sample gives by who happens to be beside it.
                raise CollateError(f"samples differ in dtype: {dtype} and {each.dtype}")
            if each.shape != shape:
                other = each.shape
        if other is shape:
            return torch.stack(tensors)
        if self.pad is None or any(each.dim() != len(shape) for each in tensors):
            raise CollateError(f"samples differ in shape: {list(shape)} and {list(other)}")
        return _padded(tensors, self.pad)


def _number(leaf: Any) -> Tensor:
    if not isinstance(leaf, (bool, int, float, complex)):
        raise CollateError(f"a {type(leaf).__qualname__} cannot be stacked")
    return torch.tensor(leaf)


def _padded(tensors: Sequence[Tensor], pad: float) -> Tensor:
    device = tensors[0].device
    unlike = next((each.device for each in tensors if each.device != device), None)
    if unlike is not None:
        raise CollateError(f"samples differ in device: {device} and {unlike}")
    longest = [max(lengths) for lengths in zip(*(each.shape for each in tensors), strict=True)]
    batch = tensors[0].new_full((len(tensors), *longest), pad)
    for row, each in zip(batch, tensors, strict=True):
        row[tuple(slice(length) for length in each.shape)] = each
    return batch


def unbind(output: Any, samples: Sequence[Any]) -> Sequence[Any]:
    """The default `split`: row `i` of every tensor belongs to sample `i`; other leaves to all.

    An output of nothing but None and empty containers goes to all, too.

    Raises:
        SplitError: a tensor has not one row per sample, or there is none although there are values.
    """
    if isinstance(output, Tensor):
        return _rows(output, len(samples))
    leaves, spec = _tree.flatten(output)
    if not any(isinstance(leaf, Tensor) for leaf in leaves) and any(leaf is not None for leaf in leaves):
        raise SplitError(f"a {type(output).__qualname__} without tensors has no row for each", len(samples))
    columns = [
        _rows(leaf, len(samples)) if isinstance(leaf, Tensor) else [leaf] * len(samples) for leaf in leaves
    ]
    if not columns:
        return [output] * len(samples)
    return [_tree.unflatten(spec, list(row)) for row in zip(*columns, strict=True)]


def _rows(tensor: Tensor, num_samples: int) -> Sequence[Tensor]:
    shape = tensor.shape
    if not shape or shape[0] != num_samples:
        raise SplitError(f"an output of shape {list(shape)} has not one row for each", num_samples)
    return tensor.unbind()
