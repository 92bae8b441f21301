"""Copies of a module's tensors on other devices: few large transfers, made only when something changed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .buckets import buckets

_STRIDED = torch.strided


class Stamp(NamedTuple):
    """Tells whether a tensor's values may have changed.

    For longer than a storage lives only together with `hold_storages`: another storage may get the place
    in memory of one that is gone.
    """

    version: int
    storage: int = 0
    address: int = 0
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
        if tensor.layout is not _STRIDED:
            return cls(tensor._version)
        return cls(
            tensor._version,
            tensor.untyped_storage()._cdata,
            tensor.data_ptr(),
            _checksum(tensor) if checksum else 0,
        )


def hold_storages(tensors: Sequence[Tensor]) -> list[StorageWeakRef]:
    """Keep the places of the tensors' storages from being taken by others, but none of their values.

    Returns:
        What to keep for as long as stamps of these tensors shall tell them from later ones.
    """
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors if tensor.layout is _STRIDED]


def storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The memory of tensors, to keep although they may be given other (as by `flatten_parameters`).

    A CUDA allocator knows only the stream on which memory was made: it gives it away at once, although
    another lane's stream has yet to read it.
    """
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout is _STRIDED]


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
