"""Checkpoints: a training goes on from one as if it had never stopped, and one is whole or not there."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, SequentialLR, StepLR

import asyncdp
from asyncdp.errors import (
    CheckpointMismatchError,
)

from ..runtime.helpers import Latch
from .helpers import Gated, batch, engine, gates, mlp, same, snapshot

pytestmark = pytest.mark.anyio


def dropout_net() -> nn.Module:
    """A module with buffers, and with random numbers in its forward."""
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3)).double()


def pair(module: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer with state, and a scheduler with others inside."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    parts = [LambdaLR(optimizer, lambda step: (step + 1) / 3), StepLR(optimizer, 3)]
    return optimizer, SequentialLR(optimizer, parts, milestones=[3])


async def take_steps(each: asyncdp.DataParallel, optimizer: Any, scheduler: Any, count: int) -> None:
    """Train on batches that all generators of the process have a part in."""
    for _ in range(count):
        inputs, targets = batch(6)
        inputs = inputs + random.random() + np.random.rand()
        await each.train_step(inputs, targets, cross_entropy, optimizer)
        scheduler.step()


async def test_a_loaded_training_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    """Five steps, a checkpoint and five more give what five steps after loading it elsewhere give."""
    module = dropout_net()
    optimizer, scheduler = pair(module)
    async with engine(module, 1) as one:
        await take_steps(one, optimizer, scheduler, 5)
        saved = await one.save(tmp_path / "new" / "a", optimizer, scheduler, extra={"epoch": 2})
        await take_steps(one, optimizer, scheduler, 5)
    other = dropout_net()
    other_optimizer, other_scheduler = pair(other)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    async with engine(other, 1) as two:
        loaded = await two.load(tmp_path / "new" / "a", other_optimizer, other_scheduler)
        assert loaded == saved
        assert (loaded.num_steps, two.statistics().num_steps, loaded.extra) == (5, 5, {"epoch": 2})
        await take_steps(two, other_optimizer, other_scheduler, 5)
    assert same(snapshot(module, optimizer), snapshot(other, other_optimizer))
    assert scheduler.get_last_lr() == other_scheduler.get_last_lr()


class Odd(nn.Module):
    """A module with all kinds of state."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=torch.bfloat16)
        self.tied = self.linear
        self.frozen = nn.Parameter(torch.full((3,), fill), requires_grad=False)
        self.register_buffer("sparse", (torch.eye(3) * fill).to_sparse())
        self.register_buffer("complex", torch.full((), fill, dtype=torch.complex64))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("passing", torch.full((1,), fill), persistent=False)
        self.extra = (fill, {"deep": [fill]})
        nn.init.constant_(self.linear.weight, fill)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.frozen


async def test_every_kind_of_state_comes_back(tmp_path: Path) -> None:
    """Half precision, tied and frozen parameters, sparse and complex buffers, and what is no tensor."""
    module, other = Odd(1.0), Odd(2.0)
    optimizer = torch.optim.Adam(module.parameters(), torch.tensor(0.5))
    other_optimizer = torch.optim.Adam(other.parameters(), torch.tensor(0.25), foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    other_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    async with engine(module) as one, engine(other) as two:
        await one.save(tmp_path / "a", optimizer, scaler=scaler)
        await two.load(tmp_path / "a", other_optimizer, scaler=other_scaler)
        assert torch.equal(await two(torch.ones(4, 3)), torch.ones(4, 3))
    mine, theirs = module.state_dict(), other.state_dict()
    assert torch.equal(mine.pop("sparse").to_dense(), theirs.pop("sparse").to_dense())
    assert same(dict(mine), dict(theirs))
    assert other.extra == (1.0, {"deep": [1.0]})
    assert other.passing.item() == 2.0
    assert other_optimizer.param_groups[0]["lr"].item() == 0.5
    assert other_optimizer.param_groups[0]["foreach"] is False
    assert other_scaler.get_scale() == 8.0


async def test_parameters_are_found_by_their_names(tmp_path: Path) -> None:
    """An optimizer that was made over the same parameters in another order gets each one's own state."""
    module, other = mlp(), mlp()
    optimizer = torch.optim.Adam(module.parameters())
    other_optimizer = torch.optim.Adam(reversed([*other.parameters()]))
    async with engine(module) as one, engine(other) as two:
        await one.train_step(*batch(6), cross_entropy, optimizer)
        await one.save(tmp_path / "a", optimizer)
        await two.load(tmp_path / "a", other_optimizer)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert same(optimizer.state[mine], other_optimizer.state[theirs])


async def test_plain_torch_reads_checkpoints(tmp_path: Path) -> None:
    """`torch.distributed.checkpoint.load` finds tensors of module and optimizer under their names."""
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    async with engine(module) as one:
        await one.train_step(*batch(6), cross_entropy, optimizer)
        await one.save(tmp_path / "a", optimizer)
    momentum = torch.zeros(8, 5, dtype=torch.float64)
    state: dict[str, Any] = {"module": mlp().state_dict()}
    state["optimizer"] = {"state": {"0.weight": {"momentum_buffer": momentum}}, "param_groups": None}
    with pytest.warns(UserWarning, match="single process"):
        await anyio.to_thread.run_sync(lambda: dcp.load(state, checkpoint_id=tmp_path / "a"))
    assert same(dict(state["module"]), dict(module.state_dict()))
    assert torch.equal(momentum, optimizer.state[module[0].weight]["momentum_buffer"])
    assert state["optimizer"]["param_groups"][0]["momentum"] == 0.9


async def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """A step begins and ends while the disk is slow; the checkpoint has the state from before it."""
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    before = copy.deepcopy(module.state_dict())
    gates["write"] = gate = Latch()
    async with engine(module) as one, anyio.create_task_group() as group:
        group.start_soon(one.save, tmp_path / "a", optimizer, Gated(optimizer, 1))
        await gate.wait_entered()
        await one.train_step(*batch(6), cross_entropy, optimizer)
        assert not await anyio.Path(tmp_path / "a").exists()
        gate.open()
    async with engine(module) as one:
        assert (await one.load(tmp_path / "a")).num_steps == 0
    assert same(dict(before), dict(module.state_dict()))


async def test_saves_and_loads_see_whole_steps(tmp_path: Path) -> None:
    """Beside a stream of 500 steps each checkpoint is of one moment, and no step sees half a load."""
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))
    for each in module.parameters():
        nn.init.zeros_(each)
    optimizer = torch.optim.SGD(module.parameters(), 1.0, maximize=True)

    def loss(outputs: Tensor, targets: None) -> Tensor:
        return outputs.sum() * 0 + sum(each.sum() for each in module.parameters())  # each step adds 1

    seen = []
    async with (
        engine(module, 1) as one,
        one.train([(torch.zeros(1, 1), None)] * 500, loss, optimizer) as steps,
    ):
        async for step in steps:
            if step.index % 50 == 0:
                seen.append(await one.save(tmp_path / str(step.index), optimizer))
            if step.index % 100 == 60:
                await one.load(seen[-1].path, optimizer)
        for each in seen:
            assert (await one.load(each.path, optimizer)).num_steps == each.num_steps
            assert {value.item() for value in module.parameters()} == {each.num_steps}


async def test_a_load_waits_for_the_step_under_way(tmp_path: Path) -> None:
    """A step that has begun ends first: its gradients never meet the weights that are loaded."""
    module, latch = mlp(), Latch()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def held(outputs: Tensor, targets: Tensor) -> Tensor:
        latch.hold()
        return cross_entropy(outputs, targets)

    async with engine(module) as one:
        saved = copy.deepcopy(module.state_dict())
        await one.save(tmp_path / "a", optimizer)
        with one.no_sync():
            await one.train_step(*batch(6), cross_entropy, optimizer)
        async with anyio.create_task_group() as group:
            group.start_soon(one.train_step, *batch(6), held, optimizer)
            await latch.wait_entered()
            group.start_soon(one.load, tmp_path / "a", optimizer)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            latch.open()
        assert same(dict(saved), dict(module.state_dict()))
        assert one.statistics().num_steps == 0
        assert all(each.grad is None for each in module.parameters())


class Picky(nn.Linear):
    """Refuses a state after most of it was loaded."""

    def set_extra_state(self, state: Any) -> None:
        if state == "bad":
            raise ValueError("picky")

    def get_extra_state(self) -> Any:
        return "bad" if self.in_features == 5 and self.bias[0] > 0 else "good"


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """What is loaded into, changed in one way."""
    module = mlp()
    given: dict[str, Any] = {"module": module, "optimizer": torch.optim.Adam(module.parameters())}
    change(given)
    given.setdefault("scheduler", StepLR(given["optimizer"], 2))
    return given


def other_module(module: nn.Module) -> Callable[[dict[str, Any]], object]:
    """Have the state loaded into another module."""
    return lambda given: given.update(module=module, optimizer=torch.optim.Adam(module.parameters()))


MISMATCHES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another module": (other_module(nn.Linear(5, 3)), "it has no 'weight', 'bias' of the module, and"),
    "one more": (other_module(nn.Sequential(*mlp(), nn.Linear(3, 1))), "it has no '5.weight', '5.bias' of"),
    "one less": (other_module(mlp(bias=False)), "the module has no '0.bias'"),
    "shape": (
        other_module(nn.Sequential(nn.Linear(4, 8), *[*mlp()][1:])),
        r"'0.weight' has the shape \[8, 5\] in it, and \[8, 4\] in the module",
    ),
    "dtype": (other_module(mlp(torch.float32)), "'0.weight' is of torch.float64 in it, and of torch.float32"),
    "optimizer": (
        lambda given: given.update(optimizer=torch.optim.SGD(given["module"].parameters(), 0.1)),
        "its optimizer is of the class Adam, and that given here of SGD",
    ),
    "parameters": (
        lambda given: given.update(optimizer=torch.optim.Adam([*given["module"].parameters()][:3])),
        "group 0 of only one of the two optimizers has '2.bias', '4.bias', '4.weight'",
    ),
    "groups": (
        lambda given: given.update(
            optimizer=torch.optim.Adam([{"params": [each]} for each in given["module"].parameters()])
        ),
        "its optimizer has 1 groups of parameters, and that given here 6",
    ),
    "scheduler": (
        lambda given: given.update(scheduler=LambdaLR(given["optimizer"], lambda step: 1.0)),
        "its scheduler is of the class StepLR, and that given here of LambdaLR",
    ),
    "scaler": (lambda given: given.update(scaler=torch.amp.GradScaler("cpu")), "it holds no scaler"),
}


@pytest.mark.parametrize("name", MISMATCHES)
async def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    """An error names the difference, and nothing has changed: no weight, no state, no random generator."""
    saved = changed(lambda given: None)
    async with engine(saved.pop("module")) as one:
        await one.train_step(*batch(6), cross_entropy, saved["optimizer"])
        await one.save(tmp_path / "a", **saved)
    given = changed(MISMATCHES[name][0])
    module, optimizer = given.pop("module"), given["optimizer"]
    before, numbers = snapshot(module, optimizer), torch.get_rng_state()
    async with engine(module) as one:
        with pytest.raises(CheckpointMismatchError, match=MISMATCHES[name][1]):
            await one.load(tmp_path / "a", **given)
    assert same(before, snapshot(module, optimizer))
    assert torch.equal(numbers, torch.get_rng_state())


async def test_a_load_that_fails_in_the_module_is_undone(tmp_path: Path) -> None:
    """When code of the module itself raises, what was loaded before is put back, the optimizer's too."""
    modules = [nn.Sequential(Picky(5, 8), nn.Linear(8, 3)) for _ in range(2)]
    for sign, each in zip((1, -1), modules, strict=True):
        nn.init.constant_(each[0].bias, sign)
    saved, module = modules
    optimizer = torch.optim.Adam(module.parameters())
    async with engine(saved) as one, engine(module) as two:
        saved_optimizer = torch.optim.Adam(saved.parameters())
        for each, its in ((one, saved_optimizer), (two, optimizer)):
            await each.train_step(*batch(6, torch.float32), cross_entropy, its)
        await one.save(tmp_path / "a", saved_optimizer)
        before = snapshot(module, optimizer)
        with pytest.raises(ValueError, match="picky"):
            await two.load(tmp_path / "a", optimizer)
        assert same(before, snapshot(module, optimizer))
        assert two.statistics().num_steps == 1
