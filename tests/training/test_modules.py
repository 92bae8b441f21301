"""Modules with traits that are easily lost in a replica train as on one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asyncdp import _tree

from ..verbs.models import MODULES
from .helpers import engine

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mean_square(outputs: Any, _: None) -> Tensor:
    return torch.stack([leaf.abs().square().mean() for leaf in _tree.flatten(outputs)[0]]).sum()


@pytest.mark.parametrize("name", MODULES)
async def test_three_steps(name: str) -> None:
    """Parameters, and buffers that are trainable or that a forward changes, agree with the serial run."""
    modules, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        module = MODULES[name].make()
        modules.append(module)
        trainable = [each for each in (*module.parameters(), *module.buffers()) if each.requires_grad]
        optimizers.append(torch.optim.SGD(trainable, 0.05))
    async with engine(modules[0]) as one:
        for _ in range(3):
            x = MODULES[name].batch()
            await one.train_step(x, None, mean_square, optimizers[0])
            optimizers[1].zero_grad()
            mean_square(modules[1](x), None).backward()
            optimizers[1].step()
    mine, theirs = modules[0].state_dict(), modules[1].state_dict()
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


class Recalling(nn.Module):
    """Keeps its last hidden state as a buffer, graph and all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("state", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        self.state = hidden.mean(0)
        return hidden


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_a_buffer_replaced_by_a_result_survives(num_lanes: int) -> None:
    """The first lane's new buffer becomes the module's, detached, though it requires gradients."""
    module = Recalling()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    x = torch.randn(4, 3)
    expected = module.layer(x[: 4 // num_lanes]).mean(0).detach()
    async with engine(module, num_lanes) as one:
        await one.train_step(x, None, mean_square, optimizer)
    torch.testing.assert_close(module.state, expected)
    assert not module.state.requires_grad
