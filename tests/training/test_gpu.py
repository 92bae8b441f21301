"""Training steps of two lanes on one GPU; what needs no GPU to be tried is tried on CPU lanes as well."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

from .helpers import batch, distance, engine, mlp, serial_step

pytestmark = pytest.mark.anyio

on_gpu = pytest.mark.gpu

HOMES = ["cpu", pytest.param("cuda:0", marks=on_gpu)]
LANES = ["cuda:0", "cuda:0"]


@pytest.fixture(autouse=True)
def begun() -> None:
    """Have CUDA read its files before there is an event loop that must not."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda:0").item()


def pair(home: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Two equal modules."""
    module = mlp(dtype).to(home)
    return module, copy.deepcopy(module)


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), 0.1)


def batch_on(home: str, num_rows: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y = batch(num_rows, dtype)
    return x.to(home), y.to(home)


@on_gpu
@pytest.mark.parametrize("home", ["cuda:0", "cpu"])
async def test_equality(home: str) -> None:
    """Steps follow the serial run to 1e-10, for a module on the GPU and for one whose lanes hold copies."""
    module, serial = pair(home)
    optimizer, serial_optimizer = (torch.optim.Adam(each.parameters(), 0.01) for each in (module, serial))
    async with asyncdp.DataParallel(module, LANES, num_lanes="all") as one:
        for _ in range(50):
            x, y = batch_on(home, 13)
            await one.train_step(x, y, functional.cross_entropy, optimizer)
            serial_step(serial, serial_optimizer, x, y, functional.cross_entropy)
    assert distance(module, serial) < 1e-10


@on_gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("make", [mlp, lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()])
async def test_memory_does_not_grow(make: Callable[[], nn.Module]) -> None:
    """After 1,000 steps as much GPU memory is in use as after 50."""
    module = make().cuda()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    x, y = batch_on("cuda:0", 64)
    async with asyncdp.DataParallel(module, LANES, num_lanes="all") as one:
        for step in range(1000):
            await one.train_step(x, y, functional.cross_entropy, optimizer)
            if step == 50:
                before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@on_gpu
@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_what_is_made_without_a_device(num_lanes: int) -> None:
    """Forward and loss make it on the lane's device, the optimizer where it does anywhere: on the host."""
    places: list[torch.device] = []

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            places.append(torch.empty(()).device)
            return super().forward(x)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        places.append(torch.empty(()).device)
        return functional.cross_entropy(output, target)

    module = Noisy(5, 3).double().cuda()
    optimizer = torch.optim.Adam(module.parameters())
    async with asyncdp.DataParallel(module, LANES, num_lanes=num_lanes) as one:
        await one.train_step(*batch_on("cuda:0", 12), loss_fn, optimizer)
    assert places == [torch.device("cuda:0")] * 2 * num_lanes
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("home", HOMES)
async def test_grad_scaler(home: str, clips: bool) -> None:
    """A scaler's steps are the serial ones; a step that overflows is skipped and halves the scale."""
    module, serial = pair(home)
    optimizer = sgd(module)
    scaler = torch.amp.GradScaler(torch.device(home).type, init_scale=1024.0, growth_interval=2)
    clip = partial(nn.utils.clip_grad_norm_, list(module.parameters()), 1e9)
    async with engine(module, home=home) as one:
        step = partial(
            one.train_step,
            loss_fn=functional.cross_entropy,
            optimizer=optimizer,
            scaler=scaler,
            before_step=clip if clips else None,
        )
        for _ in range(2):
            x, y = batch_on(home)
            await step(x, y)
            serial_step(serial, sgd(serial), x, y, functional.cross_entropy)
        assert distance(module, serial) < 1e-10
        assert scaler.get_scale() == 2048.0
        await step(x * float("inf"), y)
    assert distance(module, serial) < 1e-10
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("home", HOMES)
async def test_mixed_precision(home: str) -> None:
    """Under autocast the lanes compute in its dtype, weights stay in float32 and follow the serial run."""
    kind = torch.device(home).type
    dtype = torch.bfloat16 if kind == "cpu" else torch.float16
    module, serial = pair(home, torch.float32)
    seen: list[torch.dtype] = []
    module[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    scaler = torch.amp.GradScaler(kind, init_scale=128.0)
    optimizer, serial_optimizer = sgd(module), sgd(serial)
    async with engine(module, home=home) as one:
        for _ in range(5):
            x, y = batch_on(home, dtype=torch.float32)
            with torch.autocast(kind, dtype):
                await one.train_step(x, y, functional.cross_entropy, optimizer, scaler=scaler)
                loss = functional.cross_entropy(serial(x), y)
            loss.backward()
            serial_optimizer.step()
            serial_optimizer.zero_grad()
    assert seen == [dtype] * 10
    assert module[0].weight.dtype is torch.float32
    assert distance(module, serial) < 1e-2


@pytest.mark.parametrize("home", HOMES)
async def test_accumulation_and_gradients_left(home: str) -> None:
    """Gradients accumulated on the lanes and gradients in .grad are all there in the end."""
    module, serial = pair(home)
    batches = [batch_on(home) for _ in range(3)]
    async with engine(module, home=home) as one:
        with one.no_sync():
            for x, y in batches[:2]:
                await one.train_step(x, y, functional.cross_entropy, None, reduce_only=True)
        assert all(each.grad is None for each in module.parameters())
        await one.train_step(*batches[2], functional.cross_entropy, None, reduce_only=True)
    for x, y in batches:
        functional.cross_entropy(serial(x), y).backward()
    for mine, theirs in zip(module.parameters(), serial.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@on_gpu
async def test_a_step_begins_behind_the_callers_stream() -> None:
    """Inputs and weights that the caller's stream is yet to write are read once they are written."""
    module, serial = pair("cuda:0")
    x, y = batch_on("cuda:0", 12)
    with torch.no_grad():
        serial[0].weight.mul_(2)
    late = torch.full_like(x, float("nan"))
    async with asyncdp.DataParallel(module, LANES, num_lanes="all") as one:
        await one.train_step(x, y, functional.cross_entropy, None, reduce_only=True)  # loads what there is
        for each in module.parameters():
            each.grad = None
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(200_000_000)
            late.copy_(x)
            with torch.no_grad():
                module[0].weight.mul_(2)
            loss = await one.train_step(late, y, functional.cross_entropy, sgd(module))
    torch.testing.assert_close(loss, serial_step(serial, sgd(serial), x, y, functional.cross_entropy))
    assert distance(module, serial) < 1e-10


@on_gpu
async def test_a_step_waits_for_no_other_stream() -> None:
    """A step ends while a stream that is neither the caller's nor a lane's still has work to do."""
    module, _ = pair("cuda:0")
    optimizer = sgd(module)
    x, y = batch_on("cuda:0", 12)
    async with asyncdp.DataParallel(module, LANES, num_lanes="all") as one:
        for _ in range(3):  # memory and kernels are there from then on
            await one.train_step(x, y, functional.cross_entropy, optimizer)
        # Of high priority: torch makes these apart from others, so this is not the stream of a lane.
        with torch.cuda.stream(torch.cuda.Stream(priority=-1)):
            torch.cuda._sleep(2_000_000_000)
            ended = torch.cuda.Event()
            ended.record()
        await one.train_step(x, y, functional.cross_entropy, optimizer)
        assert not ended.query()
    ended.synchronize()


class Slow(nn.Module):
    """Keeps the GPU busy for half a second or so, and marks the end of that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()
        self.ended: torch.cuda.Event | None = None

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(1_000_000_000)
        ended = torch.cuda.Event()
        ended.record()
        self.ended = ended
        return self.layer(x)


@on_gpu
async def test_the_loop_is_free_while_the_gpu_computes() -> None:
    """A task on the loop sees the GPU still at work on a step's forward."""
    module = Slow().cuda()
    optimizer = sgd(module)
    x, y = batch_on("cuda:0", 12)
    was_at_work: list[bool] = []

    async def watch() -> None:
        while module.ended is None:
            await anyio.lowlevel.checkpoint()
        was_at_work.append(not module.ended.query())

    async with (
        asyncdp.DataParallel(module, "cuda:0") as one,
        anyio.create_task_group() as group,
    ):
        await one.train_step(x, y, functional.cross_entropy, optimizer)  # loads what there is
        module.ended = None
        group.start_soon(watch)
        await one.train_step(x, y, functional.cross_entropy, optimizer)
    assert was_at_work == [True]
