"""A step that fails or is cancelled leaves no trace."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from asyncdp import DataParallel

from ..runtime.helpers import Latch
from .helpers import Snapshot, engine, same, snapshot

NUM_LANES = 3
NUM_ROWS = 7
# How many lanes, and whether the module has batch statistics: without, one lane trains it in place.
KINDS = {"three lanes": (NUM_LANES, True), "one replica": (1, True), "in place": (1, False)}
PLACES = [*(("three lanes", lane) for lane in range(NUM_LANES)), ("one replica", 0), ("in place", 0)]
HOMES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
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
    """Batch statistics or none, and a trap between its layers."""

    def __init__(self, trap: Trap, has_statistics: bool) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(6) if has_statistics else nn.LayerNorm(6)
        self.layers = nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 2)).double()
        self.trap = trap

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        y = self.layers[0](x)
        self.trap.visit("forward", marks)
        y = _Pass.apply(self.layers[1](y), marks, self.trap)
        return self.layers[2](y)


class Setting:
    """A module in training, with old gradients on it, and a trap."""

    def __init__(
        self,
        phase: str,
        lane: int,
        action: Callable[[], None],
        kind: str = "three lanes",
        home: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        self.trap = Trap(phase, lane, action)
        self.kind = kind
        self.home = home
        self.num_lanes, has_statistics = KINDS[kind]
        self.module = Trapped(self.trap, has_statistics).to(home)
        self.optimizer = torch.optim.Adam(self.module.parameters(), 0.01)
        self.marks = torch.arange(NUM_ROWS)

    def loss(self, outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        self.trap.visit("loss", targets[1])
        return functional.mse_loss(outputs, targets[0])

    def before_step(self) -> None:
        self.trap.visit("hook", self.marks)

    async def step(self, one: Any) -> None:
        torch.manual_seed(7)
        x, y = (torch.randn(NUM_ROWS, width).double().to(self.home) for width in (4, 2))
        await one.train_step(
            (x, self.marks), (y, self.marks), self.loss, self.optimizer, before_step=self.before_step
        )

    def engine(self) -> DataParallel:
        return engine(self.module, self.num_lanes, self.home)

    async def is_untroubled(self, num_steps: int, *, old_before_last: bool = False) -> bool:
        """Whether everything is as after so many steps of which none failed."""
        expected = await untroubled(num_steps, self.kind, self.home, old_before_last=old_before_last)
        # Concurrent streams may have the GPU's libraries add up in another order.
        return same(snapshot(self.module, self.optimizer), expected, 0.0 if self.home == "cpu" else 1e-10)

    def give_gradients(self) -> None:
        for each in self.module.parameters():
            each.grad = torch.ones_like(each)


class Bang(Exception):
    pass


def bang() -> None:
    raise Bang


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("kind", "lane"), PLACES)
@pytest.mark.parametrize("home", HOMES)
def test_a_failed_step_changes_nothing(home: str, kind: str, lane: int, phase: str) -> None:
    """Whichever lane fails, in whichever step and phase: everything is as before, and training goes on."""

    async def main() -> None:
        for step, old in itertools.product(range(4), (False, True)):
            assert await fail_in(Setting(phase, lane, bang, kind, home), step, old)

    asyncio.run(main())


async def fail_in(setting: Setting, step: int, old: bool) -> bool:
    """Fail in step `step`, with gradients there before it or not, then take it; tell if it left no trace."""
    async with setting.engine() as one:
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
    return await setting.is_untroubled(step + 1, old_before_last=old)


_untroubled: dict[tuple[int, str, str, bool], Snapshot] = {}


async def untroubled(num_steps: int, kind: str, home: str, *, old_before_last: bool) -> Snapshot:
    """What the same steps give when nothing ever fails."""
    key = (num_steps, kind, home, old_before_last)
    if key not in _untroubled:
        setting = Setting("never", 0, bang, kind, home)
        async with setting.engine() as one:
            for step in range(num_steps):
                if old_before_last and step == num_steps - 1:
                    setting.give_gradients()
                await setting.step(one)
        _untroubled[key] = snapshot(setting.module, setting.optimizer)
    return _untroubled[key]


@pytest.mark.anyio
@pytest.mark.parametrize(("kind", "lane"), PLACES)
@pytest.mark.parametrize("phase", [*PHASES, "optimizer"])
@pytest.mark.parametrize("home", HOMES)
async def test_a_cancelled_step_is_whole_or_not_at_all(
    home: str, phase: str, kind: str, lane: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled on its lanes, a step leaves no trace; cancelled after them, it is a whole step."""
    latch = Latch()
    setting = Setting(phase, lane, latch.hold, kind, home)
    if phase == "optimizer":
        step = setting.optimizer.step

        def held_step() -> None:
            if setting.trap.is_set:
                latch.hold()
            step()

        monkeypatch.setattr(setting.optimizer, "step", held_step)
    async with setting.engine() as one:
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
        whole = phase in ("hook", "optimizer")
        assert one.statistics().num_steps == 1 + whole
        if whole:
            assert await setting.is_untroubled(2)
        else:
            assert same(snapshot(setting.module, setting.optimizer), before)


@pytest.mark.parametrize("home", HOMES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(turns=st.integers(0, 40), steps=st.integers(0, 2), kind=st.sampled_from(list(KINDS)))
def test_cancelling_at_random_points(home: str, turns: int, steps: int, kind: str) -> None:
    """However many turns of the loop a step got before it is cancelled, it is done or has not begun."""

    async def main() -> None:
        setting = Setting("never", 0, bang, kind, home)
        async with setting.engine() as one:
            for _ in range(steps):
                await setting.step(one)
            before = snapshot(setting.module, setting.optimizer)
            task = asyncio.ensure_future(setting.step(one))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            done = one.statistics().num_steps - steps
            assert done in (0, 1)
            if done:
                assert await setting.is_untroubled(steps + 1)
            else:
                assert same(snapshot(setting.module, setting.optimizer), before)

    asyncio.run(main())


@pytest.mark.anyio
async def test_steps_of_one_engine_wait_for_each_other() -> None:
    """Steps started together are taken one after the other, each with the weights the last one left."""
    setting = Setting("never", 0, bang)
    async with setting.engine() as one:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(setting.step, one)
        assert one.statistics().num_steps == 4
    assert await setting.is_untroubled(4)


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


class Filling(nn.Module):
    """Puts a tensor into a buffer that was None at first, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("seen", None)
        self.fails = True

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().sum(0) if self.seen is None else self.seen + 1
        if self.fails and 1.0 in x[:, 0]:
            raise Bang
        return self.layer(x)


@pytest.mark.anyio
@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("failing_row", [0, 3])
async def test_a_buffer_that_was_none_is_none_again(num_lanes: int, failing_row: int) -> None:
    """A step that fails after its forward filled an empty buffer leaves it empty; the next one fills it."""
    module = Filling()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    x = torch.zeros(4, 2)
    x[failing_row] = 1.0
    async with engine(module, num_lanes) as one:
        for _ in range(2):
            with pytest.raises(Bang):
                await one.train_step(x, torch.ones(4, 2), functional.mse_loss, optimizer)
            assert module.seen is None
        module.fails = False
        await one.train_step(x, torch.ones(4, 2), functional.mse_loss, optimizer)
        first_shard = x[: 4 // num_lanes].sum(0)
        assert torch.equal(module.seen, first_shard)
        module.fails = True
        with pytest.raises(Bang):
            await one.train_step(x, torch.ones(4, 2), functional.mse_loss, optimizer)
        assert torch.equal(module.seen, first_shard)
