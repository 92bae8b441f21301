"""A step that fails or is cancelled leaves no trace."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.helpers import Latch
from .helpers import engine, same, snapshot

NUM_LANES = 3
NUM_ROWS = 7
PHASES = ("forward", "loss", "backward", "hook")


class Trap:
    """Does something when lane `lane` comes to `phase`; a lane is known by the rows of its shard."""

    def __init__(self, phase: str, lane: int, action: Callable[[], None]) -> None:
        self.phase = phase
        self.lane = lane
        self.action = action
        self.is_set = False

    def visit(self, phase: str, marks: Tensor) -> None:
        first_row = (0, 3, 5)[self.lane]
        if self.is_set and phase == self.phase and bool((marks == first_row).any()):
            self.action()


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, marks: Tensor, trap: Trap) -> Tensor:
        ctx.marks, ctx.trap = marks, trap
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.trap.visit("backward", ctx.marks)
        return gradient, None, None


class Trapped(nn.Module):
    """Batch statistics, and a trap between its layers."""

    def __init__(self, trap: Trap) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
        self.trap = trap

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        y = self.layers[0](x)
        self.trap.visit("forward", marks)
        y = _Pass.apply(self.layers[1](y), marks, self.trap)
        return self.layers[2](y)


class Setting:
    """A module in training, with old gradients on it, and a trap."""

    def __init__(self, phase: str, lane: int, action: Callable[[], None]) -> None:
        torch.manual_seed(0)
        self.trap = Trap(phase, lane, action)
        self.module = Trapped(self.trap)
        self.optimizer = torch.optim.Adam(self.module.parameters(), 0.01)
        self.marks = torch.arange(NUM_ROWS)

    def loss(self, outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        self.trap.visit("loss", targets[1])
        return functional.mse_loss(outputs, targets[0])

    def before_step(self) -> None:
        self.trap.visit("hook", self.marks)

    async def step(self, one: Any) -> None:
        torch.manual_seed(7)
        x, y = torch.randn(NUM_ROWS, 4).double(), torch.randn(NUM_ROWS, 2).double()
        await one.train_step(
            (x, self.marks), (y, self.marks), self.loss, self.optimizer, before_step=self.before_step
        )

    def give_gradients(self) -> None:
        for each in self.module.parameters():
            each.grad = torch.ones_like(each)


class Bang(Exception):
    pass


def bang() -> None:
    raise Bang


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    phase=st.sampled_from(PHASES),
    lane=st.integers(0, NUM_LANES - 1),
    step=st.integers(0, 3),
    old=st.booleans(),
)
def test_a_failed_step_changes_nothing(phase: str, lane: int, step: int, old: bool) -> None:
    """Whichever lane fails, in whichever step and phase: everything is as before, and training goes on."""

    async def main() -> None:
        setting = Setting(phase, lane, bang)
        async with engine(setting.module, NUM_LANES) as one:
            for _ in range(step):
                await setting.step(one)
            if old:
                setting.give_gradients()
            before = snapshot(setting.module, setting.optimizer)
            gradients = [each.grad for each in setting.module.parameters()]
            setting.trap.is_set = True
            with pytest.raises(Bang):
                await setting.step(one)
            assert same(before, snapshot(setting.module, setting.optimizer))
            assert all(a is b.grad for a, b in zip(gradients, setting.module.parameters(), strict=True))
            assert one.statistics().num_steps == step
            setting.trap.is_set = False
            await setting.step(one)
            after = snapshot(setting.module, setting.optimizer)
        assert same(after, await untroubled(step + 1, old_before_last=old))

    asyncio.run(main())


async def untroubled(num_steps: int, *, old_before_last: bool = False) -> Any:
    """What the same steps give when nothing ever fails."""
    setting = Setting("never", 0, bang)
    async with engine(setting.module, NUM_LANES) as one:
        for step in range(num_steps):
            if old_before_last and step == num_steps - 1:
                setting.give_gradients()
            await setting.step(one)
    return snapshot(setting.module, setting.optimizer)


@pytest.mark.anyio
@pytest.mark.parametrize("lane", range(NUM_LANES))
@pytest.mark.parametrize("phase", [*PHASES, "optimizer"])
async def test_a_cancelled_step_is_whole_or_not_at_all(
    phase: str, lane: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled on its lanes, a step leaves no trace; cancelled after them, it is a whole step."""
    latch = Latch()
    setting = Setting(phase, lane, latch.hold)
    if phase == "optimizer":
        step = setting.optimizer.step

        def held_step() -> None:
            if setting.trap.is_set:
                latch.hold()
            step()

        monkeypatch.setattr(setting.optimizer, "step", held_step)
    async with engine(setting.module, NUM_LANES) as one:
        await setting.step(one)
        before = snapshot(setting.module, setting.optimizer)
        setting.trap.is_set = True
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(setting.step, one)
                await latch.wait_entered()
                scope.cancel()
                latch.open()
        assert scope.cancelled_caught
        after = snapshot(setting.module, setting.optimizer)
        whole = phase in ("hook", "optimizer")
        assert one.statistics().num_steps == 1 + whole
        assert same(after, await untroubled(2) if whole else before)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(turns=st.integers(0, 40), steps=st.integers(0, 2))
def test_cancelling_at_random_points(turns: int, steps: int) -> None:
    """However many turns of the loop a step got before it is cancelled, it is done or has not begun."""

    async def main() -> None:
        setting = Setting("never", 0, bang)
        async with engine(setting.module, NUM_LANES) as one:
            for _ in range(steps):
                await setting.step(one)
            before = snapshot(setting.module, setting.optimizer)
            task = asyncio.ensure_future(setting.step(one))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            after = snapshot(setting.module, setting.optimizer)
            done = one.statistics().num_steps - steps
            assert done in (0, 1)
            assert same(after, await untroubled(steps + 1) if done else before)

    asyncio.run(main())


@pytest.mark.anyio
async def test_steps_of_one_engine_wait_for_each_other() -> None:
    """Steps started together are taken one after the other, each with the weights the last one left."""
    setting = Setting("never", 0, bang)
    async with engine(setting.module, NUM_LANES) as one:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(setting.step, one)
        assert one.statistics().num_steps == 4
    assert same(snapshot(setting.module, setting.optimizer), await untroubled(4))


@pytest.mark.anyio
async def test_an_optimizer_that_fails_says_what_that_means() -> None:
    """An error of the optimizer itself carries a note that parameters may have changed."""
    module = nn.Linear(2, 2)

    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise Bang

    optimizer = Broken(module.parameters(), 0.1)
    before = copy.deepcopy(module.state_dict())
    async with engine(module) as one:
        with pytest.raises(Bang) as caught:
            await one.train_step(torch.ones(4, 2), torch.ones(4, 2), functional.mse_loss, optimizer)
    assert any("optimizer itself" in note for note in caught.value.__notes__)
    assert same(before, module.state_dict())
