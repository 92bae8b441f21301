"""Forwards that write into their own parameters give what fresh replicas would, or an error."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asyncdp
from asyncdp.errors import ParameterWrittenError

from .ways import WAYS, way

torch.optim.SGD([torch.ones(1)], 0.1)  # the first one imports much, for which no event loop should wait

pytestmark = pytest.mark.anyio
every_way = pytest.mark.parametrize("name", WAYS)


def halve(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(0.5)


def halve_data(weight: nn.Parameter) -> None:
    weight.data.mul_(0.5)


def replace_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.5


every_write = pytest.mark.parametrize("write", [halve, halve_data, replace_data])


class Rescaled(nn.Module):
    """Halves a weight below itself once for each change of mode, as RWKV does, or at every call."""

    def __init__(self, write: Callable[[nn.Parameter], None], *, always: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        nn.init.constant_(self.layer.weight, 64.0)
        self.write, self.always = write, always
        self.is_rescaled = False

    def forward(self, x: Tensor) -> Tensor:
        if self.always or self.is_rescaled == self.training:
            self.write(self.layer.weight)
            self.is_rescaled = not self.training
        return self.layer(x)


async def check(name: str, module: nn.Module, modes: list[bool], *, grad: bool) -> None:
    """Compare with the module by hand on the first row, and a fresh copy of it on the second."""
    by_hand = copy.deepcopy(module)
    async with way(name, module) as run:
        for number, training in enumerate(modes):
            module.train(training).zero_grad()
            by_hand.train(training).zero_grad()
            x = torch.full((2, 2), 1.0 + number)
            is_split = name in ("data_parallel", "all", "number")
            with torch.set_grad_enabled(grad):
                other = copy.deepcopy(by_hand)
                expected = torch.cat([by_hand(x[:1]), other(x[1:])]) if is_split else by_hand(x)
                found = await run(x)
            assert torch.equal(found, expected)
            assert torch.equal(module.layer.weight, by_hand.layer.weight)
            assert module.is_rescaled == by_hand.is_rescaled
            if grad:
                found.sum().backward()
                expected.sum().backward()
                gradient = by_hand.layer.weight.grad
                if is_split:
                    gradient = gradient + other.layer.weight.grad
                assert torch.equal(module.layer.weight.grad, gradient)


SPLIT_OR_WHOLE = ("data_parallel", "data_parallel on one lane", "all", "number", "on_one_lane", "map")


@pytest.mark.parametrize("name", SPLIT_OR_WHOLE)
@pytest.mark.parametrize("grad", [False, True])
@every_write
async def test_weights_rescaled_once(name: str, write: Any, grad: bool) -> None:
    """What the first lane wrote survives with its flag, and every lane had the weights of the call."""
    if grad and write is replace_data and name not in ("data_parallel", "all", "number"):
        pytest.skip("torch itself gives the gradient of other values")
    await check(name, Rescaled(write), [False, False, True, False, False], grad=grad)


@pytest.mark.parametrize("name", ["data_parallel", "data_parallel on one lane", "all", "number"])
@pytest.mark.parametrize("grad", [False, True])
@every_write
async def test_weights_written_at_every_call(name: str, write: Any, grad: bool) -> None:
    """Each lane writes into the weights of the call, and those of the first lane survive."""
    await check(name, Rescaled(write, always=True), [True] * 4, grad=grad)


@every_way
async def test_evaluation_rescales_once(name: str) -> None:
    """However a module is run, it is rescaled once for all rows."""
    module = Rescaled(halve).eval()
    async with way(name, module) as run:
        for _ in range(3):
            found = await run(torch.ones(4, 2))
            assert torch.equal(torch.stack([*found]), torch.full((4, 2), 64.0))
    if name not in ("on_one_lane", "map"):  # which may use another lane than the first
        assert torch.equal(module.layer.weight, torch.full((2, 2), 32.0))


class Late(nn.Module):
    """Writes into its weight at the third call of each replica set, unlike before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.calls = itertools.count(1)  # an iterator, which lanes share

    def forward(self, x: Tensor) -> Tensor:
        if next(self.calls) > 4:
            halve(self.layer.weight)
        return self.layer(x)


async def test_late_writes_are_an_error() -> None:
    """Lanes that find out too late that they share what they write say so, and what to do."""
    module = Late()
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
        for _ in range(2):
            await engine(torch.ones(2, 1))
        with pytest.raises(ParameterWrittenError, match=r"'layer.weight'.*Load the weights again"):
            await engine(torch.ones(2, 1))
        weight = module.layer.weight.detach().clone()
        found = await engine(torch.ones(2, 1))  # from now on each lane has its own
        assert torch.equal(found, (weight * 0.5 + module.layer.bias).expand(2, 1))


@pytest.mark.parametrize("number", [3, 100])
async def test_parameters_that_nobody_writes_are_shared(number: int) -> None:
    """Only the first pass of a kind gives lanes copies; edits of the weights reach all later ones."""
    module = nn.Sequential(*[nn.Linear(1, 1) for _ in range(number)])
    addresses: set[int] = set()
    module[0].register_forward_hook(lambda each, args, output: addresses.add(each.weight.data_ptr()) or None)
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
        with torch.no_grad():
            await engine(torch.ones(2, 1))
            assert len(addresses) == 2
            addresses.clear()
            await engine(torch.ones(2, 1))
        assert addresses == {module[0].weight.data_ptr()}


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("has_buffer", [False, True])
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("write", [halve, halve_data])
async def test_steps_write_the_weights_of_the_call(
    num_lanes: int, has_buffer: bool, always: bool, write: Any
) -> None:
    """A step whose forward writes into weights is that of fresh replicas; what the first lane wrote stays."""
    module = Rescaled(write, always=always)
    if has_buffer:
        module.layer.register_buffer("table", torch.zeros(1))
    by_hand = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    optimizer_by_hand = torch.optim.SGD(by_hand.parameters(), 0.5)
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:
        for training in (False, True, True, False, True):
            x, y = torch.full((2, 2), 1.0), torch.zeros(2, 2)
            module.train(training)
            by_hand.train(training)
            if not training:
                with torch.no_grad():
                    found = await engine(x)
                    assert torch.equal(found, by_hand(x))
                    continue
            parts = [by_hand] if num_lanes == 1 else [by_hand, copy.deepcopy(by_hand)]
            optimizer_by_hand.zero_grad()
            for part, rows in zip(parts, x.split(2 // num_lanes), strict=True):
                (nn.functional.mse_loss(part(rows), torch.zeros(len(rows), 2)) / num_lanes).backward()
            if num_lanes == 2:
                by_hand.layer.weight.grad += parts[1].layer.weight.grad
            optimizer_by_hand.step()
            await engine.train_step(x, y, nn.functional.mse_loss, optimizer)
            assert torch.allclose(module.layer.weight, by_hand.layer.weight)
            assert module.is_rescaled == by_hand.is_rescaled
