"""Steps of one module take turns, whichever engine, event loop or task they come from."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch
import trio
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import asyncdp

from ..runtime.helpers import Latch
from .helpers import batch, distance, engine, mlp, serial_step
from .test_options import pair, sgd

STEPS = 20


class Wrapped(nn.Module):
    """Another module around a shared one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Any:
        return self.inner(inputs)


def trained_serially(serial: nn.Module, inputs: Tensor, targets: Tensor, num_steps: int) -> nn.Module:
    """The module after that many steps of one device."""
    optimizer = sgd(serial)
    for _ in range(num_steps):
        serial_step(serial, optimizer, inputs, targets, cross_entropy)
    return serial


@pytest.mark.anyio
@pytest.mark.parametrize("is_wrapped", [False, True])
async def test_steps_of_two_engines_take_turns(is_wrapped: bool) -> None:
    """Two engines over one module, or over one and a module around it, train what one would."""
    module, serial = pair()
    inputs, targets = batch(6)
    optimizer = sgd(module)
    other = Wrapped(module) if is_wrapped else module
    async with engine(module, 2) as one, engine(other, 1) as two, anyio.create_task_group() as group:
        for index in range(STEPS):
            group.start_soon((one, two)[index % 2].train_step, inputs, targets, cross_entropy, optimizer)
    assert distance(module, trained_serially(serial, inputs, targets, STEPS)) < 1e-12


@pytest.mark.anyio
async def test_modules_that_share_nothing_train_at_the_same_time() -> None:
    """Only steps that would change each other's weights wait: two others are on their lanes at once."""
    both = threading.Barrier(2, timeout=30)

    def meet(outputs: Tensor, targets: Tensor) -> Tensor:
        both.wait()
        return cross_entropy(outputs, targets)

    async with engine(mlp(), 1) as one, engine(mlp(), 1) as two, anyio.create_task_group() as group:
        for each in (one, two):
            group.start_soon(each.train_step, *batch(4), meet, sgd(each.module))
    assert [each.statistics().num_steps for each in (one, two)] == [1, 1]
    assert not both.broken


def run_in_threads(*functions: Callable[[], object]) -> None:
    """Run each in a thread of its own, and raise what one of them raised."""
    failures: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(each,), daemon=True) for each in functions]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
        assert not each.is_alive(), "a loop hangs"
    assert not failures


def test_one_engine_on_asyncio_and_trio_at_once() -> None:
    """Steps that an asyncio loop and a trio loop take of one engine, several in flight, are all taken."""
    module, serial = pair()
    inputs, targets = batch(6)
    optimizer, one = sgd(module), engine(module, 2)

    async def steps() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(STEPS):
                group.start_soon(one.train_step, inputs, targets, cross_entropy, optimizer)

    run_in_threads(lambda: asyncio.run(steps()), lambda: trio.run(steps), lambda: asyncio.run(steps()))
    assert one.statistics().num_steps == 3 * STEPS
    assert distance(module, trained_serially(serial, inputs, targets, 3 * STEPS)) < 1e-12
    asyncio.run(one.aclose())


@pytest.mark.anyio
async def test_a_cancelled_waiter_holds_up_nobody() -> None:
    """Of three steps in order of arrival the one in the middle is given up; the others are taken."""
    module, serial = pair()
    inputs, targets = batch(4)
    latch = Latch()

    def held(outputs: Tensor, labels: Tensor) -> Tensor:
        latch.hold()
        return cross_entropy(outputs, labels)

    order = []
    async with engine(module, 1) as one, anyio.create_task_group() as group:
        optimizer = sgd(module)

        async def step(name: str, loss_fn: Callable[..., Tensor], scope: anyio.CancelScope) -> None:
            with scope:
                await one.train_step(inputs, targets, loss_fn, optimizer)
                order.append(name)

        scopes = [anyio.CancelScope() for _ in range(4)]
        group.start_soon(step, "first", held, scopes[0])
        await latch.wait_entered()
        for name, scope in zip(("given up", "second", "third"), scopes[1:], strict=True):
            group.start_soon(step, name, cross_entropy, scope)
            await anyio.wait_all_tasks_blocked()
        scopes[1].cancel()
        await anyio.wait_all_tasks_blocked()
        latch.open()
    assert order == ["first", "second", "third"]
    assert distance(module, trained_serially(serial, inputs, targets, 3)) < 1e-12


def test_a_loop_that_was_closed_with_steps_waiting_holds_up_nobody() -> None:
    """Steps of a loop that ends without cancelling them are skipped by those of other loops."""
    module, _ = pair()
    inputs, targets = batch(4)
    latch = Latch()
    optimizer, one = sgd(module), engine(module, 1)

    def held(outputs: Tensor, labels: Tensor) -> Tensor:
        latch.hold()
        return cross_entropy(outputs, labels)

    async def leave_behind() -> list[asyncio.Task[Tensor]]:
        first = asyncio.create_task(one.train_step(inputs, targets, held, optimizer))
        await latch.wait_entered()
        second = asyncio.create_task(one.train_step(inputs, targets, cross_entropy, optimizer))
        await asyncio.sleep(0)
        return [first, second]

    loop = asyncio.new_event_loop()
    tasks = loop.run_until_complete(leave_behind())
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    latch.open()

    async def go_on() -> Tensor:
        async with asyncio.timeout(20):
            return await one.train_step(inputs, targets, cross_entropy, optimizer)

    assert torch.isfinite(asyncio.run(go_on()))
    del tasks
    gc.collect()
    asyncio.run(one.aclose())


@pytest.mark.anyio
async def test_a_forward_and_an_optimizer_never_overlap() -> None:
    """A prediction that is held in its forward gets the weights of before; the step ends after it."""
    module = mlp()
    latch = Latch()
    inputs, targets = batch(4)

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, inputs: Tensor, hold: bool = False) -> Any:
            first = self.inner(inputs)
            if hold:
                latch.hold()
            return first, self.inner(inputs)

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        return cross_entropy(outputs[0], labels)

    held = Held()
    async with (
        asyncdp.DataParallel(held, "cpu*2", num_lanes="all") as one,
        anyio.create_task_group() as group,
    ):

        async def predict() -> None:
            with torch.no_grad():
                before, after = await one.on_one_lane(inputs, hold=True)
            assert torch.equal(before, after)

        group.start_soon(predict)
        await latch.wait_entered()
        group.start_soon(one.train_step, inputs, targets, loss, sgd(held))
        await anyio.wait_all_tasks_blocked()
        latch.open()
