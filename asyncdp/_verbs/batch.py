"""The inputs of one pass: flattened once, split into shards, moved to the lanes' devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._runtime import trace
from .._runtime.schedule import split_sizes
from ..errors import LengthMismatchError, UnsplittableError
from .inplace import SplitInputs

_REQUIRES_GRAD = attrgetter("requires_grad")


def positional(inputs: Any) -> tuple[Any, ...]:
    """Return the positional arguments that `inputs` stands for: a tuple holds several, all else is one."""
    return inputs if type(inputs) is tuple else (inputs,)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that one batch stands for.

    A dict holds keyword arguments, a tuple positional ones, anything else, also of a subclass of the two,
    is the only argument.

    Raises:
        TypeError: a key of a dict is no string.
    """
    if type(batch) is not dict:
        return positional(batch), {}
    for key in batch:
        if not isinstance(key, str):
            raise TypeError(
                f"a dict batch holds keyword arguments, but its key {key!r} is no string. "
                "Put the dict into a tuple, `(batch,)`, to make it the only argument."
            )
    return (), batch


class Batch:
    """The arguments of one call, or the inputs and targets of one training step.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        dim: the dimension that is split.
        names: what error messages call the positional arguments.
    """

    __slots__ = ("_args", "_flat", "_kwargs", "_names", "_specs", "dim", "leaves")

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        dim: int,
        names: Sequence[str] | None = None,
    ) -> None:
        self.dim = dim
        self._args, self._kwargs, self._names = args, kwargs, names
        self._specs = []
        self._flat: list[Any] = []
        for value in (*args, *kwargs.values()):
            leaves, spec = _tree.flatten(value)
            self._flat += leaves
            self._specs.append(spec)
        self.leaves = self._flat
        """Every value within the arguments that is no container."""

    @classmethod
    def of_step(cls, inputs: Any, targets: Any, dim: int) -> Batch:
        """Make the batch of a training step: data that no gradient flows back to.

        The backwards of several lanes would race for the gradients of shared inputs.
        """
        batch = cls((inputs, targets), {}, dim, ("inputs", "targets"))
        if any(map(_REQUIRES_GRAD, batch.tensors)):
            batch.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in batch.leaves]
        return batch

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def num_rows(self) -> int | None:
        """The length that all splittable tensors share along `dim`; None if there is no such tensor.

        Raises:
            LengthMismatchError: tensors differ in length.
            UnsplittableError: a value cannot be split along one dimension (a PackedSequence).
        """
        return self._rows()[0]

    def split(self, num_lanes: int, split_inputs: SplitInputs | None = None) -> list[list[Any]]:
        """Split into at most `num_lanes` shards: one if there are no arguments at all.

        Forwards may write into the shards, unless `split_inputs` gives views. Whatever has no rows is
        repeated in every shard.

        Returns:
            The leaves of each shard.

        Raises:
            LengthMismatchError, UnsplittableError: as `num_rows`.
        """
        num_rows, to_split = self._rows()
        if num_rows is None:
            return [self.leaves] * (num_lanes if self._specs else 1)
        sizes = split_sizes(num_rows, num_lanes)
        columns = (split_inputs or SplitInputs()).split(list(to_split.values()), sizes, self.dim)
        shards = []
        for pieces in zip(*columns, strict=True):
            leaves = list(self.leaves)
            for position, piece in zip(to_split, pieces, strict=True):
                leaves[position] = piece
            shards.append(leaves)
        return shards

    def arguments_on(
        self, device: torch.device, leaves: list[Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Return the arguments made of the leaves of a shard or of the whole batch, moved to `device`.

        A trace shows the copies as a span of their own.
        """
        begun = time.perf_counter()
        moved = _moved(leaves, device)
        if moved is not leaves and trace.recorder is not None:
            trace.recorder.scattered(begun)
        if moved is self._flat:
            return self._args, self._kwargs
        values, begin = [], 0
        for spec in self._specs:
            end = begin + spec.num_leaves
            values.append(_tree.unflatten(spec, moved[begin:end]))
            begin = end
        count = len(self._args)
        return tuple(values[:count]), dict(zip(self._kwargs, values[count:], strict=True))

    def apply(self, module: Callable[..., Any], device: torch.device, leaves: list[Any]) -> Any:
        """Call a module on its lane's thread; the output stays where it is."""
        args, kwargs = self.arguments_on(device, leaves)
        return module(*args, **kwargs)

    def _rows(self) -> tuple[int | None, dict[int, Tensor]]:
        """Return the number of rows, and the tensors that have them by their positions in `leaves`."""
        num_rows: int | None = None
        found: dict[int, Tensor] = {}
        for position, leaf in enumerate(self.leaves):
            if isinstance(leaf, _tree.Packed):
                raise UnsplittableError(leaf.sequence)
            if not isinstance(leaf, Tensor) or not -leaf.dim() <= self.dim < leaf.dim():
                continue
            length = leaf.shape[self.dim]
            if num_rows is not None and length != num_rows:
                names = self._leaf_names()
                first = names[next(iter(found))], num_rows
                raise LengthMismatchError(self.dim, first, (names[position], length))
            num_rows = length
            found[position] = leaf
        return num_rows, found

    def _leaf_names(self) -> list[str]:
        """Name every leaf as a user would: "argument 0['mask']", "keyword 'y'"."""
        args = self._names or [f"argument {position}" for position in range(len(self._args))]
        roots = [*args, *(f"keyword {key!r}" for key in self._kwargs)]
        return [
            root + path for root, spec in zip(roots, self._specs, strict=True) for path in _tree.paths(spec)
        ]


def move(tree: Any, device: torch.device) -> Any:
    """Move every tensor of a tree to `device`; a tree that is there already is returned as it is."""
    leaves, spec = _tree.flatten(tree)
    moved = _moved(leaves, device)
    return tree if moved is leaves else _tree.unflatten(spec, moved)


def _moved(leaves: list[Any], device: torch.device) -> list[Any]:
    """Move what is elsewhere; return the very list if nothing is."""
    moved = leaves
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, (Tensor, _tree.Packed)) and leaf.device != device:
            moved = list(leaves) if moved is leaves else moved
            # Only towards CUDA: the other way the copy might be read on the host before it has arrived.
            moved[position] = leaf.to(device, non_blocking=device.type == "cuda")
    return moved
