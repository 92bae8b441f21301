"""Which values have rows, which cannot be split, and which lists may be read in two ways."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Sequence
from typing import Any

import optree
from torch import Tensor

from .. import _tree
from .._tree import PerRow, Whole
from ..errors import MetaTensorError, UnsplittableError

_IN_FORWARD = "or make it inside forward from tensors that have rows."


def refusal(leaf: Any, name: str) -> UnsplittableError | MetaTensorError:
    """Return the error for a value that has no rows along a dimension, or no values at all."""
    if isinstance(leaf, _tree.Packed):
        remedy = "Pass the padded tensor and the lengths, and pack inside forward."
        return UnsplittableError(type(leaf.sequence).__qualname__, name, remedy)
    if leaf.is_meta:
        return MetaTensorError(name)
    if leaf.is_nested:
        remedy = f"Pass asyncdp.PerRow(tensor.unbind()), one tensor per row, {_IN_FORWARD}"
        return UnsplittableError("nested tensor", name, remedy)
    layout = str(leaf.layout).removeprefix("torch.")
    remedy = f"Pass asyncdp.Whole(tensor) if it belongs to the whole batch, tensor.to_dense(), {_IN_FORWARD}"
    return UnsplittableError(f"{layout} tensor", name, remedy)


def detached(leaf: Any) -> Any:
    """Return a leaf that no gradient flows back to."""
    if isinstance(leaf, Tensor):
        return leaf.detach()
    if isinstance(leaf, PerRow):
        return PerRow(_tree.map_leaves(detached, list(leaf)))
    return Whole(_tree.map_leaves(detached, leaf.value)) if isinstance(leaf, Whole) else leaf


def ambiguous(
    tree: Any, num_rows: int, dim: int, *, except_root: bool, of_tensors: bool
) -> tuple[str, Any] | None:
    """Return the path to a list, tuple or array that may hold one entry per row, and itself; or None.

    Tensors with rows, alone or in sequences of their own (the layers of a model), are in no doubt.

    Args:
        tree: an input.
        num_rows: the length of the tensors beside it.
        dim: the dimension that is split.
        except_root: whether `tree` itself is in no doubt.
        of_tensors: whether sequences of tensors without rows are in doubt.
    """
    for path, sequence in _sequences(tree, (list, tuple), arrays=True):
        if _is_array(sequence):
            if len(sequence) == num_rows:
                return path, sequence
            continue
        if len(sequence) == num_rows and not (except_root and sequence is tree):
            has_other = any(not _has_rows(entry, num_rows, dim) for entry in sequence)
            if has_other and (of_tensors or not _is_all_tensors(sequence)) and not _is_all_none(sequence):
                return path, sequence
    return None


def unmarked(output: Any, num_rows: int) -> dict[str, list[Any]]:
    """Return the lists of an output that may hold one entry for each row of its shard, by their paths."""
    return {
        path: sequence
        for path, sequence in _sequences(output, (list,))
        if len(sequence) == num_rows and not _is_all_tensors(sequence) and not _is_all_none(sequence)
    }


def _sequences(tree: Any, kinds: Sequence[type], *, arrays: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield every plain sequence of a tree with its path, the outer ones first; arrays too if asked for."""
    if isinstance(tree, Tensor):
        return
    if optree.tree_is_leaf(tree, none_is_leaf=True, namespace=_tree.NAMESPACE):
        if arrays and _is_array(tree):
            yield "", tree
        return
    if type(tree) in kinds:
        yield "", tree
    children, _, entries, _ = optree.tree_flatten_one_level(
        tree, none_is_leaf=True, namespace=_tree.NAMESPACE
    )
    is_indexed = isinstance(tree, (list, tuple, dict, UserDict))
    for entry, child in zip(entries, children, strict=True):
        place = f"[{entry!r}]" if is_indexed else f".{entry}"
        for path, sequence in _sequences(child, kinds, arrays=arrays):
            yield place + path, sequence


def _is_array(value: Any) -> bool:
    """Return whether a value is an array of NumPy's kind that has a length, or a table of such."""
    return hasattr(value, "__array__") and bool(getattr(value, "shape", ()))


def _has_rows(entry: Any, num_rows: int, dim: int) -> bool:
    if type(entry) in (list, tuple):
        return all(_has_rows(each, num_rows, dim) for each in entry)
    if isinstance(entry, Tensor):
        return -entry.dim() <= dim < entry.dim() and entry.shape[dim] == num_rows
    return entry is None or (isinstance(entry, PerRow) and len(entry) == num_rows)


def _is_all_none(sequence: Any) -> bool:
    return all(entry is None for entry in sequence)


def _is_all_tensors(entry: Any) -> bool:
    if type(entry) in (list, tuple):
        return all(map(_is_all_tensors, entry))
    return entry is None or isinstance(entry, (Tensor, PerRow))
