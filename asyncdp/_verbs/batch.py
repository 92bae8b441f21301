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
from .._tree import PerRow, Whole
from ..errors import AmbiguousSequenceError, LengthMismatchError, UnsplittableError
from . import rows
from .inplace import SplitInputs
from .moving import moved_leaves

_HOLDERS = (PerRow, Whole)
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

    __slots__ = ("_args", "_flat", "_kwargs", "_names", "_rows", "_specs", "dim", "leaves")

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
        self._rows: tuple[int | None, dict[int, Tensor | PerRow]] | None = None
        self._flat: list[Any] = []
        for value in (*args, *kwargs.values()):
            leaves, spec = _tree.flatten(value)
            self._flat += leaves
            self._specs.append(spec)
        self.leaves = self._flat
        """Every value within the arguments that is no container."""

    @classmethod
    def of_step(cls, inputs: Any, targets: Any, dim: int, num_lanes: int) -> Batch:
        """Make the batch of a training step on up to `num_lanes` lanes: data that no gradient flows back to.

        The backwards of several lanes would race for the gradients of shared inputs.
        """
        batch = cls((inputs, targets), {}, dim, ("inputs", "targets"))
        tensors = batch.tensors
        has_others = len(tensors) < len(batch.leaves)
        has_holders = has_others and any(isinstance(leaf, _HOLDERS) for leaf in batch.leaves)
        if has_holders or any(map(_REQUIRES_GRAD, tensors)):
            batch.leaves = [rows.detached(leaf) for leaf in batch.leaves]
        batch.rows_over(num_lanes)  # raises errors before anything runs
        return batch

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def num_rows(self) -> int | None:
        """The length that all splittable values share along `dim`; None if there is no such value.

        Raises:
            LengthMismatchError: values differ in length.
            UnsplittableError: a value cannot be split (a PackedSequence, a sparse tensor).
        """
        return (self._rows or self._find_rows())[0]

    @property
    def rows_if_any(self) -> int | None:
        """The number of rows; None too where it is not known, of values that one lane takes as they are."""
        try:
            return self.num_rows
        except (AmbiguousSequenceError, UnsplittableError):
            return None

    @property
    def num_elements(self) -> int:
        """The number of elements of all tensors; an entry of a `PerRow` counts as one."""
        return sum(leaf.numel() if isinstance(leaf, Tensor) else len(leaf) for leaf in self.shaped)

    @property
    def shaped(self) -> list[Tensor | PerRow]:
        """All tensors and all `PerRow`."""
        return [leaf for leaf in self.leaves if isinstance(leaf, (Tensor, PerRow))]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The shapes of all tensors, and the lengths of all `PerRow`."""
        return tuple(leaf.shape if isinstance(leaf, Tensor) else len(leaf) for leaf in self.shaped)

    def rows_over(self, num_lanes: int) -> int | None:
        """Return how many rows are split over the lanes; None if nothing has rows, and one lane runs it all.

        So does a lone lane what has values that cannot be split.

        Raises:
            AmbiguousSequenceError: a list or tuple may or may not hold one entry per row.
            LengthMismatchError, UnsplittableError: as `num_rows`.
        """
        try:
            num_rows, _ = self._rows or self._find_rows()
        except (AmbiguousSequenceError, UnsplittableError):
            if num_lanes == 1:
                return None
            raise
        if num_rows is not None and num_lanes > 1:
            self._check_sequences(num_rows)
        return num_rows

    def _check_sequences(self, num_rows: int, *, of_tensors: bool = True) -> None:
        if num_rows < 2:
            return
        values = (*self._args, *self._kwargs.values())
        for position, (value, spec) in enumerate(zip(values, self._specs, strict=True)):
            if spec is _tree.LEAF:
                continue
            # The inputs of a step are arguments if they are a tuple.
            is_arguments = position == 0 and self._names is not None and type(value) is tuple
            found = rows.ambiguous(value, num_rows, self.dim, except_root=is_arguments, of_tensors=of_tensors)
            if found is not None:
                path, sequence = found
                raise AmbiguousSequenceError(self._root_names()[position] + path, sequence, num_rows)

    def split(self, num_lanes: int, split_inputs: SplitInputs | None = None) -> list[list[Any]]:
        """Split into at most `num_lanes` shards: one if there are no arguments at all.

        Forwards may write into the shards, unless `split_inputs` gives views. Whatever has no rows is
        repeated in every shard, the whole batch if nothing has any.

        Returns:
            The leaves of each shard.

        Raises:
            LengthMismatchError, UnsplittableError: as `num_rows`.
        """
        num_rows, to_split = self._rows or self._find_rows()
        if num_rows is None:
            return [self.leaves] * (num_lanes if self._specs else 1)
        sizes = split_sizes(num_rows, num_lanes)
        tensors = [leaf for leaf in to_split.values() if isinstance(leaf, Tensor)]
        of_tensors = iter((split_inputs or SplitInputs()).split(tensors, sizes, self.dim))
        columns = [
            leaf.split(sizes) if isinstance(leaf, PerRow) else next(of_tensors) for leaf in to_split.values()
        ]
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
        moved = moved_leaves(leaves, device)
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

    def _find_rows(self) -> tuple[int | None, dict[int, Tensor | PerRow]]:
        """Find and keep the number of rows, and the values that have them by their positions in `leaves`."""
        num_rows: int | None = None
        found: dict[int, Tensor | PerRow] = {}
        for position, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                if leaf.layout is not torch.strided or leaf.is_nested or leaf.is_meta:
                    raise rows.refusal(leaf, self._leaf_names()[position])
                if not -leaf.dim() <= self.dim < leaf.dim():
                    continue
                length = leaf.shape[self.dim]
            elif isinstance(leaf, PerRow):
                length = len(leaf)
            elif isinstance(leaf, _tree.Packed):
                raise rows.refusal(leaf, self._leaf_names()[position])
            else:
                continue
            if num_rows is not None and length != num_rows:
                self._check_sequences(num_rows, of_tensors=False)  # whose entries may differ in length
                names = self._leaf_names()
                first = names[next(iter(found))], num_rows
                raise LengthMismatchError(self.dim, first, (names[position], length))
            num_rows = length
            found[position] = leaf
        self._rows = num_rows, found
        return self._rows

    def _root_names(self) -> list[str]:
        """Name every argument as a user would: "argument 0", "keyword 'y'"."""
        args = self._names or [f"argument {position}" for position in range(len(self._args))]
        return [*args, *(f"keyword {key!r}" for key in self._kwargs)]

    def _leaf_names(self) -> list[str]:
        """Name every leaf as a user would: "argument 0['mask']"."""
        roots = zip(self._root_names(), self._specs, strict=True)
        return [root + path for root, spec in roots for path in _tree.paths(spec)]
