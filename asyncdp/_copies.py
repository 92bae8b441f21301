"""Copies of a module's tensors on other devices: few large transfers, made only when something changed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._buckets import buckets


class Stamp(NamedTuple):
    """Tells whether a tensor's values may have changed."""

    version: int
    address: int
    checksum: int = 0

    @classmethod
    def of(cls, tensor: Tensor, *, checksum: bool = False) -> Stamp | None:
        """None for inference tensors, which count no versions: they always may have changed.

        Args:
            tensor: what to look at.
            checksum: read the values too, for changes that no version tells of.
        """
        if tensor.is_inference():
            return None
        is_dense = tensor.layout is torch.strided
        return cls(
            tensor._version,
            tensor.data_ptr() if is_dense else 0,
            _checksum(tensor) if checksum and is_dense else 0,
        )


def copies_on(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to `device`; those that come from another one in buckets, one transfer for each.

    Returns:
        One copy per tensor, of the same strides. No gradient leads back, and none is an inference tensor.
    """
    # Outside inference mode, whose tensors could not be used by a later pass that trains.
    with torch.inference_mode(False), torch.no_grad():
        if all(tensor.device == device for tensor in tensors):
            return [tensor.detach().to(device, copy=True) for tensor in tensors]
        copies: dict[int, Tensor] = {}
        for group in _transfers(tensors, device):
            copies.update(zip(map(id, group), flat_copies(group, device), strict=True))
        return [
            copies[id(tensor)] if id(tensor) in copies else tensor.detach().to(device, copy=True)
            for tensor in tensors
        ]


def flat_copies(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy contiguous tensors of one device and dtype to `device` in a single transfer."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(device)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    # Through .data: as views they would share one version, and a change of one would count for all.
    return [piece.view(tensor.shape).data for piece, tensor in zip(pieces, tensors, strict=True)]


def _transfers(tensors: Sequence[Tensor], device: torch.device) -> list[list[Tensor]]:
    """The tensors that can travel together."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and tensor.is_contiguous() and tensor.device != device:
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return [bucket for group in groups.values() for bucket in buckets(group)]


def _checksum(tensor: Tensor) -> int:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(values.numpy().data)
