"""Samples to a batch, and a batch's output to results; called on a lane."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from operator import attrgetter, is_, lt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._devices import LaneDevice
from .._runtime import trace
from .._tree import PerRow
from .._verbs.batch import arguments
from .._verbs.moving import prefetched
from ..errors import CollateError, SplitError
from .shapes import Shapes

Collate = Callable[[Sequence[Any]], Any]
"""Makes one batch of some samples; a tuple holds positional arguments, a dict keyword arguments."""

Split = Callable[[Any, Sequence[Any]], Sequence[Any]]
"""Takes the output of a batch and its samples, gives one result per sample."""


class StatedSample(NamedTuple):
    """A sample, and the state of the engine when it was called."""

    state: Any
    sample: Any


_state, _sample = map(attrgetter, StatedSample._fields)


@dataclass(frozen=True)
class Steps:
    """How samples become a batch, and an output becomes results.

    Attributes:
        splits_later: whether `split` needs values that are there only once the device has ended the batch.
    """

    collate: Collate
    split: Split
    shapes: Shapes | None = None
    splits_later: bool = False

    def on(self, driver: LaneDevice) -> Steps:
        """Return these steps around an engine, on a lane whose device may copy while it computes."""
        if not driver.prefetches:
            return self
        return replace(
            self,
            collate=lambda samples: prefetched(self.collate(samples), driver)(),
            splits_later=self.split is not unbind,  # which only makes views
        )

    def run(self, function: Callable[..., Any], samples: Sequence[Any]) -> Callable[[], Sequence[Any]]:
        """Collate and call a function, in one go; return what splits the output, to be called once."""
        recorder = trace.recorder
        if recorder is None:
            args, kwargs = self.arguments(samples)
            return partial(self.results, function(*args, **kwargs), samples)
        with recorder.step("collate"):
            args, kwargs = self.arguments(samples)
        with recorder.step("model"):
            output = function(*args, **kwargs)
        return partial(self._traced_results, output, samples)

    def run_as_called(
        self, function: Callable[..., Any], samples: Sequence[StatedSample]
    ) -> Callable[[], Sequence[Any]]:
        """Do what `run` does, together for all samples that were called in the same state."""
        first = samples[0].state
        if all(map(is_, map(_state, samples), repeat(first))):  # by far the most frequent case
            return self.run(partial(function, first), [*map(_sample, samples)])
        places: list[list[int]] = []
        for place, each in enumerate(samples):
            alike = (group for group in places if each.state.equals(samples[group[0]].state))
            found = next(alike, None)
            if found is None:
                places.append([place])
            else:
                found.append(place)
        splits = [
            self.run(partial(function, samples[group[0]].state), [samples[k].sample for k in group])
            for group in places
        ]

        def split() -> Sequence[Any]:
            results: dict[int, Any] = {}
            for group, own in zip(places, splits, strict=True):
                results.update(zip(group, own(), strict=True))
            return [results[place] for place in range(len(samples))]

        return split

    def arguments(self, samples: Sequence[Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Return what to call an engine with."""
        return arguments(self.collate(self._filled(samples)))

    def results(self, output: Any, samples: Sequence[Any]) -> Sequence[Any]:
        """Return one result for each sample."""
        filled = self._filled(samples)
        results = list(self.split(output, filled))
        if len(results) != len(filled):
            raise SplitError(f"split gave {len(results)} results instead of one for each", len(filled))
        return results[: len(samples)]

    def _traced_results(self, output: Any, samples: Sequence[Any]) -> Sequence[Any]:
        recorder = trace.recorder
        if recorder is None:
            return self.results(output, samples)
        with recorder.step("split"):
            return self.results(output, samples)

    def _filled(self, samples: Sequence[Any]) -> Sequence[Any]:
        return samples if self.shapes is None else self.shapes.filled(samples)


class Padding:
    """Counts what the default `collate` of one batcher pads, on whichever lane; in elements of tensors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._real = self._padded = 0
        self._of_batches: dict[int, tuple[Any, int]] = {}  # by the first sample, which keeps its `id` so

    def add(self, samples: Sequence[Any], counts: Sequence[tuple[int, int]]) -> None:
        """Count a batch, by what `_num_elements` gave for each of its leaves."""
        real, padded = (sum(each) for each in zip((0, 0), *counts, strict=True))
        with self._lock:
            self._real += real
            self._padded += padded
            if trace.recorder is not None:
                self._of_batches[id(samples[0])] = samples[0], padded - real

    def take(self, samples: Sequence[Any]) -> int | None:
        """Return what was padded in a batch that was traced, once; None if it was not collated."""
        found = [self._of_batches.pop(id(each), None) for each in map(_unstated, samples)]
        return sum(each[1] for each in found if each is not None) if any(found) else None

    def totals(self) -> tuple[int, int]:
        """Return how many elements the samples had, and how many the batches; from any thread."""
        with self._lock:
            return self._real, self._padded


def _unstated(sample: Any) -> Any:
    return sample.sample if isinstance(sample, StatedSample) else sample


def _num_elements(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Return the elements of some tensors, and those of a batch of them."""
    longest = map(max, zip(*(each.shape for each in tensors), strict=True))
    return sum(each.numel() for each in tensors), len(tensors) * math.prod(longest)


@dataclass(frozen=True)
class Stack:
    """The default `collate`: stack tensors, arrays and numbers, leaf by leaf; texts become lists.

    Tensors and NumPy values keep their dtype. Of Python's numbers, floats get torch's default dtype,
    ints int64 and bools bool.

    Args:
        pad: what fills tensors up to the longest of the batch, at the end of each dimension; None
            refuses tensors of unlike shapes.
        padding: counts what is padded.
        shapes: what to pad further to; needs `pad`.
    """

    pad: float | None = None
    padding: Padding | None = None
    shapes: Shapes | None = None

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return a batch of the samples' structure, each leaf of shape [num_samples, ...].

        Raises:
            CollateError: samples differ in structure, dtype or shape, or hold what cannot be stacked.
        """
        every, specs = zip(*map(_tree.flatten, samples), strict=True)
        for spec in specs:
            if spec is not specs[0] and spec != specs[0]:
                raise CollateError(f"samples differ in structure: {specs[0]} and {spec}")
        counts: list[tuple[int, int]] = []
        columns = zip(*every, strict=True)
        shape = None if self.shapes is None else self.shapes.of(samples)
        lengths = () if shape is None else shape[1:]
        batch = _tree.unflatten(specs[0], [self._stack(column, lengths, counts) for column in columns])
        if self.padding is not None:
            self.padding.add(samples, counts)
        return batch

    def _stack(self, column: tuple[Any, ...], lengths: Sequence[int], counts: list[tuple[int, int]]) -> Any:
        tensors = column
        if set(map(type, column)) != {Tensor}:
            if all(isinstance(leaf, (str, bytes)) for leaf in column):
                return list(column)
            tensors = tuple(map(_tensor, column))
        first = tensors[0]
        other = first
        for each in tensors:
            if each.dtype != first.dtype:
                # A conversion would make the result of a sample depend on the samples beside it.
                raise CollateError(f"samples differ in dtype: {first.dtype} and {each.dtype}")
            if each.shape != first.shape:
                other = each
        if other is first and not any(map(lt, first.shape, lengths)):
            batch = torch.stack(tensors)
        elif self.pad is None or any(each.dim() != first.dim() for each in tensors):
            raise CollateError(f"samples differ in shape: {list(first.shape)} and {list(other.shape)}")
        else:
            batch = _padded(tensors, self.pad, lengths)
        if self.padding is not None:
            counts.append(_num_elements(tensors))
        return batch


def _tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if not isinstance(leaf, (bool, int, float, complex)) and not hasattr(leaf, "__array__"):
        raise CollateError(f"a {type(leaf).__qualname__} cannot be stacked")
    try:
        return torch.as_tensor(leaf)
    except (TypeError, RuntimeError) as error:
        raise CollateError(str(error).rstrip(".")) from None


def _padded(tensors: Sequence[Tensor], pad: float, lengths: Sequence[int]) -> Tensor:
    first = tensors[0]
    for each in tensors:
        if each.device != first.device:
            raise CollateError(f"samples differ in device: {first.device} and {each.device}")
    longest = [max(each) for each in zip(*(each.shape for each in tensors), strict=True)]
    longest[: len(lengths)] = map(max, longest, lengths)
    batch = first.new_full((len(tensors), *longest), pad)
    for row, each in zip(batch, tensors, strict=True):
        row[tuple(slice(length) for length in each.shape)] = each
    return batch


def unbind(output: Any, samples: Sequence[Any]) -> Sequence[Any]:
    """Give row `i` of every tensor to sample `i`, and other leaves to all: the default `split`.

    Of a `PerRow` it gives entry `i`. An output of nothing but None and empty containers goes to all, too.

    Raises:
        SplitError: a tensor has not one row per sample, or there is none although there are values.
    """
    leaves, spec = _tree.flatten(output)
    has_rows = any(isinstance(leaf, (Tensor, PerRow)) for leaf in leaves)
    if not has_rows and any(leaf is not None for leaf in leaves):
        raise SplitError(f"a {type(output).__qualname__} without tensors has no row for each", len(samples))
    columns = [_rows(leaf, len(samples)) for leaf in leaves]
    rows = zip(*columns, strict=True) if columns else [()] * len(samples)
    return list(map(partial(_tree.unflatten, spec), rows))


def _rows(leaf: Any, num_samples: int) -> Sequence[Any]:
    if isinstance(leaf, PerRow):
        if len(leaf) != num_samples:
            raise SplitError(f"a PerRow of {len(leaf)} entries has not one for each", num_samples)
        return leaf
    if not isinstance(leaf, Tensor):
        return [leaf] * num_samples
    if not leaf.shape or leaf.shape[0] != num_samples:
        raise SplitError(f"an output of shape {list(leaf.shape)} has not one row for each", num_samples)
    return leaf.unbind()
