"""Forwards that write into their inputs: on several lanes they do what they do on one device."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asyncdp

from .conftest import Passes
from .models import Fn


def add_position(m: Any, x: Tensor) -> Tensor:
    """As vision transformers do."""
    x += m.position
    return m.layer(x)


def positioned() -> nn.Module:
    module = Fn(add_position, layer=nn.Linear(3, 3))
    module.position = nn.Parameter(torch.randn(3))
    return module


def add_twice(_m: Any, x: Tensor, same: Tensor) -> Tensor:
    x.mul_(2)
    return x * same


def sine(_m: Any, x: Tensor) -> Tensor:
    return x.mul_(x.detach().clone()).sin_()


FORWARDS: dict[str, Callable[[], nn.Module]] = {
    "a parameter added": positioned,
    "in-place ReLU first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)),
    "in-place ReLU alone": lambda: nn.ReLU(inplace=True),
    "twice": lambda: Fn(sine),
}


@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("name", FORWARDS)
def test_results_gradients_and_the_input(dp: Passes, name: str, learns: bool, lanes: int) -> None:
    """Results, all gradients and what the caller's tensor holds and leads back to are those of one device."""
    module = FORWARDS[name]()
    twin = copy.deepcopy(module)
    before, other = torch.randn(7, 3, requires_grad=learns), torch.randn(7, 3)
    twin_before = before.detach().clone().requires_grad_(learns)
    x, y = before * other, twin_before * other

    found, expected = dp(module, x, lanes=lanes), twin(y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x, y)
    assert x.requires_grad == y.requires_grad
    if expected.requires_grad:
        (found.square().sum() + (x * x).sum()).backward()
        (expected.square().sum() + (y * y).sum()).backward()
        for own, its in zip([before, *module.parameters()], [twin_before, *twin.parameters()], strict=True):
            torch.testing.assert_close(own.grad, its.grad)


def test_second_derivatives(dp: Passes) -> None:
    """A gradient penalty behind a forward that writes is the one of one device."""
    module = positioned().double()
    twin = copy.deepcopy(module)
    leaves = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        leaves[1].copy_(leaves[0])
    for each, leaf, run in ((module, leaves[0], dp), (twin, leaves[1], lambda m, x: m(x))):
        out = run(each, leaf.sin()).tanh()
        grads = torch.autograd.grad(out.sum(), [leaf, *each.parameters()], create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for own, its in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, its.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(dp: Passes, mode: Callable[[], Any]) -> None:
    """Without gradients too, even where a forward switches them on for itself."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return add_position(m, x)

    module = positioned()
    inner = Fn(forward if mode is torch.no_grad else add_position, layer=module.layer)
    inner.position = module.position
    x = torch.randn(4, 3)
    y = x.clone()
    with mode():
        torch.testing.assert_close(dp(inner, x), inner(y))
        torch.testing.assert_close(x, y)
        if mode is torch.inference_mode:
            z = torch.randn(4, 3)
            torch.testing.assert_close(dp(inner, z.clone()), inner(z))


def test_a_tensor_given_twice_stays_one(dp: Passes) -> None:
    """What is written into one argument is seen in the other, when both are the same tensor."""
    before = torch.randn(4, 3, requires_grad=True)
    x = before.sin()
    y = before.sin()
    dp(Fn(add_twice), x, x).sum().backward()
    found, before.grad = before.grad, None
    add_twice(None, y, y).sum().backward()
    torch.testing.assert_close(found, before.grad)


def test_tensors_that_overlap_are_not_written(dp: Passes) -> None:
    """Where autograd could not tell what was written into which, torch's own error says so."""
    module = positioned()
    module.function = lambda m, x, part: add_position(m, x) * part
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="modified inplace"):
        dp(module, x, x[:, :1])


def test_a_leaf_that_learns_is_not_written(dp: Passes) -> None:
    """As on one device, writing into a leaf that wants its gradient is an error, and changes nothing."""
    x = torch.randn(4, 3, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="inplace"):
        dp(positioned(), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["a parameter added", "in-place ReLU alone"])
def test_what_was_saved_earlier_is_told(dp: Passes, name: str) -> None:
    """A graph that needs the input as it was before fails in its backward, as on one device."""
    factor = torch.ones(3, requires_grad=True)
    x = torch.randn(4, 3)
    earlier = (x * factor).sum()
    dp(FORWARDS[name](), x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        earlier.backward()


@pytest.mark.parametrize("writes", [False, True])
def test_edits_between_forward_and_backward_are_told(dp: Passes, writes: bool) -> None:
    """An input changed in place after a forward that saved it makes the backward fail, as in plain torch."""
    x = torch.randn(4, 3)
    loss = dp(positioned() if writes else nn.Linear(3, 3), x).sum()
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_edits_of_what_no_backward_needs_are_fine(dp: Passes) -> None:
    """A batch that nothing has saved may be filled anew before the backward."""
    module = Fn(lambda m, x: x + m.layer.bias, layer=nn.Linear(3, 3))
    x = torch.randn(4, 3)
    loss = dp(module, x).sum()
    x.zero_()
    loss.backward()
    assert module.layer.bias.grad.tolist() == [4.0] * 3


def test_shards_of_the_verb_are_views() -> None:
    """Who scatters and writes into a shard that a graph records hears of it, since its whole would not."""
    shards = asyncdp.scatter(torch.randn(4, 3, requires_grad=True).sin(), "cpu*2")
    with pytest.raises(RuntimeError, match="modified inplace"):
        shards[0].relu_()


async def train(lanes: int, module: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    async with asyncdp.DataParallel(module, f"cpu*{lanes}", num_lanes="all") as engine:
        for _ in range(2):
            await engine.train_step(x.clone(), x.sum(1, keepdim=True), nn.MSELoss(), optimizer)


def test_training() -> None:
    """Steps of a module that writes into its input end where those of one lane end."""
    module = nn.Sequential(positioned(), nn.Linear(3, 1)).double()
    twin = copy.deepcopy(module)
    x = torch.randn(6, 3, dtype=torch.float64)
    for lanes, each in ((2, module), (1, twin)):
        asyncio.run(train(lanes, each, x, torch.optim.SGD(each.parameters(), 0.1)))
    for own, its in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, its)
