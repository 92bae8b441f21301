"""Gradients are reduced while backwards still run."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from asyncdp._training import reducer as _reducer

from .helpers import engine


class _Between(torch.autograd.Function):
    """Stands between two layers; tells `arrive` of every lane whose backward comes by, and its first row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first_row: int, arrive: Any) -> Tensor:
        ctx.first_row, ctx.arrive = first_row, arrive
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.arrive(ctx.first_row)
        return gradient, None, None


class Watched(nn.Module):
    """Two layers of different shapes, and someone between them."""

    def __init__(self, arrive: Any) -> None:
        super().__init__()
        self.early = nn.Linear(1, 3)
        self.late = nn.Linear(3, 2)
        self.arrive = arrive

    def forward(self, x: Tensor) -> Tensor:
        return self.late(_Between.apply(self.early(x), int(x[0, 0]), self.arrive))


@pytest.mark.anyio
async def test_late_layers_are_reduced_before_early_ones_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one lane still held in its backward, what both lanes are done with has been added up."""
    monkeypatch.setattr(_reducer, "BUCKET_BYTES", 1)
    summed: list[tuple[int, ...]] = []  # the shape of every sum over both lanes
    seen: list[list[tuple[int, ...]]] = []
    first_lane_passed = threading.Event()
    add_up = _reducer.add_up

    def watched(groups: Any, devices: Any) -> Any:
        num_summands = [sum(each is not None for each in free) for free, _ in groups]
        sums = add_up(groups, devices)
        summed.extend(tuple(each.shape) for each, count in zip(sums, num_summands, strict=True) if count == 2)
        return sums

    def arrive(first_row: int) -> None:
        if first_row == 0:
            first_lane_passed.set()
        else:  # the second lane goes no further until the first has gone by
            assert first_lane_passed.wait(20)
            seen.append(list(summed))

    monkeypatch.setattr(_reducer, "add_up", watched)
    module = Watched(arrive)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    async with engine(module) as one:
        await one.train_step(
            torch.arange(4.0).reshape(4, 1), torch.zeros(4, 2), functional.mse_loss, optimizer
        )
    assert [sorted(each) for each in seen] == [[(2,), (2, 3)]]
    assert sorted(summed) == [(2,), (2, 3), (3,), (3, 1)]
