"""A batcher over CUDA lanes; what needs no GPU to be tried is tried on CPU lanes as well."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import torch
from torch import Tensor, nn

from asyncdp import Batcher, DataParallel

pytestmark = pytest.mark.anyio

DEVICES = [["cpu", "cpu"], pytest.param(["cuda:0", "cuda:0"], marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def begun() -> None:
    """Have torch and CUDA read their files before there is an event loop that must not."""
    torch.manual_seed(0)
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # imports more of torch at its first call
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda:0").item()


class Picky(nn.Linear):
    """Refuses numbers that are none."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool(x.isfinite().all()):
            raise ValueError("not finite")
        return super().forward(x)


async def outcomes_of(batcher: Batcher, samples: list[Tensor], leave: int | None = None) -> list[Any]:
    """Call for all samples at once; the caller at `leave` is cancelled."""
    outcomes: list[Any] = [None] * len(samples)

    async def call(position: int) -> None:
        with anyio.CancelScope() as scope:
            if position == leave:
                scope.cancel()
            try:
                outcomes[position] = await batcher(samples[position])
            except Exception as error:
                outcomes[position] = error

    async with anyio.create_task_group() as group:
        for position in range(len(samples)):
            group.start_soon(call, position)
    return outcomes


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("home", ["cpu", "devices"])
async def test_results_poison_and_leaving(devices: list[str], home: str) -> None:
    """Of many callers of an engine, one has a poison sample and one leaves: all others get their own rows."""
    home = devices[0] if home == "devices" else home
    module = Picky(3, 2).to(home)
    samples = list(torch.randn(40, 3))
    expected = module(torch.stack(samples).to(home)).detach().cpu()
    samples[7] = torch.full((3,), float("nan"))
    async with DataParallel(module, devices) as engine, Batcher(engine, max_batch_size=8) as batcher:
        outcomes = await outcomes_of(batcher, samples, leave=20)
    assert isinstance(outcomes.pop(7), ValueError)
    assert outcomes.pop(19) is None
    kept = [row for position, row in enumerate(expected) if position not in (7, 20)]
    torch.testing.assert_close(torch.stack(outcomes).cpu(), torch.stack(kept))


@pytest.mark.parametrize("devices", DEVICES)
async def test_results_outlive_later_batches(devices: list[str]) -> None:
    """A result stays what it was while many batches follow."""
    async with (
        DataParallel(nn.Identity(), devices) as engine,
        Batcher(engine, max_batch_size=4) as batcher,
    ):
        kept = [
            outcome
            for number in range(25)
            for outcome in await outcomes_of(
                batcher, [torch.full((1 << 12,), float(4 * number + k)) for k in range(4)]
            )
        ]
    assert [row.unique().tolist() for row in kept] == [[float(number)] for number in range(100)]


@pytest.mark.gpu
async def test_the_next_batch_is_launched_while_one_computes() -> None:
    """A lane copies and launches its second batch before the device has ended the first."""
    ends: list[torch.cuda.Event] = []
    had_ended: list[bool] = []

    class Slow(nn.Module):
        """Keeps its stream busy for a tenth of a second or so."""

        def forward(self, x: Tensor) -> Tensor:
            had_ended.extend(end.query() for end in ends[-1:])
            torch.cuda._sleep(200_000_000)
            ends.append(torch.cuda.Event())
            ends[-1].record()
            return x * 2

    async with (
        DataParallel(Slow(), ["cuda:0"], output_device="cpu") as engine,
        Batcher(engine, max_batch_size=1) as batcher,
    ):
        results = await outcomes_of(batcher, [torch.tensor(float(n)) for n in range(4)])
    assert [result.item() for result in results] == [0.0, 2.0, 4.0, 6.0]
    assert had_ended[0] is False


@pytest.mark.gpu
async def test_no_copy_is_waited_for() -> None:
    """Torch refuses whatever waits for the device, on any thread; batches of map and a batcher run."""
    module = nn.Linear(64, 64).cuda()
    batch = torch.randn(256, 64)
    with torch.no_grad():
        expected = module(batch.cuda()).cpu()
    async with DataParallel(module, ["cuda:0"], output_device="cpu") as engine:
        await engine(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                stream = engine.map([batch] * 4)
            found = [result async for result in stream]
            async with Batcher(engine, max_batch_size=64) as batcher:
                rows = await outcomes_of(batcher, list(batch))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for result in (*found, torch.stack(rows)):
        torch.testing.assert_close(result, expected)
        assert not result.is_pinned()


@pytest.mark.gpu
async def test_results_on_the_host_under_pressure() -> None:
    """Neither results nor what they are copied through is written over before they have arrived."""
    async with DataParallel(nn.Identity(), ["cuda:0", "cuda:0"], output_device="cpu") as engine:
        batches = (torch.full((1 << 18,), float(n)) for n in range(200))
        kept = [result async for result in engine.map(batches, max_in_flight=8)]
    assert [row.unique().tolist() for row in kept] == [[float(n)] for n in range(200)]
