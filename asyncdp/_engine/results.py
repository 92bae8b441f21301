"""What results of one batch on different numbers of lanes have in common; pure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._tree import PerRow

_MAX_UNLIKE = 0.01  # of the elements: an argmax may fall otherwise where two values are close
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # others, and all under autocast: that of bfloat16
_COARSE = 3e-2


def growth(result: Any, num_rows: int, dim: int) -> tuple[int | None, ...] | None:
    """Return how many rows each output has per row of input; None if an output has no such ratio.

    A result that has one, and the same on any number of lanes, does not depend on how many there were.
    """
    ratios: list[int | None] = []
    for leaf in _tree.flatten(result)[0]:
        if isinstance(leaf, Tensor):
            if not -leaf.dim() <= dim < leaf.dim() or num_rows == 0 or leaf.shape[dim] % num_rows:
                return None
            ratios.append(leaf.shape[dim] // num_rows)
        elif isinstance(leaf, PerRow):
            if len(leaf) != num_rows:
                return None
            ratios.append(1)
        elif leaf is None or isinstance(leaf, (str, bool)):
            ratios.append(None)
        else:
            return None
    return tuple(ratios)


def layout(result: Any) -> Any:
    """Return the structure of a result and the shapes of all tensors in it."""
    leaves, spec = _tree.flatten(result)
    return spec, [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]


def have_like_values(result: Any, other: Any, *, is_coarse: bool) -> bool:
    """Return whether the tensors of two results of the same layout hold the same, but for rounding.

    Args:
        result: one of them.
        other: the other one.
        is_coarse: whether numbers were computed in a dtype of fewer digits than theirs.
    """
    pairs = zip(_tree.flatten(result)[0], _tree.flatten(other)[0], strict=True)
    return all(
        _are_alike(a.detach(), b.detach(), is_coarse)
        for a, b in pairs
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.layout == b.layout == torch.strided
    )


def _are_alike(a: Tensor, b: Tensor, is_coarse: bool) -> bool:
    if a.is_nested or a.is_quantized or a.numel() == 0:
        return True
    if a.is_floating_point() or a.is_complex():
        tolerance = _COARSE if is_coarse else _TOLERANCE.get(a.dtype, _COARSE)
        unlike = ~torch.isclose(a, b, rtol=tolerance, atol=0.0, equal_nan=True)
        # Small values beside large ones are what rounding left of them.
        unlike &= ~((a - b).abs() <= tolerance * b.nan_to_num(0.0, 0.0, 0.0).abs().mean())
    else:
        unlike = a != b
    return unlike.float().mean().item() <= _MAX_UNLIKE
