"""The calls of the compiled kernels: which addresses go into which table, and one launch.

Inputs must be ready in the order of the current stream of the destination, or of their own device. A kernel
gets raw addresses, which torch's allocator cannot see: the caller keeps inputs on the destination alive,
`record_stream` those of peers, and what is allocated here belongs to the stream that reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch, plan, reference, transfer
from .build import SUMMED_DTYPES
from .chain import with_index
from .plan import Copy, Table


class _Sum(NamedTuple):
    """How tensors of a dtype are summed: by which kernel, as numbers of which size, how many per element."""

    kernel: str
    itemsize: int
    num_parts: int = 1


_SUMS = {
    dtype: _Sum(f"reduce_add_{name}", dtype.itemsize)
    for name, dtype in ((name, getattr(torch, name)) for name in SUMMED_DTYPES)
}
# A complex number is two reals to a sum, and unsigned bytes wrap as signed ones do.
_SUMS[torch.complex64] = _SUMS[torch.float32]._replace(num_parts=2)
_SUMS[torch.complex128] = _SUMS[torch.float64]._replace(num_parts=2)
_SUMS[torch.uint8] = _SUMS[torch.int8]


class _Batch:
    """The sums of one launch: all of one kernel and one number of inputs."""

    def __init__(self) -> None:
        self.numels: list[int] = []
        self.addresses: list[list[int]] = []
        # Copies of inputs must live until the launch is enqueued; from then on the allocator keeps the order.
        self.tensors: list[Sequence[Tensor]] = []

    def add(self, total: Tensor, sources: Sequence[Tensor], num_parts: int) -> None:
        self.numels.append(total.numel() * num_parts)
        self.addresses.append([total.data_ptr(), *[source.data_ptr() for source in sources]])
        self.tensors.append(sources)


def reduce_add_many(groups: Sequence[Sequence[Tensor]], destination: torch.device) -> list[Tensor]:
    """Sum every group as `reference.reduce_add_many`, with one launch for each dtype and number of inputs."""
    for group in groups:
        reference.check_summable(group[0].dtype)
    destination = with_index(destination)
    batches: dict[tuple[_Sum, int], _Batch] = defaultdict(_Batch)
    totals = []
    with torch.cuda.device(destination):
        foreign = transfer.wait_for_sources(chain.from_iterable(groups), destination)
        for group in groups:
            how = _SUMS.get(group[0].dtype)
            if how is None or {tensor.layout for tensor in group} != {torch.strided}:
                totals.append(reference.reduce_add(group, destination))
                continue
            total = torch.empty_like(group[0], device=destination)
            brought = transfer.bring(group, destination) if foreign else group
            batches[how, len(group)].add(total, _in_layout_of(total, brought), how.num_parts)
            totals.append(total)
        for (how, num_inputs), batch in batches.items():
            table = plan.sum_table(batch.numels, batch.addresses, how.itemsize)
            _run(how.kernel, destination, table, num_inputs)
    return totals


def has_copy_kernel(tensors: Sequence[Tensor], dim: int) -> bool:
    """Return whether `gather` takes these tensors.

    For others, torch's concatenation converts dtypes, or raises the error that says why they do not fit.
    """
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


def gather(tensors: Sequence[Tensor], dim: int, destination: torch.device) -> Tensor:
    """Concatenate tensors that `has_copy_kernel` accepts, in one launch."""
    destination = with_index(destination)
    order = _memory_order(tensors)
    axis = order.index(dim % len(order))
    with torch.cuda.device(destination):
        transfer.wait_for_sources(tensors, destination)
        shards = [
            _in_memory_order(shard, order, destination) for shard in transfer.bring(tensors, destination)
        ]
        shape = list(shards[0].shape)
        shape[axis] = sum(shard.shape[axis] for shard in shards)
        whole = shards[0].new_empty(shape, device=destination)
        _run("copy", destination, plan.copy_table(_copies(whole, shards, axis)))
    return whole.permute([order.index(i) for i in range(len(order))])


def _run(kernel: str, destination: torch.device, table: Table, *arguments: int) -> None:
    if not table.num_tiles:
        return
    # The copy from pinned memory is ordered before the kernel; neither allocator reuses its memory earlier.
    pinned = torch.empty(table.rows.shape, dtype=torch.int64, device="cpu", pin_memory=True)
    pinned.copy_(torch.from_numpy(table.rows))
    rows = pinned.to(destination, non_blocking=True)
    launch.launch(kernel, destination.index, table.num_tiles, rows.data_ptr(), len(table.rows), *arguments)


def _in_layout_of(total: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """Return each source whose elements lie in memory as those of `total` do, and such a copy of others."""
    strides = total.stride()
    # Conjugation and negation may be flags of a tensor, which its memory does not show.
    return [
        source
        if source.stride() == strides and not source.is_neg() and not source.is_conj()
        else torch.empty_like(total).copy_(source)
        for source in sources
    ]


def _memory_order(tensors: Sequence[Tensor]) -> list[int]:
    """Return the dimensions from the slowest to the fastest, where all tensors agree; else as they come."""
    strides = tensors[0].stride()
    order = sorted(range(len(strides)), key=lambda i: -strides[i])
    agree = all(tensor.permute(order).is_contiguous() for tensor in tensors)
    return order if agree and not all(t.is_contiguous() for t in tensors) else list(range(len(strides)))


def _in_memory_order(tensor: Tensor, order: list[int], device: torch.device) -> Tensor:
    """Return the tensor with its slowest dimension first, in one dense run of memory."""
    if not tensor.permute(order).is_contiguous() or tensor.is_conj() or tensor.is_neg():
        # Moved first: a copy on another device's stream would need an event of its own.
        tensor = tensor.to(device).resolve_conj().resolve_neg()
    return tensor.permute(order).contiguous()


def _copies(whole: Tensor, shards: Sequence[Tensor], axis: int) -> Iterator[Copy]:
    """Yield the copy of each shard into its place in `whole`."""
    num_rows, inner = prod(whole.shape[:axis]), prod(whole.shape[axis + 1 :]) * whole.itemsize
    pitch = whole.shape[axis] * inner
    target = whole.data_ptr()
    for shard in shards:
        width = shard.shape[axis] * inner
        yield Copy(target, shard.data_ptr(), width, num_rows, pitch, width)
        target += width
