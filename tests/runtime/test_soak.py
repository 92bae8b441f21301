"""Many passes at once, some cancelled, some failing: everyone gets exactly what is theirs."""

from __future__ import annotations

import gc

import anyio
import pytest
import torch

import asyncdp

from .helpers import lane_threads

pytestmark = pytest.mark.anyio

NUM_CALLS = 1000


class Picky(torch.nn.Module):
    """Doubles its input, but refuses a batch with a negative number in it."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Double `x`."""
        if bool((x < 0).any()):
            raise ValueError(f"refused {int(x.min())}")
        return x * self.factor


def live_tensors() -> int:
    """Tensors that are alive in this process."""
    gc.collect()
    return sum(type(value) in (torch.Tensor, torch.nn.Parameter) for value in gc.get_objects())


async def test_a_thousand_calls_at_once() -> None:
    """Of 1,000 concurrent passes a tenth is cancelled and a tenth fails; the others are all right.

    No lane is broken, and neither a thread nor a tensor is left over.
    """
    module = Picky()
    outcomes: dict[int, str] = {}
    scopes = {number: anyio.CancelScope() for number in range(3, NUM_CALLS, 10)}

    async def call(number: int) -> None:
        sign = -1.0 if number % 10 == 7 else 1.0
        batch = torch.full((4,), sign * (number + 1))
        with scopes.get(number, anyio.CancelScope()) as scope:
            try:
                result = await asyncdp.data_parallel(module, batch, "cpu*2")
            except ValueError as error:
                outcomes[number] = "failed" if str(error) == f"refused {-number - 1}" else "mistaken"
            else:
                assert torch.equal(result, batch * 2)
                outcomes[number] = "right"
        if scope.cancelled_caught:
            outcomes[number] = "cancelled"

    await asyncdp.data_parallel(module, torch.ones(4), "cpu*2")  # makes the lanes and replicas
    tensors, threads = live_tensors(), lane_threads()
    async with anyio.create_task_group() as group:
        for number in range(NUM_CALLS):
            group.start_soon(call, number)
        await anyio.lowlevel.checkpoint()
        for scope in scopes.values():
            scope.cancel()
    counted = {kind: list(outcomes.values()).count(kind) for kind in ("right", "failed", "cancelled")}
    assert len(outcomes) == NUM_CALLS
    assert counted["failed"] == NUM_CALLS // 10
    assert counted["cancelled"] > 0
    assert counted["right"] == NUM_CALLS - counted["failed"] - counted["cancelled"]
    assert torch.equal(await asyncdp.data_parallel(module, torch.ones(4), "cpu*2"), torch.full((4,), 2.0))
    scopes.clear()
    assert lane_threads() <= threads
    assert live_tensors() <= tensors
