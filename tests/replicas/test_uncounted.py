"""Forwards that write into buffers and other tensors in ways that no version counts."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest
import torch
import torch._dynamo  # an optimizer imports it at first use, which reads files: not on an event loop
from torch import Tensor, nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize

import asyncdp

from .ways import WAYS, way

pytestmark = pytest.mark.anyio
every_way = pytest.mark.parametrize("name", WAYS)


def _by_data(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value)


def _by_numpy(tensor: Tensor, value: Tensor) -> None:
    tensor.numpy()[:] = value.numpy()


class LastMaximum(nn.Module):
    """Adds the maximum of the call before, kept in a buffer or in a plain tensor."""

    kept: Tensor

    def __init__(self, write: Callable[[Tensor, Tensor], None], *, is_buffer: bool) -> None:
        super().__init__()
        self.write = write
        if is_buffer:
            self.register_buffer("kept", torch.zeros(1))
        else:
            self.kept = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.kept
        self.write(self.kept, x.detach().max().reshape(1))
        return y


@every_way
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("is_buffer", [False, True])
@pytest.mark.parametrize("write", [_by_data, _by_numpy])
async def test_no_lane_keeps_what_no_version_counts(
    name: str, training: bool, is_buffer: bool, write: Callable[[Tensor, Tensor], None]
) -> None:
    """Every lane has the module's own values at each call, however forwards before have written."""
    module = LastMaximum(write, is_buffer=is_buffer).train(training)
    async with way(name, module) as run:
        for number in range(1, 7):
            x = torch.tensor([[10.0 * number], [1000.0 * number]])[: 1 if "batcher" in name else 2]
            at_the_call = module.kept.clone()
            with torch.no_grad():
                found = await run(x)
            assert torch.equal(torch.stack([*found]), x + at_the_call)


async def test_calls_that_wait_do_not_share_them_either() -> None:
    """Of calls made at once, none gets another's value of the second lane."""
    module = LastMaximum(_by_data, is_buffer=True).eval()
    xs = [torch.tensor([[10.0 * number], [1000.0 * number]]) for number in range(1, 6)]
    found: list[Tensor] = []

    async def call(x: Tensor) -> None:
        found.append(await engine(x) - x)

    with torch.no_grad():
        async with asyncdp.DataParallel(module, "cpu*2") as engine, anyio.create_task_group() as group:
            for x in xs:
                group.start_soon(call, x)
    assert len(found) == 5
    assert torch.stack(found).max() < 1000


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("is_buffer", [False, True])
async def test_steps_keep_what_the_first_lane_wrote(num_lanes: int, training: bool, is_buffer: bool) -> None:
    """After each step the module holds what the first lane's forward left in it."""

    class Trained(LastMaximum):
        def __init__(self) -> None:
            super().__init__(_by_data, is_buffer=is_buffer)
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight

    module = Trained().train(training)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    async with asyncdp.DataParallel(module, ["cpu"] * num_lanes, num_lanes="all") as engine:
        for number in range(1, 5):
            x = torch.tensor([[10.0 * number], [5.0 * number]])
            await engine.train_step(x, torch.zeros(2, 1), nn.functional.mse_loss, optimizer)
            assert module.kept.item() == 10.0 * number


@pytest.mark.parametrize("name", ["all", "on_one_lane"])
async def test_fused_observers_calibrate_in_eval_mode(name: str) -> None:
    """An observer whose fused operation writes its range uncounted gives what it gives on one device."""
    observer = FusedMovingAvgObsFakeQuantize(averaging_constant=0.5).eval()
    alone = FusedMovingAvgObsFakeQuantize(averaging_constant=0.5).eval()
    async with way(name, observer) as run:
        for number in range(1, 5):
            x = torch.randn(2, 8, generator=torch.Generator().manual_seed(number)).repeat(2, 1) * number
            with torch.no_grad():
                found = await run(x)
                wanted = alone(x[:2])  # of either half
            assert torch.equal(found, wanted.repeat(2, 1))
            assert torch.equal(observer.scale, alone.scale)


async def test_a_look_at_values_leaves_memory_resizable() -> None:
    """Parameters and buffers that were looked at can be resized, and conjugate views can be looked at."""
    module = nn.Module()
    module.register_buffer("table", torch.zeros(2))
    module.register_buffer("turned", torch.randn(2, dtype=torch.complex64).conj())
    module.weight = nn.Parameter(torch.randn(2, dtype=torch.complex64).conj())
    module.forward = lambda x: x  # type: ignore[method-assign]
    x = torch.ones(2, 1)
    assert torch.equal(await asyncdp.data_parallel(module.eval(), x, "cpu*2"), x)
    assert module.table.resize_(8).shape == (8,)
