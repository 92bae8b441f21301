"""What a step must not leave behind, or take over, from gradients that do not pass through its lanes."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..notes import Notes
from ..runtime.helpers import Latch, run_stages
from .helpers import batch, distance, engine, mlp, same, serial_step, snapshot
from .test_options import pair, sgd

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("num_lanes", [1, 2])


class Bang(Exception):
    pass


@both
async def test_a_loss_may_look_at_the_parameters(num_lanes: int) -> None:
    """A penalty on the module's own parameters counts as it does in a step of one device."""
    module, serial = pair()

    def loss_of(each: nn.Module) -> Any:
        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            penalty = sum(one.square().sum() for one in each.parameters())
            return functional.cross_entropy(outputs, targets) + 0.1 * penalty

        return loss

    optimizer, serial_optimizer = sgd(module), sgd(serial)
    async with engine(module, num_lanes) as one:
        for _ in range(3):
            data = batch(8)
            await one.train_step(*data, loss_of(module), optimizer)
            serial_step(serial, serial_optimizer, *data, loss_of(serial))
    assert distance(module, serial) < 1e-12


@both
async def test_direct_gradients_of_a_failed_step_are_gone(num_lanes: int) -> None:
    """What a loss added to the module's own gradients before a lane failed is taken away again."""
    module, _ = pair()
    optimizer = sgd(module)
    old = torch.ones_like(module[0].weight)
    module[0].weight.grad = old

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = module[0].weight.square().sum() + module[2].weight.square().sum()
        penalty.backward()
        if 7 in targets:
            raise Bang
        return functional.mse_loss(outputs.sum(1), targets.double())

    async with engine(module, num_lanes) as one:
        with pytest.raises(Bang):
            await one.train_step(batch(8)[0], torch.arange(8), loss, optimizer)
    assert module[0].weight.grad is old
    assert torch.equal(old, torch.ones_like(old))
    assert module[2].weight.grad is None


@both
async def test_an_optimizer_may_train_more_than_the_module(num_lanes: int) -> None:
    """A temperature that only the loss knows is trained with the module, also over accumulated batches."""
    module, serial = pair()
    temperatures = [nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2)]
    optimizers = [
        torch.optim.SGD([*each.parameters(), temperature], 0.1)
        for each, temperature in zip((module, serial), temperatures, strict=True)
    ]

    def loss_with(temperature: Tensor) -> Any:
        return lambda outputs, targets: functional.cross_entropy(outputs * temperature, targets)

    first, second = batch(8), batch(8)
    async with engine(module, num_lanes) as one:
        with one.no_sync():
            await one.train_step(*first, loss_with(temperatures[0]), optimizers[0])
        assert temperatures[0].grad is None
        await one.train_step(*second, loss_with(temperatures[0]), optimizers[0])
    for data in (first, second):
        loss_with(temperatures[1])(serial(data[0]), data[1]).backward()
    optimizers[1].step()
    assert distance(module, serial) < 1e-12
    assert torch.allclose(*temperatures, rtol=0, atol=1e-12)
    assert temperatures[0].grad is None


@both
async def test_before_step_cannot_change_what_is_put_back(num_lanes: int) -> None:
    """An old gradient of a parameter that the step has none for survives a hook that scales and fails."""
    module = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    module.forward = lambda x: module["used"](x)  # type: ignore[method-assign]
    old = torch.ones(2, 2)
    module["unused"].weight.grad = old

    def clip_and_fail() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
        raise Bang

    async with engine(module, num_lanes) as one:
        with pytest.raises(Bang):
            await one.train_step(
                torch.ones(4, 2),
                torch.ones(4, 2),
                functional.mse_loss,
                sgd(module),
                before_step=clip_and_fail,
            )
    assert module["unused"].weight.grad is old
    assert torch.equal(old, torch.ones(2, 2))


class Failing(torch.optim.SGD):
    """Fails as often as told."""

    failures = 1

    def step(self, closure: Any = None) -> None:
        if self.failures:
            self.failures -= 1
            raise Bang
        super().step()


@both
async def test_a_step_tried_again_counts_its_batch_once(num_lanes: int) -> None:
    """After an optimizer that failed, gradients are as before the step, accumulated ones too."""
    module, serial = pair()
    optimizer = Failing(module.parameters(), 0.1)
    first, second = batch(8), batch(8)
    async with engine(module, num_lanes) as one:
        with one.no_sync():
            await one.train_step(*first, functional.cross_entropy, optimizer)
        with pytest.raises(Bang):
            await one.train_step(*second, functional.cross_entropy, optimizer)
        assert all(each.grad is None for each in module.parameters())
        await one.train_step(*second, functional.cross_entropy, optimizer)
    for data in (first, second):
        functional.cross_entropy(serial(data[0]), data[1]).backward()
    sgd(serial).step()
    assert distance(module, serial) < 1e-12


@both
async def test_gradients_are_unscaled_after_a_failed_step_too(num_lanes: int) -> None:
    """With a GradScaler, the step after one whose optimizer failed is no larger than it should be."""
    module, serial = pair()
    module, serial = module.float(), serial.float()
    optimizer = Failing(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batch(8, torch.float32)
    async with engine(module, num_lanes) as one:
        with pytest.raises(Bang):
            await one.train_step(*data, functional.cross_entropy, optimizer, scaler=scaler)
        await one.train_step(*data, functional.cross_entropy, optimizer, scaler=scaler)
    serial_step(serial, sgd(serial), *data, functional.cross_entropy)
    assert distance(module, serial) < 1e-5


@both
async def test_a_buffer_that_cannot_be_written_is_left_alone(num_lanes: int) -> None:
    """A buffer whose elements share memory, in train mode, does not keep a step from being taken."""
    module, serial = pair()
    module.register_buffer("scale", torch.ones(1, dtype=torch.float64).expand(3))
    async with engine(module, num_lanes) as one:
        data = batch(8)
        await one.train_step(*data, functional.cross_entropy, sgd(module))
    serial_step(serial, sgd(serial), *data, functional.cross_entropy)
    assert distance(module[0], serial[0]) < 1e-12


class Watched(nn.Module):
    """Two parts, each of which notes its mode; holds the latch between them the first time."""

    def __init__(self, latch: Latch, has_buffers: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.after = nn.BatchNorm1d(2) if has_buffers else nn.Identity()
        self.latch = latch
        self.modes = Notes()

    def forward(self, x: Tensor) -> Tensor:
        before = self.training
        x = self.layer(x)
        self.latch.hold()
        self.modes.append((before, self.after.training))
        return self.after(x)


@pytest.mark.parametrize("has_buffers", [False, True])
@both
async def test_a_step_keeps_the_modes_of_its_call(num_lanes: int, has_buffers: bool) -> None:
    """eval() while a step runs or waits changes nothing of it, nor what it does to statistics."""
    latch = Latch()
    module = Watched(latch, has_buffers)
    optimizer = sgd(module)
    x = torch.randn(8, 2)

    async def step() -> None:
        await one.train_step(x, torch.zeros(8, 2), functional.mse_loss, optimizer)

    async with engine(module, num_lanes) as one, anyio.create_task_group() as group:
        group.start_soon(step)
        await latch.wait_entered()
        group.start_soon(step)
        await anyio.wait_all_tasks_blocked()
        module.eval()
        latch.open()
    assert module.modes == [(True, True)] * 2 * num_lanes
    if has_buffers:
        assert module.after.num_batches_tracked == 2
        assert not torch.equal(module.after.running_mean, torch.zeros(2))


async def test_a_step_leaves_nothing_of_its_gradients_alive() -> None:
    """After a step on two lanes no gradient of it is kept until the next one."""
    import gc
    import weakref

    module, _ = pair()
    found: list[weakref.ref[Tensor]] = []

    def note() -> None:
        found.extend(weakref.ref(each.grad) for each in module.parameters())

    async with engine(module) as one:
        gc.collect()
        gc.disable()
        try:
            await one.train_step(*batch(8), functional.cross_entropy, sgd(module), before_step=note)
            await run_stages(one.runtime, [(lane, int) for lane in one.lanes])
            assert found
            assert not any(reference() is not None for reference in found)
        finally:
            gc.enable()


@both
async def test_a_failure_between_reduce_and_step_leaves_the_snapshot(num_lanes: int) -> None:
    """With gradients there and kept ones, a hook that fails leaves module and optimizer alone."""
    module = mlp()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)

    def fail() -> None:
        raise Bang

    async with engine(module, num_lanes) as one:
        await one.train_step(*batch(8), functional.cross_entropy, optimizer)
        for each in module.parameters():
            each.grad = torch.ones_like(each)
        with one.no_sync():
            await one.train_step(*batch(8), functional.cross_entropy, optimizer)
        before = snapshot(module, optimizer)
        with pytest.raises(Bang):
            await one.train_step(*batch(8), functional.cross_entropy, optimizer, before_step=fail)
        assert same(before, snapshot(module, optimizer))
