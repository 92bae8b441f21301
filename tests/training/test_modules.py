"""Modules with traits that are easily lost in a replica train as on one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asyncdp import _tree
from asyncdp._replicas.snapshot import Outline, modules_of

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
    """Parameters, and buffers that learn or that a forward changes, agree with the serial run."""
    modules, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        module = MODULES[name].make()
        modules.append(module)
        learning = [each for each in (*module.parameters(), *module.buffers()) if each.requires_grad]
        optimizers.append(torch.optim.SGD(learning, 0.05))
    async with engine(modules[0]) as one:
        for _ in range(3):
            x = MODULES[name].batch()
            await one.train_step(x, None, mean_square, optimizers[0])
            optimizers[1].zero_grad()
            mean_square(modules[1](x), None).backward()
            optimizers[1].step()
    mine, theirs = modules[0].state_dict(), modules[1].state_dict()
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_a_walk_finds_every_module_once() -> None:
    """Shared, missing and circular children are met as by `module.modules()`."""
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    module.register_module("absent", None)
    module[1].above = module
    found = modules_of(module)
    assert len(found) == 4
    assert set(found) == set(module.modules())


def test_an_outline_notices_other_modules_and_parameters() -> None:
    """Which modules there are is compared at each look, and parameters are those of now, each once."""
    tied = nn.Linear(2, 2)
    module = nn.Sequential(tied, nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), tied)
    module[1][1].weight = tied.weight
    outline = Outline(module)
    assert outline.is_same()
    assert list(map(id, outline.parameters())) == list(map(id, module.parameters()))
    module[1][1].weight = nn.Parameter(torch.zeros(2, 2))
    assert outline.is_same()
    assert list(map(id, outline.parameters())) == list(map(id, module.parameters()))
    module[1][0] = nn.GELU()
    assert not outline.is_same()
    module = nn.Sequential(nn.ReLU(), nn.Sequential())
    outline = Outline(module)
    module[1].append(nn.ReLU())
    assert not outline.is_same()
