"""Copies of a module's tensors on other devices: few large transfers, made only when something changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch_private import version_of
from .checksums import checksum_of
from .replica import Substitutions, substitutions

DEFAULT_BUCKET_BYTES = 25 * 2**20


def buckets(tensors: Sequence[Tensor], max_bytes: int = DEFAULT_BUCKET_BYTES) -> list[list[Tensor]]:
    """Divide tensors into buckets, in reverse order; each shares a transfer, a broadcast or a reduce-add.

    A backward reaches parameters about in the reverse of their order, so the first bucket is complete,
    and can be reduced, while the rest of the backward still runs.
    """
    found: list[list[Tensor]] = []
    size = 0
    for tensor in reversed(tensors):
        num_bytes = tensor.numel() * tensor.element_size()
        if not found or size + num_bytes > max_bytes:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += num_bytes
    return found


class VersionTag(NamedTuple):
    """Differs from an earlier one of the same tensor if the tensor's values may have changed.

    To compare tags across the life of a storage, keep `storage_refs` beside them: another storage may get
    the place in memory of one that is freed.
    """

    version: int
    storage: int = 0
    address: int = 0
    checksum: int = 0

    @classmethod
    def of(cls, tensor: Tensor, *, checksum: bool = False) -> VersionTag | None:
        """Return a tensor's tag; None for inference tensors, which count no versions and may always change.

        Args:
            tensor: a parameter or buffer.
            checksum: read the values too, for changes that no version counts.
        """
        if tensor.is_inference():
            return None
        if tensor.layout is not torch.strided:
            return cls(version_of(tensor))
        return cls(
            version_of(tensor),
            tensor.untyped_storage()._cdata,
            tensor.data_ptr(),
            checksum_of(tensor) if checksum else 0,
        )


def storage_refs(tensors: Sequence[Tensor]) -> list[StorageWeakRef]:
    """Return references that keep the places of the tensors' storages from being reused, but no values."""
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors if tensor.layout is torch.strided]


def storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Return the memory of tensors, to keep it although they may get other (as by `flatten_parameters`).

    A CUDA allocator knows only the stream on which memory was made, and reuses freed memory at once although
    another lane's stream has yet to read it.
    """
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]


def copies_on(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to `device`; those of another device in buckets, with one transfer for each.

    Returns:
        One copy per tensor, with the same strides; detached, and no inference tensors.
    """
    # Outside inference mode: a later pass that trains could not use its tensors.
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


def copies_in_place(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors, each on its own device."""
    with torch.inference_mode(False), torch.no_grad():
        return [tensor.detach().clone() for tensor in tensors]


def flat_copies(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy contiguous tensors of one device and dtype to `device` in a single transfer."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(device)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    # Through .data: as views they would share one version, and a change of one would count for all.
    return [piece.view(tensor.shape).data for piece, tensor in zip(pieces, tensors, strict=True)]


def _transfers(tensors: Sequence[Tensor], device: torch.device) -> list[list[Tensor]]:
    """Return groups of tensors that can be copied in one transfer."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and tensor.is_contiguous() and tensor.device != device:
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return [bucket for group in groups.values() for bucket in buckets(group)]


def wait_issued(devices: Iterable[torch.device]) -> None:
    """Block until everything this thread has issued on its current streams of `devices` is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


class Copies:
    """One lane's copies of tensors that live on another device.

    Args:
        originals: the tensors.
        device: the lane's.
        checksum: whether to read all values to find out which have changed.
    """

    def __init__(self, originals: Sequence[Tensor], device: torch.device, checksum: bool) -> None:
        self._originals = originals
        self._device = device
        self._checksum = checksum
        self._tags: dict[int, VersionTag | None] = {}
        self._storage_refs = storage_refs(())
        self._copies: Substitutions = {}

    def forget(self) -> None:
        """Copy everything anew the next time."""
        self._tags = {}

    def up_to_date(self, tensors: Substitutions) -> Substitutions:
        """Return `tensors` and copies of all that they lack; copy anew only what changed."""
        before = self._tags
        tags = {id(tensor): VersionTag.of(tensor, checksum=self._checksum) for tensor in self._originals}
        changed = [
            tensor
            for tensor in self._originals
            if tags[id(tensor)] is None or before.get(id(tensor)) != tags[id(tensor)]
        ]
        if changed:
            refs = storage_refs(self._originals)
            fresh = copies_on(changed, self._device)
            self._copies = {**self._copies, **substitutions(changed, fresh)}
            if self._tags is before:  # and was not forgotten meanwhile
                self._tags, self._storage_refs = tags, refs
        return {**self._copies, **tensors} if tensors else self._copies
