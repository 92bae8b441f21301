"""The plain torch kernels, whose results every other kernel must give."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import asyncdp
from asyncdp import _kernels as kernels
from asyncdp.errors import AsyncDPError, UnsupportedDtypeError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(dtype):
    """2048 ones and a large first term: a sum in the half type would lose all the ones."""
    tensors = [torch.full((5,), 4096.0, dtype=dtype), *[torch.ones(5, dtype=dtype)] * 2048]
    total = kernels.reduce_add(tensors, CPU)
    assert total.dtype is dtype
    assert torch.equal(total, torch.full((5,), 6144.0, dtype=dtype))


@given(
    st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_integers_wrap(dtype, values):
    """Integer sums are those of two's complement, whatever the number of terms."""
    bits = torch.iinfo(dtype).bits
    tensors = [torch.tensor([value]).to(dtype) for value in values]
    total = kernels.reduce_add(tensors, CPU)
    assert total.dtype is dtype
    assert (int(total) - sum(values)) % 2**bits == 0


def test_complex_is_summed():
    """Complex tensors are summed by parts, and a lazily conjugated one by its value."""
    value = torch.tensor([1 + 2j])
    assert kernels.reduce_add([value, value.conj()], CPU).item() == 2 + 0j


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn])
def test_what_has_no_sum_is_refused(dtype):
    """A dtype without a sum is a TypeError that names it and says what to do."""
    with pytest.raises(UnsupportedDtypeError, match=rf"cannot sum {dtype} .*Convert them first") as caught:
        kernels.reduce_add([torch.zeros(2).to(dtype)] * 2, CPU)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, AsyncDPError)


def test_one_tensor_gives_a_new_one():
    """The sum of one tensor shares no memory with it, nor does a sum change its inputs."""
    first = torch.ones(3)
    total = kernels.reduce_add([first], CPU)
    total += 1
    kernels.reduce_add([first, total], CPU)
    assert torch.equal(first, torch.ones(3))


def test_the_first_layout_is_kept():
    """A channels_last gradient stays one; an expanded tensor becomes dense."""
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    total = kernels.reduce_add([image, image.contiguous()], CPU)
    assert total.is_contiguous(memory_format=torch.channels_last)
    assert kernels.reduce_add([torch.ones(1).expand(4)] * 2, CPU).tolist() == [2.0] * 4


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sparse_sums_stay_sparse(layout, dtype):
    """Sparse gradients of one layout are summed in it; a first alone is copied."""
    dense = [torch.eye(4, dtype=dtype), torch.ones(4, 4, dtype=dtype).tril()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its compressed layouts beta
        tensors = [tensor.to_sparse(layout=layout) for tensor in dense]
        total = kernels.reduce_add(tensors, CPU)
        alone = kernels.reduce_add(tensors[:1], CPU)
        mixed = kernels.reduce_add([tensors[0], dense[1]], CPU)
    assert (total.layout, total.dtype) == (layout, dtype)
    assert torch.equal(total.to_dense(), dense[0] + dense[1])
    assert alone.values().data_ptr() != tensors[0].values().data_ptr()
    assert mixed.layout is torch.strided
    assert torch.equal(mixed, dense[0] + dense[1])


def test_many_sums_keep_their_order():
    """A bucket's results come in the order of its groups."""
    groups = [[torch.full((n + 1,), float(n))] * 3 for n in range(5)]
    totals = kernels.reduce_add_many(groups, CPU)
    assert [total.tolist() for total in totals] == [[3.0 * n] * (n + 1) for n in range(5)]


@given(st.integers(-3, 2), st.lists(st.integers(0, 4), min_size=1, max_size=4))
@settings(deadline=None)
def test_a_gathered_tensor_splits_into_its_shards(dim, lengths):
    """Shards of any lengths come one after the other along the dimension, and none is lost."""
    shards = []
    for length in lengths:
        shape = [2, 3, 2]
        shape[dim] = length
        shards.append(torch.rand(shape))
    whole = asyncdp.gather(shards, CPU, dim=dim)
    pieces = whole.split(lengths, dim)
    assert all(torch.equal(piece, shard) for piece, shard in zip(pieces, shards, strict=True))


def test_gather_of_one_is_a_copy():
    """A single shard is copied too, so that a result never shares memory with an output."""
    shard = torch.ones(2, 2)
    assert kernels.gather([shard], 0, CPU).data_ptr() != shard.data_ptr()


def test_a_gather_on_the_cpu_is_direct():
    """A gather of CPU tensors enters one file of the kernels: it is part of every pass on several lanes."""
    entered = set()

    def watch(frame, event, argument):
        if event == "call":
            entered.add(frame.f_code.co_filename)

    shards = [torch.ones(2), torch.ones(3)]
    sys.setprofile(watch)
    try:
        kernels.gather(shards, 0, CPU)
    finally:
        sys.setprofile(None)
    assert len([file for file in entered if "_kernels" in file]) == 1
