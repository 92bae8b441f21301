"""Writes that no version counts, as by way of `.data` or `.numpy()`: seen by reading the values."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from .._torch_private import version_of

# Of larger tensors a sample of about so many elements is read.
_MAX_SAMPLE = 4096


def checksum_of(tensor: Tensor) -> int:
    """Return a checksum of all values of a tensor, on any device."""
    # A copy: memory that NumPy has seen can no longer be resized.
    copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    return zlib.crc32(copied.reshape(-1).view(torch.uint8).numpy().data)


def close_look(tensor: Tensor) -> tuple[int, int]:
    """Return what is another after most writes into a tensor, whether they count as a version or not."""
    return 0 if tensor.is_inference() else version_of(tensor), _sample(tensor)


def _sample(tensor: Tensor) -> int:
    # Other devices' values are not worth waiting for; of subclasses nobody knows where their values are.
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_quantized:
        return 0
    if type(tensor) not in (Tensor, nn.Parameter):
        return 0
    with torch.no_grad():
        flat = tensor.detach().reshape(-1)
        return checksum_of(flat[:: len(flat) // _MAX_SAMPLE + 1])
