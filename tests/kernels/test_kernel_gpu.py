"""The compiled kernels on a CUDA device, beside the reference."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from asyncdp import _kernels as kernels
from asyncdp._kernels import build, reference

pytestmark = pytest.mark.gpu

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
]


@pytest.fixture(scope="module")
def device():
    """Return the first CUDA device, with all its kernels loaded."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    device = torch.device("cuda", 0)
    report = kernels.report(device)
    if report.implementation != "numba":
        pytest.skip(f"{report.reason}: {'; '.join(report.missing)}. {report.remedy}")
    torch.cuda.set_device(device)
    kernels.warm_up(device)
    return device


@pytest.fixture(autouse=True)
def poisoned():
    """Fill every new tensor with NaN, so that a byte no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def numbers(shape, dtype, device, seed=0):
    """Make numbers whose sums round, or wrap, in most places."""
    generator = torch.Generator(device).manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        return torch.randn(shape, dtype=wide, device=device, generator=generator).to(dtype)
    limits = torch.iinfo(dtype)
    low, high = limits.min // 2, limits.max // 2
    return torch.randint(low, high, shape, dtype=torch.int64, device=device, generator=generator).to(dtype)


def shifted(tensor, offset):
    """Move a one-dimensional tensor `offset` elements away from an aligned address."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    return room[offset:].copy_(tensor)


def same(left, right):
    """Compare tensors bit for bit."""
    left_bytes, right_bytes = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right))
    return left.stride() == right.stride() and torch.equal(left_bytes, right_bytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 17, 4096, 1_000_003])
def test_sums_equal_the_reference(device, dtype, numel):
    """Every dtype and size, any number of inputs, aligned, offset alike and out of step: the same bits."""
    for num_inputs, offsets in ((1, [0]), (2, [3]), (3, [0]), (5, [1, 2]), (8, [0])):
        tensors = [
            shifted(numbers((numel,), dtype, device, i), offsets[i % len(offsets)]) for i in range(num_inputs)
        ]
        assert same(kernels.reduce_add(tensors, device), reference.reduce_add(tensors, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_hundreds_of_millions(device, dtype):
    """Offsets past 32 bits are right: 600 million elements summed from two tensors."""
    numel = 600_000_003
    if torch.cuda.mem_get_info(device)[0] < 6 * numel * dtype.itemsize:
        pytest.skip("the device has too little free memory")
    tensors = [torch.ones(numel, dtype=dtype, device=device), torch.arange(2, device=device, dtype=dtype)[:1]]
    tensors[1] = tensors[1].expand(numel)
    tensors[0][-5:] = 3
    total = kernels.reduce_add(tensors, device)
    assert torch.equal(total, tensors[0])


def test_a_bucket_equals_its_sums(device):
    """Hundreds of tensors of unlike sizes, layouts and dtypes in one call: each its own sum."""
    sizes = [(n * 37 % 5000,) for n in range(300)] + [(64, 3, 7, 7), (1000, 512)]
    dtypes = [torch.float32, torch.bfloat16]
    groups = [
        [numbers(size, dtypes[i % 2], device, i + lane) for lane in range(4)] for i, size in enumerate(sizes)
    ]
    groups.append([numbers((2, 3, 8, 8), torch.float32, device).to(memory_format=torch.channels_last)] * 2)
    totals = kernels.reduce_add_many(groups, device)
    for total, expected in zip(totals, reference.reduce_add_many(groups, device), strict=True):
        assert same(total, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(64, 33, 17), (1, 4099, 3), (1000, 1, 1), (256, 128, 64), (3, 0, 5)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather_equals_concatenation(device, dtype, shape, dim):
    """Any dim, odd sizes and dtypes: the same bytes as torch.cat."""
    shards = []
    for i in range(4):
        shard_shape = list(shape)
        shard_shape[dim] += i
        shards.append(numbers(shard_shape, dtype, device, i))
    assert same(kernels.gather(shards, dim, device), torch.cat(shards, dim))


def test_lanes_of_one_device_do_not_disturb_each_other(device):
    """Threads with streams of their own reduce at once, and each gets its own sums."""

    def lane(seed):
        torch.cuda.set_device(device)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            for step in range(50):
                tensors = [numbers((10_007,), torch.float32, device, seed + step + i) for i in range(3)]
                total = kernels.reduce_add(tensors, device)
                if not same(total, reference.reduce_add(tensors, device)):
                    return False
        return True

    with ThreadPoolExecutor(4) as lanes:
        assert all(lanes.map(lane, range(0, 4000, 1000)))


def test_a_kernel_waits_for_its_stream(device):
    """Inputs still being made on the current stream, or on one it waits for, are summed as made."""
    producer, consumer = torch.cuda.Stream(device), torch.cuda.Stream(device)
    late = torch.zeros(1 << 20, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(50_000_000)
        late += 1
        made = producer.record_event()
    with torch.cuda.stream(consumer):
        consumer.wait_event(made)
        total = kernels.reduce_add([late, late], device)
        done = consumer.record_event()
    assert not done.query()
    done.synchronize()
    assert torch.equal(total, torch.full_like(total, 2))


def test_memory_reused_under_pressure_is_never_seen(device):
    """Inputs, tables and copies dropped right after the call are not overwritten before they are read."""
    good = []
    for step in range(200):
        base = numbers((1 << 18,), torch.float32, device, step)
        strided = base.view(512, 512).t()
        torch.cuda._sleep(200_000)
        total = kernels.reduce_add([strided.clone(), strided, strided.contiguous()], device)
        expected = reference.reduce_add([strided] * 3, device)
        good.append((total == expected).all())
        del base, strided, total, expected
        torch.full((1 << 18,), float("nan"), device=device)
    assert torch.stack(good).all()


def test_a_warm_device_compiles_nothing(device, monkeypatch):
    """After warm_up no call builds a kernel."""
    monkeypatch.setattr(build, "_build", None)
    monkeypatch.setattr(build, "cubin", None)
    for dtype in DTYPES:
        kernels.reduce_add([torch.ones(3, dtype=dtype, device=device)] * 2, device)
    assert kernels.gather([torch.ones(3, device=device)] * 2, 0, device).tolist() == [1.0] * 6


FAULT = """
import asyncio, torch
from asyncdp import Runtime
from asyncdp._kernels import launch

async def main():
    async with Runtime("cuda:0,cuda:0") as runtime:
        for lane in runtime.lanes:
            try:
                await runtime.run(lambda: launch.launch("copy", 0, 1, 16, 1), lane=lane)
            except RuntimeError as error:
                print(type(error).__name__, str(error).splitlines()[0], flush=True)

asyncio.run(main())
"""


def test_a_faulting_kernel_closes_the_lanes_of_its_device(device):
    """A wild address fails its pass with CUDA's own error and closes the lanes of the device."""
    result = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert "illegal memory access" in first
    assert second.startswith("DeviceLostError lane cuda:0")


@pytest.mark.multi_device
def test_other_devices_are_summed_and_gathered(device):
    """Tensors of every device, read in place or staged, give the reference's result."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device only")
    before = kernels.path_statistics()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    tensors = [numbers((100_003,), torch.float32, each, i) for i, each in enumerate(devices)]
    for each in devices:
        torch.cuda.synchronize(each)
    assert same(kernels.reduce_add(tensors, device), reference.reduce_add(tensors, device))
    assert same(kernels.gather(tensors, 0, device), torch.cat([tensor.to(device) for tensor in tensors]))
    after = kernels.path_statistics()
    num_brought = after.num_peer + after.num_staged - before.num_peer - before.num_staged
    assert num_brought == 2 * (len(devices) - 1)
