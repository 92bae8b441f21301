"""Training steps of two lanes on one GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import asyncdp

from .helpers import batch, distance, mlp, serial_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.anyio,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LANES = ["cuda:0", "cuda:0"]


@pytest.mark.parametrize("place", ["cuda:0", "cpu"])
async def test_equality(place: str) -> None:
    """Steps follow the serial run to 1e-10, for a module on the GPU and for one whose lanes hold copies."""
    torch.manual_seed(0)
    module = mlp().to(place)
    serial = copy.deepcopy(module)
    optimizer, serial_optimizer = (torch.optim.Adam(each.parameters(), 0.01) for each in (module, serial))
    async with asyncdp.DataParallel(module, LANES, num_lanes="all") as engine:
        for _ in range(50):
            x, y = batch(13)
            x, y = x.to(place), y.to(place)
            await engine.train_step(x, y, functional.cross_entropy, optimizer)
            serial_step(serial, serial_optimizer, x, y, functional.cross_entropy)
    assert distance(module, serial) < 1e-10


@pytest.mark.timeout(240)
@pytest.mark.parametrize("make", [mlp, lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()])
async def test_memory_does_not_grow(make: Callable[[], nn.Module]) -> None:
    """After 1,000 steps as much GPU memory is in use as after 50."""
    module = make().cuda()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    x, y = (each.cuda() for each in batch(64))
    async with asyncdp.DataParallel(module, LANES, num_lanes="all") as engine:
        for step in range(1000):
            await engine.train_step(x, y, functional.cross_entropy, optimizer)
            if step == 50:
                before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
