"""Sums the gradients of several lanes, bucket by bucket."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _kernels
from .._replicas.copies import buckets as divide
from .._torch_private import foreach_add_

# Smaller than a broadcast's: a bucket is summed while the processor's cache still holds part of it,
# and the gradients of a second lane live only until their bucket is complete.
BUCKET_BYTES = 2**20

# What is summed in its own precision; half types need a wider accumulator, which the kernels have.
_IN_PLACE_DTYPES = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})

Gradients = list[Tensor | None]
"""One entry per trainable tensor; None where nothing depended on it."""


class Reducer:
    """Sums the gradients of one step over several lanes.

    Args:
        tensors: what the gradients belong to; sums go to each one's device.
        buckets: which tensors, by position, are summed together; see `bucket_positions`.
        num_lanes: how many lanes will report.
        accumulated: gradients of earlier batches to be added; never written to.
        overlap: sum a bucket on the thread that completes it. Only right where a gradient is complete
            once it is reported; on an accelerator it is complete only when the lane's task has ended.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        buckets: Sequence[Sequence[int]],
        num_lanes: int,
        accumulated: Sequence[Gradients],
        *,
        overlap: bool,
    ) -> None:
        self._tensors = tensors
        self._accumulated = accumulated
        self._overlap = overlap
        self._buckets = buckets
        self._bucket_of = {place: number for number, bucket in enumerate(self._buckets) for place in bucket}
        self._missing = [[set(bucket) for bucket in self._buckets] for _ in range(num_lanes)]
        self._lanes_left = [num_lanes] * len(self._buckets)
        self._summed = [False] * len(self._buckets)
        self._lock = threading.Lock()
        self.gradients: list[Gradients] = [[None] * len(tensors) for _ in range(num_lanes)]
        """What each lane has reported and no sum contains yet."""
        self._sums: Gradients = [None] * len(tensors)
        self._taken: Gradients = []  # by launches that may still read it, on another stream than its own

    def report(self, lane: int, position: int, gradient: Tensor) -> None:
        """Take one gradient of a lane; called during its backward."""
        own = self.gradients[lane]
        with self._lock:
            # A backward inside the backward (re-entrant checkpoints) may report one tensor twice.
            earlier = own[position]
            own[position] = gradient if earlier is None else earlier + gradient
            bucket = self._bucket_of[position]
            missing = self._missing[lane][bucket]
            missing.discard(position)
            complete = not missing and self._leave(bucket, lane)
        if complete:
            self._sum(bucket)

    def report_all(self, lane: int, gradients: Gradients) -> None:
        """Take those gradients of a lane that its backwards have left."""
        for position, gradient in enumerate(gradients):
            if gradient is not None:
                self.report(lane, position, gradient)

    def end(self, lane: int) -> None:
        """Note that a lane's backward has ended, and will report no more."""
        for bucket in range(len(self._buckets)):
            with self._lock:
                complete = self._leave(bucket, lane)
            if complete:
                self._sum(bucket)

    def sums(self) -> Gradients:
        """Return the sums over lanes and accumulated gradients, after every lane has ended."""
        for bucket in range(len(self._buckets)):
            self._sum(bucket)
        return self._sums

    def _leave(self, bucket: int, lane: int) -> bool:
        """Count a lane out of a bucket, once; return whether it was the last and the sum is due."""
        missing = self._missing[lane][bucket]
        if missing is _LEFT:
            return False
        self._missing[lane][bucket] = _LEFT
        self._lanes_left[bucket] -= 1
        return self._overlap and self._lanes_left[bucket] == 0

    def _sum(self, bucket: int) -> None:
        """Add what has been reported of a bucket, in the order of the lanes, to its sums."""
        with self._lock:
            groups = [self._take(position, bucket) for position in self._buckets[bucket]]
            self._summed[bucket] = True
        sums = add_up(groups, [self._tensors[position].device for position in self._buckets[bucket]])
        for position, total in zip(self._buckets[bucket], sums, strict=True):
            self._sums[position] = total

    def _take(self, position: int, bucket: int) -> tuple[Gradients, Gradients]:
        """Return what there is to add for one tensor; on a second visit only late reports, if any."""
        reported = [self._sums[position], *(own[position] for own in self.gradients)]
        for own in self.gradients:
            if not self._overlap:
                self._taken.append(own[position])
            own[position] = None
        return reported, [] if self._summed[bucket] else [each[position] for each in self._accumulated]


_LEFT: set[int] = set()


def bucket_positions(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return which tensors, by position, are summed together, in the order a backward reaches them."""
    positions = {id(tensor): position for position, tensor in enumerate(tensors)}
    return [[positions[id(tensor)] for tensor in bucket] for bucket in divide(tensors, BUCKET_BYTES)]


def add_accumulated(
    gradients: Gradients, accumulated: Sequence[Gradients], devices: Sequence[torch.device]
) -> Gradients:
    """Add accumulated gradients to those of one lane, which may be written to; each sum on its device."""
    pairs = zip(gradients, devices, strict=True)
    if not accumulated and all(gradient is None or gradient.device == device for gradient, device in pairs):
        return gradients
    groups = [([own], [each[place] for each in accumulated]) for place, own in enumerate(gradients)]
    return add_up(groups, devices)


def add_up(
    groups: Sequence[tuple[Sequence[Tensor | None], Sequence[Tensor | None]]],
    devices: Sequence[torch.device],
) -> Gradients:
    """Sum groups of tensors, each on its device.

    Args:
        groups: each has summands that may be written to, then summands that may not. None is nothing.
        devices: where each sum goes.

    Returns:
        One sum per group, which shares memory with no summand of the second kind.
    """
    sums: Gradients = [None] * len(groups)
    firsts: list[list[Tensor]] = []
    others: list[list[Tensor]] = []
    launches: dict[torch.device, list[int]] = {}
    summands = [[each for each in (*free, *fixed) if each is not None] for free, fixed in groups]
    for position, ((free, _), device) in enumerate(zip(groups, devices, strict=True)):
        own = [tensor for tensor in free if tensor is not None]
        if own and len(summands[position]) == 1 and own[0].device == device:
            sums[position] = own[0]
        elif own and _can_add_in_place(summands[position], device):
            sums[position] = own[0]
            firsts.append(summands[position][:1])
            others.append(summands[position][1:])
        elif summands[position]:
            launches.setdefault(device, []).append(position)
    _add_in_place(firsts, others)
    for device, positions in launches.items():
        totals = _kernels.reduce_add_many([summands[position] for position in positions], device)
        for position, total in zip(positions, totals, strict=True):
            sums[position] = total
    return sums


def _can_add_in_place(summands: Sequence[Tensor], device: torch.device) -> bool:
    """On the CPU this saves a tensor; on CUDA one launch for the whole bucket is worth more."""
    dtype = summands[0].dtype
    return (
        device.type == "cpu"
        and dtype in _IN_PLACE_DTYPES
        and all(
            tensor.device == device and tensor.layout is torch.strided and tensor.dtype == dtype
            for tensor in summands
        )
    )


def _add_in_place(firsts: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> None:
    """Add the second summands of all groups to the first ones, then the third, and so on."""
    with torch.no_grad():
        for turn in range(max((len(each) for each in others), default=0)):
            due = [place for place, each in enumerate(others) if len(each) > turn]
            foreach_add_([firsts[place][0] for place in due], [others[place][turn] for place in due])
