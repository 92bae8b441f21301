"""How parameters are grouped into buckets, each summed by one reduce-add."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdp._replicas.copies import buckets


def test_buckets_go_backwards_and_keep_to_their_size() -> None:
    """Buckets start at the last parameter; one is closed before it would grow too large."""
    tensors = [torch.zeros(size) for size in (4, 2, 2, 1, 9)]
    sizes = [[tensor.numel() for tensor in bucket] for bucket in buckets(tensors, max_bytes=16)]
    assert sizes == [[9], [1, 2], [2], [4]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=20), st.integers(4, 400))
def test_buckets_hold_everything_once(lengths: list[int], max_bytes: int) -> None:
    """Buckets keep the reverse order, lose nothing, and are over their size only with a lone tensor."""
    parameters = [torch.empty(length) for length in lengths]
    found = buckets(parameters, max_bytes)
    assert [id(each) for bucket in found for each in bucket] == [id(each) for each in reversed(parameters)]
    for bucket in found:
        assert len(bucket) == 1 or sum(each.numel() * 4 for each in bucket) <= max_bytes
