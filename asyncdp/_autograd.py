"""The differentiable duals of a pass: Scatter and Gather, Broadcast and ReduceAdd.

Each one's backward is the other, so that gradients of gradients come for free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _kernels
from ._torch_private import is_in_backward
from .errors import GatherError, ReduceAddDtypeError, ReduceAddInForwardError, ReduceAddSizeError


class Scatter(Function):
    """Split a tensor along a dimension without a copy. Dual: `Gather`."""

    @staticmethod
    def forward(
        ctx: Any, dim: int, sizes: Sequence[int], tensor: Tensor, as_views: bool = True
    ) -> tuple[Tensor, ...]:
        """Return one shard of `tensor` for each length in `sizes`.

        Args:
            ctx: torch's context.
            dim: the dimension to split.
            sizes: lengths along `dim`.
            tensor: what to split.
            as_views: return views, which torch lets nobody write into; else the shards may be written in
                place, and `MarkWritten` has to follow.
        """
        ctx.dim, ctx.device = dim, tensor.device
        split = torch.split_with_sizes if as_views else torch.unsafe_split_with_sizes
        shards = split(tensor, list(sizes), dim)
        ctx.shapes = [shard.shape for shard in shards]
        ctx.set_materialize_grads(False)
        return tuple(shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Gather the shards' gradients; a shard that nothing depends on counts as zeros."""
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return None, None, None, None
        filled = [
            given.new_zeros(shape) if grad is None else grad
            for grad, shape in zip(grads, ctx.shapes, strict=True)
        ]
        return None, None, Gather.apply(ctx.device, ctx.dim, *filled), None


class MarkWritten(Function):
    """Mark a tensor as written in place, after its shards, which share its memory, were."""

    @staticmethod
    def forward(ctx: Any, dim: int, tensor: Tensor, *shards: Tensor) -> Tensor:
        """Return `tensor`, whose gradient flows to the shards from now on."""
        ctx.dim = dim
        ctx.sizes = [shard.shape[dim] for shard in shards]
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Scatter the whole gradient to the shards: nothing of the tensor's earlier values is left."""
        return None, None, *Scatter.apply(ctx.dim, ctx.sizes, grad)


class Gather(Function):
    """Concatenate tensors of any devices along a dimension. Dual: `Scatter`."""

    @staticmethod
    def forward(ctx: Any, device: torch.device, dim: int, *shards: Tensor) -> Tensor:
        """Return one tensor on `device`."""
        ctx.dim = dim
        ctx.devices = [shard.device for shard in shards]
        ctx.set_materialize_grads(False)
        output = concatenate(shards, dim, device)
        ctx.sizes = [shard.shape[dim] for shard in shards]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        """Scatter the gradient back to where each shard came from."""
        if grad is None:
            return (None, None, *(None for _ in ctx.devices))
        shards = Scatter.apply(ctx.dim, ctx.sizes, grad)
        return (
            None,
            None,
            *(shard.to(device) for shard, device in zip(shards, ctx.devices, strict=True)),
        )


class Broadcast(Function):
    """Give each device its own of every tensor. Dual: `ReduceAdd`."""

    @staticmethod
    def forward(
        ctx: Any, devices: Sequence[torch.device], copy: bool | Sequence[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return `len(devices) * len(tensors)` tensors, those of the first device first.

        Args:
            ctx: torch's context.
            devices: one per lane.
            copy: whether a tensor that is on a lane's device already gets storage of its own there; for all
                lanes, or for each.
            *tensors: what to give to every device.
        """
        ctx.sources = [tensor.device for tensor in tensors]
        ctx.set_materialize_grads(False)
        copies = [copy] * len(devices) if isinstance(copy, bool) else copy
        lanes = [*zip(devices, copies, strict=True)]
        outputs = [_own(tensor, device, copied) for device, copied in lanes for tensor in tensors]
        # Without this, one trainable parameter would make frozen ones and buffers require gradients too.
        trainable = ctx.needs_input_grad[2:] * len(devices)
        ctx.mark_non_differentiable(
            *(output for output, needed in zip(outputs, trainable, strict=True) if not needed)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Sum over the lanes. A tensor that no lane used gets no gradient, not zeros."""
        num_tensors = len(ctx.sources)
        groups = [
            [grad for grad in grads[position::num_tensors] if grad is not None]
            for position in range(num_tensors)
        ]
        return (None, None, *_sum_groups(groups, ctx.sources))


class ReduceAdd(Function):
    """Sum tensors of any devices on one device. Dual: `Broadcast`. Only for backward passes."""

    @staticmethod
    def forward(ctx: Any, destination: torch.device, *tensors: Tensor) -> Tensor:
        """Return the sum on `destination`.

        Raises:
            ReduceAddInForwardError: the result would need a gradient and no backward pass runs.
            ReduceAddSizeError: sizes differ.
            ReduceAddDtypeError: dtypes differ.
        """
        if any(ctx.needs_input_grad) and not is_in_backward():
            raise ReduceAddInForwardError
        _check_alike(tensors)
        ctx.devices = [tensor.device for tensor in tensors]
        return _kernels.reduce_add(tensors, destination)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Give every summand the gradient of the sum."""
        return (None, *Broadcast.apply(ctx.devices, False, grad))


def concatenate(shards: Sequence[Tensor], dim: int, device: torch.device) -> Tensor:
    """Return what `Gather` returns, without recording it for a backward.

    Raises:
        GatherError: the sizes do not fit together.
    """
    try:
        if device.type == "cuda":
            return _kernels.gather(shards, dim, device)
        return torch.cat([shard if shard.device == device else shard.to(device) for shard in shards], dim)
    except (RuntimeError, IndexError) as error:
        layout = shards[0].layout
        if layout not in (torch.strided, torch.sparse_coo):
            remedy = "Return tensor.to_sparse_coo() or tensor.to_dense()."
            raise GatherError(f"torch does not concatenate {layout} tensors", remedy) from error
        if _fit(shards, dim):
            raise
        shapes = ", ".join(str(list(shard.shape)) for shard in shards)
        raise GatherError(f"sizes {shapes} do not fit together along dim {dim}") from error


def _fit(shards: Sequence[Tensor], dim: int) -> bool:
    """Return whether sizes differ along `dim` only, so that something else made their gather fail."""
    shapes = [list(shard.shape) for shard in shards]
    if not all(-len(shape) <= dim < len(shape) for shape in shapes):
        return False
    for shape in shapes:
        shape[dim] = 0
    return all(shape == shapes[0] for shape in shapes)


def _own(tensor: Tensor, device: torch.device, copy: bool) -> Tensor:
    if copy or tensor.device != device:
        return tensor.detach().to(device, non_blocking=device.type == "cuda", copy=True)
    return tensor.detach()


def _sum_groups(
    groups: Sequence[Sequence[Tensor]], destinations: Sequence[torch.device]
) -> list[Tensor | None]:
    """Sum each group on its destination; an empty group gives None.

    Autograd has checked that every gradient has the size and dtype of its tensor.
    """
    sums: list[Tensor | None] = [None] * len(groups)
    to_reduce: dict[torch.device, list[int]] = {}
    for position, (group, destination) in enumerate(zip(groups, destinations, strict=True)):
        if not group:
            continue
        if len(group) == 1 and group[0].device == destination:
            sums[position] = group[0]
        elif torch.is_grad_enabled():  # create_graph: the sum itself must be differentiable
            sums[position] = ReduceAdd.apply(destination, *group)
        else:
            to_reduce.setdefault(destination, []).append(position)
    for destination, positions in to_reduce.items():
        totals = _kernels.reduce_add_many([groups[position] for position in positions], destination)
        for position, total in zip(positions, totals, strict=True):
            sums[position] = total
    return sums


def _check_alike(tensors: Sequence[Tensor]) -> None:
    first = tensors[0]
    for other in tensors[1:]:
        if other.shape != first.shape:
            raise ReduceAddSizeError(other.shape, first.shape)
        if other.dtype != first.dtype:
            raise ReduceAddDtypeError(other.dtype, first.dtype)
