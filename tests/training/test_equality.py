"""A step on many lanes is the step of one device with the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from .helpers import batch, distance, engine, mlp, serial_step

pytestmark = pytest.mark.anyio

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
}


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


@pytest.mark.parametrize("num_rows", [12, 13, 2])
@pytest.mark.parametrize(("name", "reduction"), [("sgd", "sum"), ("adamw", "mean")])
async def test_fifty_steps(num_rows: int, name: str, reduction: str) -> None:
    """After 50 steps in float64 the weights agree to 1e-10, uneven shards and fewer rows than lanes too."""
    torch.manual_seed(0)
    module = mlp()
    serial = copy.deepcopy(module)
    optimizer, serial_optimizer = OPTIMIZERS[name](module.parameters()), OPTIMIZERS[name](serial.parameters())
    loss_fn = functional.cross_entropy if reduction == "mean" else sum_loss
    async with engine(module, 3) as one:
        for _ in range(50):
            x, y = batch(num_rows)
            loss = await one.train_step(x, y, loss_fn, optimizer, loss_reduction=reduction)
            expected = serial_step(serial, serial_optimizer, x, y, loss_fn)
            assert loss.shape == ()
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
        assert one.statistics().num_steps == 50
    assert distance(module, serial) < 1e-10


async def test_float32_bound() -> None:
    """In float32 50 steps of SGD differ by less than 1e-5: sums are made in another order."""
    torch.manual_seed(0)
    module = mlp(torch.float32)
    serial = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    serial_optimizer = torch.optim.SGD(serial.parameters(), 0.1)
    async with engine(module) as one:
        for _ in range(50):
            x, y = batch(17, torch.float32)
            await one.train_step(x, y, functional.cross_entropy, optimizer)
            serial_step(serial, serial_optimizer, x, y, functional.cross_entropy)
    assert distance(module, serial) < 1e-5


async def test_one_lane_gives_the_very_bits() -> None:
    """On one lane nothing is added up, so that not one bit differs from torch."""
    torch.manual_seed(0)
    module = mlp(torch.float32)
    serial = copy.deepcopy(module)
    optimizer, serial_optimizer = torch.optim.Adam(module.parameters()), torch.optim.Adam(serial.parameters())
    async with engine(module, 1) as one:
        for _ in range(5):
            x, y = batch(9, torch.float32)
            loss = await one.train_step(x, y, functional.cross_entropy, optimizer)
            assert torch.equal(loss, serial_step(serial, serial_optimizer, x, y, functional.cross_entropy))
    assert distance(module, serial) == 0.0


class Tied(nn.Module):
    """An embedding with sparse gradients, a layer used twice, one never used, a weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, sparse=True)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.twice.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.embedding(tokens))).tanh())


async def test_tied_sparse_and_unused() -> None:
    """Tied weights, sparse gradients and parameters that nothing used take part as on one device."""
    torch.manual_seed(0)
    module = Tied().double()
    serial = copy.deepcopy(module)
    optimizer, serial_optimizer = (torch.optim.SGD(each.parameters(), 0.1) for each in (module, serial))
    async with engine(module) as one:
        for _ in range(5):
            tokens = torch.randint(0, 7, (9,))
            goal = torch.randn(9, 4, dtype=torch.float64)
            await one.train_step(tokens, goal, functional.mse_loss, optimizer)
            serial_step(serial, serial_optimizer, tokens, goal, functional.mse_loss)
        await one.train_step(tokens, goal, functional.mse_loss, None, reduce_only=True)
    assert distance(module, serial) < 1e-12
    assert module.never.weight.grad is None
    assert module.embedding.weight.grad is not None
    assert module.embedding.weight.grad.is_sparse


async def test_groups_and_frozen_parameters() -> None:
    """Parameter groups keep their settings; frozen parameters stay until they are trainable."""
    torch.manual_seed(0)
    modules = [mlp(), mlp()]
    modules[1].load_state_dict(modules[0].state_dict())
    optimizers = [
        torch.optim.SGD(
            [{"params": each[0].parameters(), "lr": 0.5}, {"params": each[2:].parameters()}], 0.05
        )
        for each in modules  # type: ignore[index]
    ]
    frozen = modules[0][2].weight.clone()  # type: ignore[index]
    async with engine(modules[0]) as one:
        for step in range(6):
            for each in modules:
                each[2].weight.requires_grad_(step >= 3)  # type: ignore[index]
            x, y = batch(10)
            await one.train_step(x, y, functional.cross_entropy, optimizers[0])
            serial_step(modules[1], optimizers[1], x, y, functional.cross_entropy)
            assert torch.equal(modules[0][2].weight, frozen) == (step < 3)  # type: ignore[index]
    assert distance(*modules) < 1e-12


async def test_changes_of_the_module_between_steps() -> None:
    """A replaced layer, other weights in place, other storage, strides and dtype are all noticed."""
    torch.manual_seed(0)
    module = mlp()
    async with engine(module) as one:
        for change in ("nothing", "layer", "in place", "data", "storage", "strides", "dtype", "mode"):
            if change == "layer":
                module[2] = nn.Linear(8, 8).double()  # type: ignore[operator]
            elif change == "in place":
                with torch.no_grad():
                    module[0].weight.mul_(2.0)  # type: ignore[index]
            elif change == "data":
                module[0].weight.data.mul_(2.0)  # type: ignore[index]
            elif change == "storage":
                module[0].weight.data = torch.randn(8, 5, dtype=torch.float64)  # type: ignore[index]
            elif change == "strides":
                module[2].weight.data = module[2].weight.data.t()  # type: ignore[index]
            elif change == "dtype":
                module.float()
            elif change == "mode":
                module.eval()
            dtype = module[0].weight.dtype  # type: ignore[index]
            serial = copy.deepcopy(module)
            x, y = batch(8, dtype)
            await one.train_step(x, y, functional.cross_entropy, torch.optim.SGD(module.parameters(), 0.1))
            serial_step(serial, torch.optim.SGD(serial.parameters(), 0.1), x, y, functional.cross_entropy)
            assert distance(module, serial) < (1e-12 if dtype is torch.float64 else 1e-6), change


async def test_small_buckets_and_nested_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that come in many buckets, or in a backward inside the backward, are all counted."""
    monkeypatch.setattr("asyncdp._training.reducer.BUCKET_BYTES", 1)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.outer = nn.Linear(5, 5).double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.outer(x)
            first = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True)
            return first + torch.utils.checkpoint.checkpoint(self.inner, x + 1, use_reentrant=True)

    torch.manual_seed(0)
    module = Checkpointed()
    serial = copy.deepcopy(module)
    optimizer, serial_optimizer = (torch.optim.SGD(each.parameters(), 0.1) for each in (module, serial))
    async with engine(module, 3) as one:
        for _ in range(3):
            x, y = batch(11)
            await one.train_step(x, y, functional.cross_entropy, optimizer)
            serial_step(serial, serial_optimizer, x, y, functional.cross_entropy)
    assert distance(module, serial) < 1e-12


async def test_batch_statistics_are_lane_zeros() -> None:
    """Running statistics after a step are those of the first lane's shard, as in any pass."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    alone = copy.deepcopy(module)
    x = torch.randn(8, 5, dtype=torch.float64)
    alone(x[:4])
    async with engine(module) as one:
        await one.train_step(x, x[:, :4], functional.mse_loss, torch.optim.SGD(module.parameters(), 0.1))
    torch.testing.assert_close(module[1].running_mean, alone[1].running_mean)
    torch.testing.assert_close(module[1].running_var, alone[1].running_var)
    assert module[1].num_batches_tracked == 1
