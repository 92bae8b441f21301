"""Which parameters share one broadcast, and so one reduce-add in the backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

DEFAULT_BUCKET_BYTES = 25 * 2**20


def buckets(tensors: Sequence[Tensor], max_bytes: int = DEFAULT_BUCKET_BYTES) -> list[list[Tensor]]:
    """Divide tensors into buckets in reverse order.

    A backward meets parameters about in the reverse of their order, so the first bucket is complete,
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
