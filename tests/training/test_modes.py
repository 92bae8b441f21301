"""Predictions in eval mode, and copies of the whole state, beside training."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import asyncdp

from .helpers import same, snapshot

pytestmark = pytest.mark.anyio

NUM_STEPS = 25
LANES = pytest.mark.parametrize(("num_lanes", "choice"), [(1, "auto"), (2, "all"), (2, "auto")])


class Net(nn.Module):
    """Differs by mode in dropout and, if it has any, in batch statistics."""

    def __init__(self, has_statistics: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16) if has_statistics else nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Any:
        return self.last(self.dropout(self.norm(self.first(inputs)).relu()))


Predict = Callable[[Any, Tensor], AsyncIterator[Tensor]]


async def called(view: Any, queries: Tensor) -> AsyncIterator[Tensor]:
    yield await view(queries)


async def on_one_lane(view: Any, queries: Tensor) -> AsyncIterator[Tensor]:
    yield await view.on_one_lane(queries)


async def mapped(view: Any, queries: Tensor) -> AsyncIterator[Tensor]:
    async with view.map([queries] * 3) as results:
        async for result in results:
            yield result


async def batched(view: Any, queries: Tensor) -> AsyncIterator[Tensor]:
    async with asyncdp.Batcher(view, max_batch_size=4) as batcher:
        calls: list[Any] = [None] * len(queries)

        async def call(index: int) -> None:
            calls[index] = await batcher(queries[index])

        async with anyio.create_task_group() as group:
            for index in range(len(queries)):
                group.start_soon(call, index)
        yield torch.stack(calls)


def eval_answers(module: nn.Module, states: list[Any], queries: Tensor) -> list[Tensor]:
    """What the module answers in eval mode with each of the states."""
    twin = copy.deepcopy(module).eval()
    answers = []
    for state in states:
        twin.load_state_dict(state)
        with torch.no_grad():
            answers.append(twin(queries))
    return answers


@LANES
@pytest.mark.parametrize("predict", [called, on_one_lane, mapped, batched])
async def test_a_view_in_eval_mode_answers_beside_steps(
    predict: Predict, num_lanes: int, choice: str
) -> None:
    """However a view is called, it gives the answer that eval mode gives after some whole step."""
    torch.manual_seed(0)
    module = Net(True).double().train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    inputs, targets = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    queries = torch.randn(4, 4).double()
    states = [copy.deepcopy(module.state_dict())]
    answers: list[Tensor] = []
    is_done = False
    async with asyncdp.DataParallel(module, ["cpu"] * num_lanes, num_lanes=choice) as engine:

        async def ask() -> None:
            while not is_done:
                answers.extend([each async for each in predict(engine.in_mode(False), queries)])

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            for _ in range(NUM_STEPS):
                await engine.train_step(inputs, targets, cross_entropy, optimizer)
                states.append(copy.deepcopy(module.state_dict()))
            is_done = True
    expected = eval_answers(module, states, queries)
    assert answers
    for answer in answers:
        # The rows of a batch that was split or put together are those of one step, or of several calls.
        groups = [answer] if predict is not batched else answer.split(1)
        offset = 0
        for part in groups:
            rows = slice(offset, offset + len(part))
            assert any(torch.allclose(part, each[rows], rtol=1e-10, atol=1e-10) for each in expected)
            offset += len(part)
    assert all(each.training for each in module.modules())


@LANES
async def test_a_view_leaves_the_module_alone(num_lanes: int, choice: str) -> None:
    """In train mode a view drops and collects statistics; the engine itself goes on in eval mode."""
    module = Net(True).eval()
    queries = torch.randn(8, 4)
    async with asyncdp.DataParallel(module, ["cpu"] * num_lanes, num_lanes=choice) as engine:
        expected = await engine(queries)
        before = module.norm.running_mean.clone()
        await engine.in_mode(False)(queries)
        assert torch.equal(module.norm.running_mean, before)
        dropped = await engine.in_mode(True)(queries)
        assert not torch.allclose(dropped, expected)
        assert not torch.equal(module.norm.running_mean, before)
        assert not any(each.training for each in module.modules())
        assert torch.allclose(await engine(queries), eval_answers(module, [module.state_dict()], queries)[0])


async def test_a_view_follows_its_module() -> None:
    """A flag of one submodule, a new attribute and a replaced parameter: only the flag does not count."""
    module = Net(False).eval()
    queries = torch.randn(6, 4)
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
        view = engine.in_mode(False)
        await view(queries)
        module.dropout.train()
        module.last = nn.Linear(16, 5)
        assert torch.allclose(await view(queries), eval_answers(module, [module.state_dict()], queries)[0])
        assert module.dropout.training


async def test_a_view_can_be_differentiated() -> None:
    """Gradients of a view's call reach the module's parameters."""
    module = Net(False).double().train()
    queries = torch.randn(6, 4).double()
    twin = copy.deepcopy(module).eval()
    twin(queries).square().sum().backward()
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
        (await engine.in_mode(False)(queries)).square().sum().backward()
    for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad)


async def test_a_mode_is_true_or_false() -> None:
    """The name of a mode is refused: any name would mean train mode."""
    async with asyncdp.DataParallel(Net(False), "cpu") as engine:
        with pytest.raises(TypeError, match=r"in_mode\(False\)"):
            engine.in_mode("eval")  # type: ignore[arg-type]
        assert "eval mode" in repr(engine.in_mode(False))


@LANES
async def test_snapshots_beside_steps_are_whole(num_lanes: int, choice: str) -> None:
    """Every copy of module and optimizer is that of some whole step, for two engines over one module."""
    torch.manual_seed(0)
    module = Net(True)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    inputs, targets = torch.randn(8, 4), torch.randint(0, 3, (8,))
    states = [snapshot(module, optimizer)]
    copies: list[Any] = []
    is_done = False
    lanes = ["cpu"] * num_lanes
    async with (
        asyncdp.DataParallel(module, lanes, num_lanes=choice) as engine,
        asyncdp.DataParallel(module, "cpu") as other,
        anyio.create_task_group() as group,
    ):

        async def take(one: asyncdp.DataParallel) -> None:
            while not is_done:
                copies.append(await one.snapshot(optimizer))

        group.start_soon(take, engine)
        group.start_soon(take, other)
        for _ in range(NUM_STEPS):
            await engine.train_step(inputs, targets, cross_entropy, optimizer)
            states.append(snapshot(module, optimizer))
        is_done = True
    assert copies
    for each in copies:
        assert any(same(each, {"module": one["state"], "optimizer": one["optimizer"]}) for one in states)


async def test_a_snapshot_is_a_copy_that_can_be_loaded() -> None:
    """It shares nothing with the module, loads into another, and has the optimizer only if asked."""
    module = Net(True)
    inputs, targets = torch.randn(8, 4), torch.randint(0, 3, (8,))
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    async with asyncdp.DataParallel(module, "cpu*2") as engine:
        await engine.train_step(inputs, targets, cross_entropy, optimizer)
        with torch.inference_mode():
            taken = await engine.snapshot(optimizer)
        assert [*await engine.snapshot()] == ["module"]
        before = copy.deepcopy(module.state_dict())
        await engine.train_step(inputs, targets, cross_entropy, optimizer)
        assert same(dict(taken["module"]), dict(before))
        assert taken["module"]._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]
        with pytest.raises(asyncdp.errors.NotAnOptimizerError):
            await engine.snapshot(object())
    twin = Net(True)
    twin.load_state_dict(taken["module"])
    other = torch.optim.Adam(twin.parameters(), 0.01)
    other.load_state_dict(taken["optimizer"])
    assert same(other.state_dict(), taken["optimizer"])
