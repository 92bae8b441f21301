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
