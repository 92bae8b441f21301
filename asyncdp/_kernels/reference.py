"""Sums in plain torch: what the compiled kernels are tested against, and all there is off CUDA.

Sums run from the first tensor to the last, so that a compiled kernel can give the very same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedDtypeError

# Half types round at each addition; a wider accumulator is rounded once, at the end.
_ACCUMULATE_IN = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
_SUMMABLE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.complex64,
        torch.complex128,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        *_ACCUMULATE_IN,
    }
)
_SPARSE_LAYOUTS = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc})


def check_summable(dtype: torch.dtype) -> None:
    """Refuse a dtype that has no sum.

    Raises:
        UnsupportedDtypeError: for bool, unsigned types over 8 bits, 8-bit floats and quantised types.
    """
    if dtype not in _SUMMABLE:
        raise UnsupportedDtypeError("reduce-add", dtype)


def reduce_add(tensors: Sequence[Tensor], destination: torch.device) -> Tensor:
    """Sum tensors into a new one.

    Args:
        tensors: at least one; all of one size and dtype, on any devices.
        destination: device of the result.

    Returns:
        A tensor that shares no memory with any input, of their size and dtype. Its strides are those of
        the first tensor where that is dense. float16 and bfloat16 are summed in float32 and rounded
        once; integers wrap. Sparse tensors of one layout (COO, CSR, CSC) give that layout, anything
        mixed gives a dense tensor.

    Raises:
        UnsupportedDtypeError: for a dtype that has no sum, such as bool.
    """
    assert tensors, "reduce_add needs at least one tensor"
    check_summable(tensors[0].dtype)
    layouts = {tensor.layout for tensor in tensors}
    if layouts == {torch.strided}:
        return _reduce_dense(tensors, destination)
    if len(layouts) == 1 and layouts <= _SPARSE_LAYOUTS:
        return _reduce_sparse(tensors, destination)
    return _reduce_dense([_dense(tensor) for tensor in tensors], destination)


def reduce_add_many(groups: Sequence[Sequence[Tensor]], destination: torch.device) -> list[Tensor]:
    """Sum every group of tensors as `reduce_add` does; results in the order of the groups."""
    return [reduce_add(group, destination) for group in groups]


def _reduce_dense(tensors: Sequence[Tensor], destination: torch.device) -> Tensor:
    dtype = tensors[0].dtype
    total = tensors[0].to(destination, _ACCUMULATE_IN.get(dtype, dtype), copy=True)
    for tensor in tensors[1:]:
        total.add_(tensor.to(destination))
    return total.to(dtype)


def _reduce_sparse(tensors: Sequence[Tensor], destination: torch.device) -> Tensor:
    dtype, layout = tensors[0].dtype, tensors[0].layout
    wide = _ACCUMULATE_IN.get(dtype, dtype)
    # Compressed layouts have no addition on every device; coordinates do.
    moved = [tensor.to_sparse(layout=torch.sparse_coo).to(destination, wide) for tensor in tensors]
    total = moved[0].clone()
    for tensor in moved[1:]:
        total = total + tensor
    total = total.coalesce().to(dtype)
    return total if layout is torch.sparse_coo else total.to_sparse(layout=layout)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
