"""The calls the rest of asyncdp makes: compiled kernels on CUDA where they can run, else the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .first_use import compiled


def reduce_add(tensors: Sequence[Tensor], destination: torch.device) -> Tensor:
    """Sum tensors of one size and dtype into a new tensor on `destination`.

    Runs on the calling thread and, on CUDA, on its current stream of `destination`. There the inputs must
    be ready in the order of that stream, or of the thread's current stream of their own device, and the
    caller keeps them alive until the stream has passed this call. Everything else is told by
    `reference.reduce_add`.

    Raises:
        UnsupportedDtypeError: for a dtype that has no sum, such as bool.
    """
    if not compiled(destination):
        return reference.reduce_add(tensors, destination)
    from . import cuda

    return cuda.reduce_add_many([tensors], destination)[0]


def reduce_add_many(groups: Sequence[Sequence[Tensor]], destination: torch.device) -> list[Tensor]:
    """Sum every group as `reduce_add` does, on CUDA in one launch for each dtype and number of lanes.

    Returns:
        One new tensor for each group, in their order.
    """
    if not compiled(destination):
        return reference.reduce_add_many(groups, destination)
    from . import cuda

    return cuda.reduce_add_many(groups, destination)


def gather(tensors: Sequence[Tensor], dim: int, destination: torch.device) -> Tensor:
    """Concatenate tensors along `dim` into a new tensor on `destination`; streams as in `reduce_add`."""
    if not compiled(destination):
        return reference.gather(tensors, dim, destination)
    from . import cuda

    return cuda.gather(tensors, dim, destination)


def split_copy(tensor: Tensor, sizes: Sequence[int], dim: int) -> list[Tensor]:
    """Copy the pieces of `tensor` along `dim` into tensors of their own; the dual of `gather`."""
    if not compiled(tensor.device):
        return reference.split_copy(tensor, sizes, dim)
    from . import cuda

    return cuda.split_copy(tensor, sizes, dim)
