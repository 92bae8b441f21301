"""Copies on another device are made in few transfers, and follow every change they can see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import asyncdp
from asyncdp._replicas.copies import Copies, VersionTag, copies_on, flat_copies
from asyncdp._replicas.replica_set import ReplicaSet
from asyncdp.testing import fake_devices

CPU = torch.device("cpu")


def test_flat_copies_are_copies() -> None:
    """Tensors that travelled together have their values and shapes, and lives of their own."""
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(0, 2), torch.randn(5)]
    copies = flat_copies(tensors, CPU)
    for copied, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copied, tensor)
        assert copied.is_contiguous()
    copies[0].zero_()
    assert torch.equal(copies[3], tensors[3])
    assert copies[3]._version == 0
    assert not torch.equal(tensors[0], copies[0])


def test_everything_is_copied_to_another_device() -> None:
    """Mixed dtypes, strides and frozen parameters all arrive, in their order."""
    tensors = [
        torch.randn(3, 4),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.ones(3, dtype=torch.int64),
        nn.Parameter(torch.randn(2)),
        torch.randn(6)[::2],
    ]
    copies = copies_on(tensors, torch.device("meta"))
    for copied, tensor in zip(copies, tensors, strict=True):
        assert copied.device.type == "meta"
        assert (copied.shape, copied.dtype) == (tensor.shape, tensor.dtype)
        assert not copied.requires_grad
    assert copies[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("checksum", [False, True])
def test_what_a_copy_notices(checksum: bool) -> None:
    """Only what changed is copied anew; a change through .data is seen by its checksum, or after forget."""
    weight, bias = torch.ones(3), torch.ones(2)
    copies = Copies([weight, bias], CPU, checksum)
    first = copies.up_to_date({})
    assert copies.up_to_date({})[id(weight)] is first[id(weight)]
    weight.add_(1)
    second = copies.up_to_date({})
    assert torch.equal(second[id(weight)], weight)
    assert second[id(bias)] is first[id(bias)]
    bias.data.add_(1)
    assert torch.equal(copies.up_to_date({})[id(bias)], bias) == checksum
    copies.forget()
    assert torch.equal(copies.up_to_date({})[id(bias)], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_checksums_of_any_dtype(dtype: torch.dtype) -> None:
    """A checksum reads every byte of every kind of tensor, whatever its strides."""
    tensor = torch.zeros(4, 6, dtype=dtype)[:, ::2]
    before = VersionTag.of(tensor, checksum=True)
    tensor.data[3, 2] = 1
    assert VersionTag.of(tensor) == VersionTag.of(tensor)
    assert VersionTag.of(tensor, checksum=True) != before


@pytest.mark.anyio
@pytest.mark.parametrize("checksum", [False, True])
async def test_changed_buffers_behind_autograds_back(checksum: bool) -> None:
    """With checksum=True the lanes' copies of buffers follow a change through .data at the next call."""
    module = nn.BatchNorm1d(2).eval()
    x = torch.ones(4, 2)
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all", checksum=checksum) as engine:
        for _ in range(2):  # after its first pass an engine makes new copies in any case
            await engine(x)
        assert module.running_mean is not None
        module.running_mean.data.fill_(1.0)
        again = await engine(x)
        assert torch.allclose(again[2:], module(x)[2:]) == checksum
        engine.refresh()
        assert torch.allclose(await engine(x), module(x))


def put_elsewhere(tensor: Tensor, memory: np.ndarray, value: float) -> None:
    """Give a tensor new values by other storage at the same address, as an allocator may after `to()`.

    In between it has yet other storage, so that the first is gone when the last is made.
    """
    tensor.data = torch.full_like(tensor, -1.0)
    memory[:] = value
    tensor.data = torch.from_numpy(memory)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
async def test_storage_that_comes_again_at_the_same_address(kind: str) -> None:
    """Assigning to .data twice between two passes is noticed, even if address and version are the same."""
    memory = np.zeros(2, dtype=np.float32)
    module = nn.BatchNorm1d(2).eval()
    tensor: Any = module.bias if kind == "parameter" else module.running_mean
    x = torch.ones(4, 2)
    async with (
        asyncdp.Runtime(fake_devices(2)) as runtime,  # to torch another device than the module's
        asyncdp.DataParallel(module, runtime=runtime, num_lanes="all") as engine,
    ):
        for turn in range(20):
            put_elsewhere(tensor, memory, float(turn))
            with torch.no_grad():
                assert torch.equal(await engine(x), module(x))


@pytest.mark.anyio
@pytest.mark.parametrize("num_passes", [0, 1])
async def test_a_failed_copy_is_made_again(num_passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pass whose copies found no memory, the next one copies and has the module's weights."""
    full = []

    def copy(tensors: Any, device: torch.device) -> list[Tensor]:
        if device in full:
            raise torch.OutOfMemoryError
        return copies_on(tensors, device)

    monkeypatch.setattr("asyncdp._replicas.copies.copies_on", copy)
    module, x = nn.Linear(3, 2), torch.ones(4, 3)
    async with (
        asyncdp.Runtime(fake_devices(2)) as runtime,
        asyncdp.DataParallel(module, runtime=runtime, num_lanes="all") as engine,
    ):
        with torch.no_grad():
            for _ in range(num_passes):
                await engine(x)
            module.weight.mul_(2.0)
            full.append(runtime.lanes[1].device)
            with pytest.raises(torch.OutOfMemoryError):
                await engine(x)
            full.clear()
            assert torch.equal(await engine(x), module(x))


def test_a_refresh_while_copies_are_made_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forgotten in the midst of copying is copied anew by the next pass."""
    weight = torch.ones(3)
    copies = Copies([weight], CPU, False)

    def copy(tensors: Any, device: torch.device) -> list[Tensor]:
        made = copies_on(tensors, device)
        weight.data.add_(1)
        copies.forget()
        return made

    with monkeypatch.context() as patch:
        patch.setattr("asyncdp._replicas.copies.copies_on", copy)
        copies.up_to_date({})
    assert torch.equal(copies.up_to_date({})[id(weight)], weight)


def test_a_refresh_while_buffers_are_copied_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the lanes' own buffers."""
    module = nn.BatchNorm1d(2).eval()
    mean: Any = module.running_mean
    replicas = ReplicaSet(module, [CPU, CPU])

    def copy(tensors: Any, device: torch.device) -> list[Tensor]:
        made = copies_on(tensors, device)
        mean.data.add_(1)
        replicas.refresh()
        return made

    with monkeypatch.context() as patch:
        patch.setattr("asyncdp._replicas.copies.copies_on", copy)
        replicas.prepare(module, [0, 1])
    assert torch.equal(replicas.prepare(module, [0, 1])[1].tensors[id(mean)], mean)
