"""What only a CUDA device can show: placement, copies between devices, streams."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asyncdp

from .models import MODULES, Fn, Recurrent, numbered
from .test_autograd import penalty
from .test_modules import assert_same, gradients

pytestmark = pytest.mark.gpu

ONE = ["cuda:0", "cuda:0"]
TWO = ["cuda:0", "cuda:1"]
LANES = [
    pytest.param(ONE, id="two lanes on one device"),
    pytest.param(["cpu", "cuda:0"], id="CPU and device"),
    pytest.param(TWO, id="two devices", marks=pytest.mark.multi_device),
]


def dp(module: nn.Module, x: Any, devices: Any, **kwargs: Any) -> Any:
    """One pass."""
    return asyncio.run(asyncdp.data_parallel(module, x, devices, **kwargs))


def on(home: str, module: nn.Module) -> nn.Module:
    """Move a module, and keep buffers that learn what they were: leaves."""
    module = module.to(home)
    for buffer in module.buffers():
        buffer.detach_().requires_grad_(buffer.requires_grad)
    return module


@pytest.mark.parametrize("home", ["cpu", "cuda:0"])
@pytest.mark.parametrize("devices", LANES)
@pytest.mark.parametrize("name", [name for name in MODULES if "norm, old" not in name])
def test_values_and_gradients(name: str, devices: list[str], home: str) -> None:
    """Contract 4, 5, 7, 14: wherever the module lives and the lanes are, results are the plain module's."""
    case = MODULES[name]
    module = case.make()
    module = module if name == "complex" else module.double()
    module, twin = on(home, module), on(home, copy.deepcopy(module))
    for _ in range(2):
        x = case.batch().to(home).requires_grad_()
        y = x.detach().clone().requires_grad_()
        found, expected = dp(module, x, devices), twin(y)
        assert found.device == torch.device(devices[0])
        torch.testing.assert_close(found.to(home), expected)
        found.abs().square().sum().backward()
        expected.abs().square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    # torch's own fused weight_norm is of single precision on a GPU, also for doubles.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "weight_norm" else {}
    assert_same(gradients(module), gradients(twin), **tolerance)


@pytest.mark.parametrize("devices", LANES)
def test_second_derivatives(devices: list[str]) -> None:
    """Contract 14: a gradient penalty through device lanes equals the plain module's."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double().cuda()
    twin = copy.deepcopy(module)
    x = torch.randn(4, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    y = x.detach().clone().requires_grad_()
    penalty(dp(module, x, devices), x, list(module.parameters()))
    penalty(twin(y), y, list(twin.parameters()))
    torch.testing.assert_close(x.grad, y.grad)
    assert_same(gradients(module), gradients(twin))


@pytest.mark.parametrize("home", ["cpu", "cuda:0"])
@pytest.mark.parametrize("devices", LANES)
def test_statistics_survive(devices: list[str], home: str) -> None:
    """Contract 8: lane 0's running statistics reach the module, wherever it lives."""
    module = nn.BatchNorm1d(3).to(home)
    twin = copy.deepcopy(module)
    for _ in range(3):
        x = torch.randn(8, 3, device=home) + 5
        dp(module, x, devices)
        twin(x[:4])
        for own, other in zip(module.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(own, other)


def test_placement() -> None:
    """Contract 11, 12: default device in a forward, output device, and one device moving the module."""

    def forward(_m: Any, x: Tensor) -> Tensor:
        assert torch.empty(()).device == x.device == torch.device("cuda:0")
        return x

    module = Fn(forward, layer=nn.Linear(1, 1))
    assert dp(module, numbered(4), ONE).device == torch.device("cuda:0")
    assert dp(module, numbered(4), ONE, output_device="cpu").device.type == "cpu"
    assert module.layer.weight.device.type == "cpu"
    assert dp(module, numbered(4), "cuda:0", output_device="cpu").device.type == "cpu"
    assert module.layer.weight.device == torch.device("cuda:0")


def test_outputs_of_parallel_apply_follow_their_inputs() -> None:
    """Contract 11: without devices an output is where its input was."""
    x = torch.ones(2)
    found = asyncio.run(asyncdp.parallel_apply([nn.Identity()] * 2, [x, x.cuda()]))
    assert [each.device.type for each in found] == ["cpu", "cuda"]


@pytest.mark.filterwarnings("error:RNN module weights")
def test_recurrent_weights_stay_flat() -> None:
    """Contract 18: `flatten_parameters` in a replica leaves one chunk of memory, and the original's alone."""
    module = Recurrent().cuda()
    x = torch.randn(4, 5, 3, device="cuda")
    for replica in asyncdp.replicate(module, ONE, detach=True):
        torch.testing.assert_close(replica(x), module(x))
    address = module.rnn.weight_ih_l0.data_ptr()  # another one after every forward of the original's own
    for _ in range(2):
        dp(module, x, ONE).sum().backward()
    assert module.rnn.weight_ih_l0.data_ptr() == address


def test_recurrent_weights_are_followed() -> None:
    """Replicas that have made their weights one chunk of memory still see what the module's become."""
    module = Recurrent().cuda()
    x = torch.randn(4, 5, 3, device="cuda")

    async def compare() -> None:
        async with asyncdp.DataParallel(module, ONE, num_lanes="all") as engine:
            for grad in (False, True, False):
                with torch.set_grad_enabled(grad):
                    found = await engine(x)
                torch.testing.assert_close(found, module(x))
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.mul_(1.5)

    asyncio.run(compare())


def test_autocast_of_the_device() -> None:
    """Contract 17: autocast for CUDA, with its dtype, reaches CUDA lanes."""
    module = nn.Linear(3, 3).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert dp(module, torch.randn(4, 3, device="cuda"), ONE).dtype == torch.bfloat16


def test_inputs_still_being_made_are_awaited() -> None:
    """A lane reads its input only after the caller's stream has written it, and the caller its result."""
    module = nn.Identity()
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros(1 << 20, device="cuda")
        for _ in range(3):
            torch.cuda._sleep(20_000_000)
            x.add_(1)
            assert torch.equal(dp(module, x, ONE), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_sums(dtype: torch.dtype) -> None:
    """Contract 16: half sums accumulate in float32 on the device too."""
    module = Fn(lambda m, x: x * m.w)
    module.w = nn.Parameter(torch.ones(1, dtype=dtype, device="cuda"))
    big = 2048.0 if dtype is torch.float16 else 256.0
    x = torch.tensor([big, 1.0, 1.0, 1.0, 1.0], dtype=dtype, device="cuda")
    dp(module, x, ["cuda:0"] * 5).sum().backward()
    assert module.w.grad.item() == big + 4


def test_sparse_gradients() -> None:
    """Contract 15: sparse gradients are summed on the device."""
    module = nn.Embedding(10, 3, sparse=True).cuda()
    dp(module, torch.tensor([1, 2, 2, 9], device="cuda"), ONE).sum().backward()
    assert module.weight.grad.is_sparse
    assert module.weight.grad.to_dense()[:, 0].tolist() == [0, 1, 2, 0, 0, 0, 0, 0, 0, 1]


def test_device_times_in_a_trace(tmp_path: Path) -> None:
    """A recorded work's time by the device's clock covers its kernels, wherever the host's clock was then."""

    async def record() -> None:
        async with asyncdp.Runtime(["cuda:0"]) as runtime:
            await runtime.run(torch.zeros, 1)
            async with asyncdp.TraceRecorder(tmp_path / "trace.json"):
                for _ in range(3):
                    await runtime.run(torch.cuda._sleep, 100_000_000)

    asyncio.run(record())
    spans = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    device = [span for span in spans if span.get("cat") == "device time"]
    host = [span for span in spans if span.get("cat") == "on lane"]
    assert len(device) == len(host) == 3
    for span, issued in zip(device, host, strict=True):
        # 100 million cycles are tens of milliseconds; a millisecond is what two clocks may be apart.
        assert 20_000 < span["dur"] < 500_000
        assert span["ts"] > issued["ts"] - 1000
    assert device[0]["ts"] + device[0]["dur"] <= device[1]["ts"]


EXIT = """
import asyncio, torch, asyncdp

module = torch.nn.Linear(3, 3).cuda()
x = torch.randn(4, 3, device="cuda")
asyncio.run(asyncdp.data_parallel(module, x, ["cuda:0", "cuda:0"])).sum().backward()
"""


def test_a_process_with_lanes_ends_well() -> None:
    """The default runtime's CUDA lanes end with the interpreter, and do not abort it."""
    ends = [subprocess.Popen([sys.executable, "-c", EXIT], stderr=subprocess.PIPE) for _ in range(4)]
    for each in ends:
        _, errors = each.communicate(timeout=50)
        assert each.returncode == 0, errors.decode()


def test_map_copies_the_next_batch_while_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second batch of a stream is on the device before the first has been computed."""
    # Not the module's: what a forward appends to a list of a module's own is undone.
    arrived: list[torch.cuda.Event] = []
    ended: list[torch.cuda.Event] = []

    class Slow(nn.Module):
        """Keeps its stream busy for half a second or so, and notes by the device's clock when each ended."""

        def forward(self, x: Tensor) -> Tensor:
            torch.cuda._sleep(1_000_000_000)
            result = x * 2
            ended.append(torch.cuda.Event(enable_timing=True))
            ended[-1].record()
            return result

    batches = [torch.full((1 << 20,), float(n)) for n in range(3)]

    async def stream() -> list[Tensor]:
        async with asyncdp.DataParallel(Slow(), ["cuda:0"]) as engine:
            driver: Any = engine.runtime.lanes[0]._driver
            prefetch = driver.prefetch

            def watched(tensors: Sequence[Tensor]) -> Any:
                take = prefetch(tensors)
                arrived.append(torch.cuda.Event(enable_timing=True))
                arrived[-1].record(driver._copies)
                return take

            monkeypatch.setattr(driver, "prefetch", watched)
            return [result async for result in engine.map(batches)]

    results = asyncio.run(stream())
    assert arrived[1].elapsed_time(ended[0]) > 0
    for batch, result in zip(batches, results, strict=True):
        assert torch.equal(result.cpu(), batch * 2)


@pytest.mark.parametrize("devices", [["cuda:0"], ONE])
def test_map_under_memory_pressure(devices: list[str]) -> None:
    """Memory of copies made ahead is not given away before the lane has read it, nor pinned memory reused."""

    async def stream() -> None:
        batches = (torch.full((1 << 18,), float(n)) for n in range(200))
        async with asyncdp.DataParallel(nn.Identity(), devices) as engine:
            n = 0
            async for result in engine.map(batches, max_in_flight=8):
                assert bool((result == n).all())
                n += 1
        assert n == 200

    asyncio.run(stream())
