"""The words for values that are no tensors with rows: one entry per row, or the same for every lane."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from .._checks import shown


class PerRow(list[Any]):
    """A list with one entry for each row of a batch: texts, images, detection targets.

    As an input it is split like a tensor of that length: each forward gets a `PerRow`, which is a list,
    with the entries of its own rows. Entries themselves are never split; the tensors in them are moved to
    the lane's device. In the output of a forward it says the same, and the entries of all shards are joined
    in order, on the output device.

    Args:
        entries: a list, a tuple or anything else that can be iterated over.
    """

    def __init__(self, entries: Iterable[Any] = ()) -> None:
        if isinstance(entries, (str, bytes)) or not hasattr(entries, "__iter__"):
            raise TypeError(
                f"expected one entry per row, but got the {type(entries).__name__} {shown(entries)}. "
                "Put it into a list, or say asyncdp.Whole(value) if it belongs to the whole batch."
            )
        super().__init__(entries)

    def __repr__(self) -> str:
        return f"PerRow({super().__repr__()})"

    def split(self, sizes: Sequence[int]) -> list[PerRow]:
        """Split into parts of these lengths."""
        return [PerRow(self[begin:end]) for begin, end in pairwise(accumulate(sizes, initial=0))]


class Whole:
    """A value that belongs to the whole batch: every forward gets it as it is, whatever its length.

    Args:
        value: anything; the tensors in it are moved to the lane's device, and never split.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Whole({self.value!r})"
