"""The few shapes that batches of a batcher are padded to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from operator import le
from typing import Any

from .. import _tree
from .._checks import shown


class Shapes:
    """The few shapes that batches are padded to, so that graphs and compiled code fit them.

    Args:
        shapes: of each the number of samples, then lengths; a lone number is one of samples.
    """

    def __init__(self, shapes: Sequence[int | Sequence[int]]) -> None:
        as_tuples = [(each,) if isinstance(each, int) else tuple(each) for each in shapes]
        self._shapes = sorted(as_tuples, key=math.prod)
        self.has_lengths = any(len(shape) > 1 for shape in self._shapes)

    def of(self, samples: Sequence[Any]) -> Sequence[int] | None:
        """Return the smallest shape that holds a batch of samples; None if none does."""
        longest: list[int] = []
        if self.has_lengths:
            leaves = [leaf for sample in samples for leaf in _tree.flatten(sample)[0]]
            every = [leaf.shape for leaf in leaves if hasattr(leaf, "shape")]
            longest = [max(lengths) for lengths in zip_longest(*every, fillvalue=0)]
        return next((shape for shape in self._shapes if _holds(shape, len(samples), longest)), None)

    def filled(self, samples: Sequence[Any]) -> Sequence[Any]:
        """Return as many samples as the shape of their batch has, the last one again and again."""
        shape = self.of(samples)
        if shape is None:
            return samples
        return [*samples, *[samples[-1]] * (shape[0] - len(samples))]


def _holds(shape: Sequence[int], num_samples: int, longest: Sequence[int]) -> bool:
    # What a shape says nothing of may be as it is.
    return num_samples <= shape[0] and all(map(le, longest, shape[1:]))


def checked_shapes(pad_to: Any, *, can_pad: bool) -> Shapes | None:
    """Return what a user has asked for; `can_pad` says whether lengths can be padded to.

    Raises:
        ValueError: it is no list of shapes, or nothing pads to its lengths.
    """
    if pad_to is None:
        return None
    every = list(pad_to) if isinstance(pad_to, (list, tuple)) else []
    shapes = [tuple(each) if isinstance(each, (list, tuple)) else (each,) for each in every]
    numbers = [number for shape in shapes for number in shape]
    are_counts = all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in numbers)
    if not shapes or not all(shapes) or not are_counts:
        raise ValueError(
            f"pad_to must hold shapes such as (8, 64), 8 samples of length 64, or numbers of samples, "
            f"but got {shown(pad_to)}."
        )
    found = Shapes(shapes)
    if found.has_lengths and not can_pad:
        raise ValueError(
            "pad_to has lengths, which the default collate pads to with the value pad=. "
            "Pass pad=, and no collate of your own, or give numbers of samples only."
        )
    return found
