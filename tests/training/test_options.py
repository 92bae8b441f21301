"""Everything that may be asked of a step beside the step itself."""

from __future__ import annotations

import contextlib
import copy
import threading
from functools import partial
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from asyncdp.errors import (
    ClosureOptimizerError,
    LengthMismatchError,
    LossNotScalarError,
    LossReductionError,
    NotAnOptimizerError,
)

from ..runtime.helpers import Latch
from .helpers import batch, distance, engine, mlp, same, serial_step, snapshot

pytestmark = pytest.mark.anyio


def pair() -> tuple[Any, Any]:
    """Two equal modules."""
    torch.manual_seed(0)
    module = mlp()
    return module, copy.deepcopy(module)


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), 0.1)


class Begun:
    """Runs a coroutine up to its first wait, and goes on with it when awaited."""

    def __init__(self, coroutine: Any) -> None:
        self._steps = coroutine.__await__()
        self._wish = self._steps.send(None)

    def __await__(self) -> Any:
        with contextlib.suppress(StopIteration):
            while True:
                answer = yield self._wish
                self._wish = self._steps.send(answer)


async def test_no_sync_accumulates() -> None:
    """Steps in the block change nothing one can see; the next one steps with the sum of all gradients."""
    module, serial = pair()
    optimizer = sgd(module)
    batches = [batch(9) for _ in range(3)]
    async with engine(module) as one:
        before = snapshot(module, optimizer)
        with one.no_sync():
            for x, y in batches[:2]:
                await one.train_step(x, y, functional.cross_entropy, optimizer)
        assert same(before, snapshot(module, optimizer))
        await one.train_step(*batches[2], functional.cross_entropy, optimizer)
        again = copy.deepcopy(module)
        await one.train_step(*batches[0], functional.cross_entropy, optimizer)
    for x, y in batches:
        functional.cross_entropy(serial(x), y).backward()
    sgd(serial).step()
    assert distance(again, serial) < 1e-12
    serial_step(serial, sgd(serial), *batches[0], functional.cross_entropy)
    assert distance(module, serial) < 1e-12


async def test_accumulated_gradients_can_be_dropped() -> None:
    """After discard_accumulated a step is as if nothing had been accumulated."""
    module, serial = pair()
    optimizer = sgd(module)
    x, y = batch(9)
    async with engine(module) as one:
        with one.no_sync():
            await one.train_step(-x, y, functional.cross_entropy, optimizer)
        one.discard_accumulated()
        await one.train_step(x, y, functional.cross_entropy, optimizer)
    serial_step(serial, sgd(serial), x, y, functional.cross_entropy)
    assert distance(module, serial) < 1e-12


@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_lengths_must_agree(num_lanes: int) -> None:
    """Inputs and targets of unlike length are refused by their names, and nothing has changed."""
    module = mlp()
    optimizer = sgd(module)
    x, y = batch(4)
    before = snapshot(module, optimizer)
    async with engine(module, num_lanes) as one:
        with pytest.raises(ValueError, match=r"inputs has 4 and targets\['labels'\] has 3"):
            await one.train_step(x, {"labels": y[:3]}, functional.cross_entropy, optimizer)
    assert same(before, snapshot(module, optimizer))


async def test_gradients_there_are_added_to() -> None:
    """A step takes gradients of an earlier backward along and then clears all of them."""
    module, serial = pair()
    x, y = batch(9)
    for each in (module, serial):
        each(x).square().mean().backward()
    async with engine(module) as one:
        await one.train_step(x, y, functional.cross_entropy, sgd(module))
    functional.cross_entropy(serial(x), y).backward()
    sgd(serial).step()
    assert distance(module, serial) < 1e-12
    assert all(each.grad is None for each in module.parameters())


async def test_reduce_only_leaves_gradients() -> None:
    """With reduce_only the whole batch's gradients are left in .grad, on top of what was there."""
    module, serial = pair()
    x, y = batch(9)
    async with engine(module) as one:
        for _ in range(2):
            await one.train_step(x, y, functional.cross_entropy, None, reduce_only=True)
        assert one.statistics().num_steps == 0
    for _ in range(2):
        functional.cross_entropy(serial(x), y).backward()
    for mine, theirs in zip(module.parameters(), serial.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


async def test_clipping_between_reduce_and_step() -> None:
    """before_step sees the whole gradients in .grad and may clip them."""
    module, serial = pair()
    x, y = batch(9)
    norms: list[Tensor] = []

    def clip() -> None:
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.01))

    async with engine(module) as one:
        await one.train_step(x, y, functional.cross_entropy, sgd(module), before_step=clip)
    functional.cross_entropy(serial(x), y).backward()
    torch.testing.assert_close(norms, [nn.utils.clip_grad_norm_(serial.parameters(), 0.01)])
    sgd(serial).step()
    assert distance(module, serial) < 1e-12


async def test_hooks_of_parameters_see_the_whole_gradient() -> None:
    """Hooks a user put on a parameter are called once a step, as by a plain backward."""
    module, serial = pair()
    x, y = batch(9)
    seen: list[Tensor] = []
    for each in (module, serial):
        each[0].weight.register_hook(lambda gradient: gradient * 2)
        each[0].weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    async with engine(module) as one:
        await one.train_step(x, y, functional.cross_entropy, sgd(module))
    serial_step(serial, sgd(serial), x, y, functional.cross_entropy)
    assert distance(module, serial) < 1e-12
    torch.testing.assert_close(seen[0], seen[1])
    assert len(seen) == 2


@pytest.mark.parametrize("clips", [False, True])
async def test_grad_scaler(clips: bool) -> None:
    """A scaler scales the loss, unscales before the hook, steps, updates, and skips overflowing steps."""
    module, serial = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizer = sgd(module)

    def clip() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), 1e9)

    async with engine(module) as one:
        for _ in range(2):
            x, y = batch(9)
            loss = await one.train_step(
                x,
                y,
                functional.cross_entropy,
                optimizer,
                scaler=scaler,
                before_step=clip if clips else None,
            )
            expected = serial_step(serial, sgd(serial), x, y, functional.cross_entropy)
            torch.testing.assert_close(loss, expected)
        assert distance(module, serial) < 1e-10
        assert scaler.get_scale() == 2048.0
        await one.train_step(x * float("inf"), y, functional.cross_entropy, optimizer, scaler=scaler)
    assert distance(module, serial) < 1e-10
    assert scaler.get_scale() == 1024.0


async def test_a_failed_hook_leaves_the_scaler_usable() -> None:
    """After a hook that raised, the scaler unscales the next step's gradients as if nothing had been."""
    module, serial = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x, y = batch(9)

    def fail() -> None:
        raise KeyError("hook")

    async with engine(module) as one:
        optimizer = sgd(module)
        with pytest.raises(KeyError):
            await one.train_step(x, y, functional.cross_entropy, optimizer, scaler=scaler, before_step=fail)
        assert scaler.get_scale() == 64.0
        await one.train_step(
            x, y, functional.cross_entropy, optimizer, scaler=scaler, before_step=lambda: None
        )
    serial_step(serial, sgd(serial), x, y, functional.cross_entropy)
    assert distance(module, serial) < 1e-10


async def test_autocast_reaches_the_lanes() -> None:
    """Under autocast the forward of each lane runs in its dtype, and weights stay in float32."""
    torch.manual_seed(0)
    module = mlp(torch.float32)
    seen: list[torch.dtype] = []
    module[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))  # type: ignore[index]
    x, y = batch(9, torch.float32)
    async with engine(module) as one:
        # Only in a test: while this task waits, autocast is on for every other task of the loop.
        with torch.autocast("cpu", torch.bfloat16):
            await one.train_step(x, y, functional.cross_entropy, sgd(module))
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert module[0].weight.dtype is torch.float32  # type: ignore[index]


async def test_state_is_captured_at_the_call() -> None:
    """A step that has to wait for another one still runs under the state its caller had."""
    torch.manual_seed(0)
    module = mlp(torch.float32)
    latch = Latch()
    seen: list[torch.dtype] = []
    module[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))  # type: ignore[index]
    x, y = batch(4, torch.float32)

    def hold(outputs: Tensor, targets: Tensor) -> Tensor:
        latch.hold()
        return functional.cross_entropy(outputs, targets)

    async with engine(module, 1) as one, anyio.create_task_group() as group:
        group.start_soon(one.train_step, x, y, hold, sgd(module))
        await latch.wait_entered()
        with torch.autocast("cpu", torch.bfloat16):
            begun = Begun(one.train_step(x, y, functional.cross_entropy, sgd(module)))
        latch.open()
        await begun
    assert seen == [torch.float32, torch.bfloat16]


async def test_only_the_first_lane_gets_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer's step that takes all threads is taken on the first lane, whichever lane ended last."""
    monkeypatch.setattr("asyncdp._training.step._MIN_ELEMENTS_FOR_THREADS", 1)
    module = mlp()
    first_is_done = Latch()
    places: list[str] = []

    def second_ends_last(outputs: Tensor, targets: Tensor) -> Tensor:
        if threading.current_thread().name == "asyncdp-cpu:1":
            first_is_done.hold()
        return functional.cross_entropy(outputs, targets)

    def note_place() -> None:
        places.append(threading.current_thread().name)

    x, y = batch(6)
    async with engine(module) as one, anyio.create_task_group() as group:
        step = partial(one.train_step, before_step=note_place)
        group.start_soon(step, x, y, second_ends_last, sgd(module))
        await first_is_done.wait_entered()
        await one.runtime.run(lambda: None, lane=one.runtime.lanes[0])  # comes after that lane's share
        first_is_done.open()
    assert places == ["asyncdp-cpu:0"]


async def test_a_batch_without_rows_takes_one_lane() -> None:
    """Where nothing can be split the work is done once, not once per lane."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.num_calls = 0

        def forward(self, factor: float) -> Tensor:
            return self.weight * factor

    module = Constant()
    async with engine(module) as one:
        loss = await one.train_step(
            3.0, None, lambda output, _: output * 2, sgd(module), loss_reduction="sum"
        )
    assert loss.item() == 6.0
    assert module.weight.item() == pytest.approx(1.0 - 0.1 * 6.0)


async def test_targets_may_be_nested_and_inputs_many() -> None:
    """A tuple of inputs holds positional arguments; targets may be any nested structure."""
    module = nn.Bilinear(3, 4, 2).double()
    serial = copy.deepcopy(module)
    one_input, other = torch.randn(7, 3).double(), torch.randn(7, 4).double()
    targets = {"goal": torch.randn(7, 2).double(), "scale": 2.0}

    def loss_fn(outputs: Tensor, goals: Any) -> Tensor:
        return functional.mse_loss(outputs, goals["goal"]) * goals["scale"]

    async with engine(module) as one:
        await one.train_step((one_input, other), targets, loss_fn, sgd(module))
    loss_fn(serial(one_input, other), targets).backward()
    sgd(serial).step()
    assert distance(module, serial) < 1e-12


async def test_inputs_are_data() -> None:
    """No gradient leads back to inputs or targets, which all lanes would add to at once."""
    module, serial = pair()
    x, y = batch(9)
    x.requires_grad_()
    async with engine(module) as one:
        await one.train_step(x, y, functional.cross_entropy, sgd(module))
    assert x.grad is None
    serial_step(serial, sgd(serial), x, y, functional.cross_entropy)
    assert distance(module, serial) < 1e-12


async def test_mistakes_are_refused_before_anything_runs() -> None:
    """Reductions, optimizers and lengths that cannot work raise, and nothing has run."""
    module = mlp()
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    x, y = batch(6)
    loss_fn = functional.cross_entropy
    async with engine(module) as one:
        with pytest.raises(LossReductionError, match="median"):
            await one.train_step(x, y, loss_fn, sgd(module), loss_reduction="median")
        with pytest.raises(ClosureOptimizerError, match="LBFGS"):
            await one.train_step(x, y, loss_fn, torch.optim.LBFGS(module.parameters()))
        with pytest.raises(NotAnOptimizerError, match="NoneType"):
            await one.train_step(x, y, loss_fn, None)
        with pytest.raises(TypeError, match=r"loss_fn must be a function .*, but got None"):
            await one.train_step(x, y, None, sgd(module))  # type: ignore[arg-type]
        for option in ("before_step", "scaler"):
            with pytest.raises(TypeError, match=f"{option} must be .*, but got 3"):
                await one.train_step(x, y, loss_fn, sgd(module), **{option: 3})  # type: ignore[arg-type]
        with pytest.raises(LengthMismatchError):
            await one.train_step(x, y[:5], loss_fn, sgd(module))
    assert not calls


@pytest.mark.parametrize(
    ("loss_fn", "told"),
    [
        (lambda outputs, _: outputs.mean(1), "shape"),
        (lambda outputs, _: outputs.mean().item(), "float"),
        (lambda outputs, _: outputs.detach().mean(), "without a gradient"),
    ],
)
async def test_losses_that_are_no_number(loss_fn: Any, told: str) -> None:
    """A loss that no backward can start from is refused with what it was."""
    module = mlp()
    x, y = batch(6)
    async with engine(module) as one:
        with pytest.raises(LossNotScalarError, match=told):
            await one.train_step(x, y, loss_fn, sgd(module))
