"""The compiled kernels' side of each call: what lies where, in which table, and one launch.

Inputs must be ready in the order of the current stream of the destination, or of their own device. A kernel
gets raw addresses, which torch's allocator cannot see: inputs on the destination stay alive by the caller's
hand, those of peers by `record_stream`, and what is allocated here belongs to the very stream that reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from math import prod

import torch
from torch import Tensor

from . import launch, plan, reference, transfer
from .build import SUMMED_DTYPES
from .plan import Table

# A complex number is two reals to a sum, and unsigned bytes wrap as signed ones do.
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_KERNEL_DTYPES = {torch.uint8: "int8", **{getattr(torch, name): name for name in SUMMED_DTYPES}}
_KERNEL_DTYPES |= {dtype: _KERNEL_DTYPES[real] for dtype, real in _REAL.items()}


def reduce_add_many(groups: Sequence[Sequence[Tensor]], destination: torch.device) -> list[Tensor]:
    """Sum every group as `reference.reduce_add_many`, with one launch for each dtype and number of inputs."""
    for group in groups:
        reference.check_summable(group[0].dtype)
    destination = _with_index(destination)
    tables: dict[tuple[str, int], Table] = defaultdict(Table)
    # Copies made on the way live until their launch is enqueued; the allocator keeps the order after it.
    alive: list[Tensor] = []
    totals = []
    with _current(destination):
        transfer.wait_for_sources(chain.from_iterable(groups), destination)
        for group in groups:
            if not _has_kernel(group):
                totals.append(reference.reduce_add(group, destination))
                continue
            total = torch.empty_like(group[0], device=destination)
            sources = [_in_layout_of(total, source) for source in transfer.bring(group, destination)]
            _add_sum(tables, total, sources)
            totals.append(total)
            alive += sources
        for (dtype, num_inputs), table in tables.items():
            _run(f"reduce_add_{dtype}", destination, table, num_inputs)
    return totals


def gather(tensors: Sequence[Tensor], dim: int, destination: torch.device) -> Tensor:
    """Concatenate as `reference.gather`, in one launch."""
    if not _has_copy_kernel(tensors, dim):
        return reference.gather(tensors, dim, destination)
    destination = _with_index(destination)
    order = _memory_order(tensors)
    axis = order.index(dim % len(order))
    with _current(destination):
        transfer.wait_for_sources(tensors, destination)
        chunks = [_in_memory_order(chunk, order) for chunk in transfer.bring(tensors, destination)]
        shape = list(chunks[0].shape)
        shape[axis] = sum(chunk.shape[axis] for chunk in chunks)
        whole = chunks[0].new_empty(shape, device=destination)
        table = Table()
        for target, source, *rectangle in _pieces(whole, chunks, axis):
            plan.add_copy(table, target, source, *rectangle)
        _run("copy", destination, table)
    return whole.permute(_inverse(order))


def split_copy(tensor: Tensor, sizes: Sequence[int], dim: int) -> list[Tensor]:
    """Split as `reference.split_copy`, in one launch."""
    if not _has_copy_kernel([tensor], dim) or sum(sizes) != tensor.shape[dim] or min(sizes) < 0:
        return reference.split_copy(tensor, sizes, dim)
    order = _memory_order([tensor])
    axis = order.index(dim % len(order))
    with _current(tensor.device):
        whole = _in_memory_order(tensor, order)
        before, after = whole.shape[:axis], whole.shape[axis + 1 :]
        chunks = [whole.new_empty((*before, size, *after)) for size in sizes]
        table = Table()
        for target, source, width, num_rows, target_pitch, source_pitch in _pieces(whole, chunks, axis):
            plan.add_copy(table, source, target, width, num_rows, source_pitch, target_pitch)
        _run("copy", tensor.device, table)
    return [chunk.permute(_inverse(order)) for chunk in chunks]


def _run(kernel: str, destination: torch.device, table: Table, *arguments: int) -> None:
    if not table.num_tiles:
        return
    # The copy from pinned memory is ordered before the kernel, and the allocators of both ends wait for it.
    pinned = torch.empty(len(table.values), dtype=torch.int64, pin_memory=True)
    pinned.copy_(torch.frombuffer(table.values, dtype=torch.int64))
    rows = pinned.to(destination, non_blocking=True)
    launch.launch(kernel, destination.index, table.num_tiles, rows.data_ptr(), table.num_rows, *arguments)


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device)


def _with_index(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


def _has_kernel(group: Sequence[Tensor]) -> bool:
    return group[0].dtype in _KERNEL_DTYPES and all(tensor.layout is torch.strided for tensor in group)


def _has_copy_kernel(tensors: Sequence[Tensor], dim: int) -> bool:
    """Tell whether these tensors fit side by side as they are; torch gives the error, or promotes, if not."""
    first = tensors[0]
    if not -first.dim() <= dim < first.dim():
        return False
    axis = dim % first.dim()
    return all(
        tensor.layout is torch.strided
        and tensor.dtype is first.dtype
        and tensor.shape[:axis] == first.shape[:axis]
        and tensor.shape[axis + 1 :] == first.shape[axis + 1 :]
        for tensor in tensors
    )


def _in_layout_of(total: Tensor, source: Tensor) -> Tensor:
    """Return `source` itself where its elements lie in memory as those of `total` do, else such a copy."""
    same = all(
        size < 2 or one == other
        for size, one, other in zip(total.shape, total.stride(), source.stride(), strict=True)
    )
    # Conjugation and negation may be mere marks on a tensor, which a raw address does not show.
    if same and not source.is_conj() and not source.is_neg():
        return source
    return torch.empty_like(total).copy_(source)


def _memory_order(tensors: Sequence[Tensor]) -> list[int]:
    """Return the dimensions from the slowest to the fastest, where all tensors agree; else as they come."""
    strides = tensors[0].stride()
    order = sorted(range(len(strides)), key=lambda i: -strides[i])
    agree = all(tensor.permute(order).is_contiguous() for tensor in tensors)
    return order if agree and not all(t.is_contiguous() for t in tensors) else list(range(len(strides)))


def _in_memory_order(tensor: Tensor, order: list[int]) -> Tensor:
    return tensor.resolve_conj().resolve_neg().permute(order).contiguous()


def _inverse(order: list[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def _add_sum(tables: dict[tuple[str, int], Table], total: Tensor, sources: Sequence[Tensor]) -> None:
    dtype = _REAL.get(total.dtype, total.dtype)
    numel = total.numel() * (total.itemsize // dtype.itemsize)
    addresses = [source.data_ptr() for source in sources]
    table = tables[_KERNEL_DTYPES[dtype], len(sources)]
    plan.add_sum(table, numel, dtype.itemsize, total.data_ptr(), addresses)


def _pieces(whole: Tensor, chunks: Sequence[Tensor], axis: int) -> Iterator[tuple[int, ...]]:
    """Say where each chunk lies in the whole, in bytes, as `plan.add_copy` takes it when gathering."""
    num_rows, inner = prod(whole.shape[:axis]), prod(whole.shape[axis + 1 :]) * whole.itemsize
    target = whole.data_ptr()
    for chunk in chunks:
        width = chunk.shape[axis] * inner
        yield target, chunk.data_ptr(), width, num_rows, whole.shape[axis] * inner, width
        target += width
