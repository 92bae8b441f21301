"""Recurrent modules that have cuDNN put their weights together (`flatten_parameters`) in their forward."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from asyncdp import DataParallel

from .models import Recurrent

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def flattening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have weights move on the CPU as well, where torch leaves them alone."""
    torch.manual_seed(0)
    own: Callable[[nn.RNNBase], None] = nn.RNNBase.flatten_parameters

    def move(module: nn.RNNBase) -> None:
        own(module)
        for weight in module._flat_weights:
            if weight.device.type == "cpu":
                weight.data = weight.data.clone()

    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", move)


def pair(device: str) -> tuple[nn.Module, nn.Module]:
    """Two equal modules."""
    module = Recurrent(nn.GRU).double().to(device)
    return module, copy.deepcopy(module).to(device)


def places(module: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in module.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_lanes", ["all", 1])
def test_lanes_leave_shared_weights_where_they_are(device: str, num_lanes: str | int) -> None:
    """No lane moves weights that others may be reading, and results are the plain module's."""
    module, twin = pair(device)
    before = places(module)
    x = torch.randn(5, 6, 3, dtype=torch.float64, device=device)

    async def main() -> list[Tensor]:
        async with DataParallel(module, [device, device], num_lanes=num_lanes) as engine:
            with torch.no_grad():
                return [await engine(x), await engine.on_one_lane(x), *[await engine(x) for _ in range(5)]]

    for found in asyncio.run(main()):
        torch.testing.assert_close(found, twin(x))
    if num_lanes == "all" or device != "cpu":
        assert places(module) == before


@pytest.mark.parametrize("home", DEVICES)
@pytest.mark.parametrize("device", DEVICES)
def test_steps_train_what_the_next_ones_read(home: str, device: str) -> None:
    """Lanes go on to train the module's own weights, or fresh copies of them."""
    module, twin = pair(home)
    x = torch.randn(5, 6, 3, dtype=torch.float64, device=home)
    y = torch.randn(5, 6, 4, dtype=torch.float64, device=home)

    optimizer, twin_optimizer = (torch.optim.SGD(each.parameters(), 0.5) for each in (module, twin))

    async def main() -> None:
        async with DataParallel(module, [device, device], num_lanes="all") as engine:
            for _ in range(5):
                await engine.train_step(x, y, functional.mse_loss, optimizer)

    asyncio.run(main())
    for _ in range(5):
        twin_optimizer.zero_grad()
        functional.mse_loss(twin(x), y).backward()
        twin_optimizer.step()
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
def test_memory_of_weights_that_move_is_kept_until_it_is_read() -> None:
    """What weights leave behind is not used again before the lane's stream has come to reading it."""
    has_moved = threading.Event()

    class Late(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            is_late = len(x) == 2
            if is_late:
                torch.cuda._sleep(500_000_000)
            self.rnn.flatten_parameters()
            if is_late:
                has_moved.set()
            return self.rnn(x)[0]

    module = Late(nn.GRU).double()
    x = torch.randn(5, 6, 3, dtype=torch.float64)

    async def main() -> Tensor:
        async with DataParallel(module, ["cuda:0", "cuda:0"], num_lanes="all") as engine:
            await engine(x)  # the first makes the replicas, on a lane
            has_moved.clear()
            second = asyncio.create_task(engine(x))
            assert await asyncio.to_thread(has_moved.wait, 30)
            others = [torch.full((64,), torch.nan, dtype=x.dtype, device="cuda:0") for _ in range(4096)]
            result = await second
            del others
            return result

    torch.testing.assert_close(asyncio.run(main()).cpu(), module.rnn(x)[0])
