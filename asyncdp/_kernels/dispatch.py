"""The calls the rest of asyncdp makes: compiled kernels on CUDA where they can run, else plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .first_use import compiled


def reduce_add(tensors: Sequence[Tensor], destination: torch.device) -> Tensor:
    """Sum tensors of one size and dtype into a new tensor on `destination`.

    Runs on the calling thread and, on CUDA, on its current stream of `destination`. There the inputs must
    be ready in the order of that stream, or of the thread's current stream of their own device, and the
    caller keeps them alive until the stream has passed this call. The result is that of
    `reference.reduce_add`, bit for bit.

    Raises:
        UnsupportedDtypeError: for a dtype that has no sum, such as bool.
    """
    kernels = _compiled_kernels(destination)
    if kernels is None:
        return reference.reduce_add(tensors, destination)
    return kernels.reduce_add_many([tensors], destination)[0]  # type: ignore[no-any-return]


def reduce_add_many(groups: Sequence[Sequence[Tensor]], destination: torch.device) -> list[Tensor]:
    """Sum every group as `reduce_add` does, on CUDA in one launch for each dtype and number of inputs.

    Returns:
        One new tensor for each group, in their order.
    """
    kernels = _compiled_kernels(destination) or reference
    return kernels.reduce_add_many(groups, destination)  # type: ignore[no-any-return]


def gather(tensors: Sequence[Tensor], dim: int, destination: torch.device) -> Tensor:
    """Concatenate tensors of any devices along `dim` into a new tensor on `destination`.

    Streams and lifetimes are as in `reduce_add`.

    Raises:
        RuntimeError, IndexError: from torch, where the tensors do not fit together.
    """
    kernels = _compiled_kernels(destination)
    if kernels is not None and kernels.has_copy_kernel(tensors, dim):
        return kernels.gather(tensors, dim, destination)  # type: ignore[no-any-return]
    # Comparing devices is quicker than a `.to` that has nothing to do, which matters to small outputs.
    return torch.cat(
        [tensor if tensor.device == destination else tensor.to(destination) for tensor in tensors], dim
    )


def _compiled_kernels(device: torch.device) -> ModuleType | None:
    """Return the compiled kernels of `device`, or None where this call runs plain torch."""
    if device.type != "cuda" or not compiled(device):
        return None
    from . import cuda

    return cuda
