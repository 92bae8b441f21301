"""Training holds on to nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

from .helpers import batch, engine


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counts free memory in this test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def count_tensors() -> int:
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


@pytest.mark.usefixtures("no_collector")
def test_many_steps_leave_no_tensors() -> None:
    """The number of tensors alive does not grow with the number of steps, failed ones included."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(counts) % 3 == 2:
            raise KeyError
        return functional.cross_entropy(outputs, targets)

    async def main() -> None:
        module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        async with engine(module) as one:
            for _ in range(30):
                try:
                    await one.train_step(*batch(8), loss_fn, optimizer)
                except KeyError:
                    counts.append(counts[-1])
                else:
                    counts.append(count_tensors())

    counts: list[int] = []
    asyncio.run(main())
    assert max(counts[6:]) <= max(counts[:6]) + 2


def test_an_engine_that_trained_is_freed() -> None:
    """Nothing global refers to a module, its optimizer or its engine after they have trained."""

    async def main() -> list[weakref.ref[object]]:
        module = nn.Linear(5, 3).double()
        optimizer = torch.optim.SGD(module.parameters(), 0.01)
        async with asyncdp.DataParallel(module, "cpu*2") as one:
            with one.no_sync():
                await one.train_step(*batch(8), functional.cross_entropy, optimizer)
            await one.train_step(*batch(8), functional.cross_entropy, optimizer)
        return [weakref.ref(each) for each in (module, optimizer, one, module.weight)]

    references = asyncio.run(main())
    gc.collect()
    assert [each() for each in references] == [None] * 4
