"""Many passes at once, some cancelled, some failing: everyone gets exactly what is theirs."""

from __future__ import annotations

import gc
from collections import Counter

import anyio
import anyio.lowlevel
import pytest
import torch

import asyncdp

from .helpers import Latch, lane_threads, run_stages, wait_until

pytestmark = pytest.mark.anyio

NUM_CALLS = 1000


class Picky(torch.nn.Module):
    """Doubles its input, but refuses a batch with a negative number in it, and holds some on their lanes."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))
        self.latches = {number: Latch() for number in range(3, NUM_CALLS, 100)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Double `x`."""
        if bool((x < 0).any()):
            raise ValueError(f"refused {int(x.min())}")
        latch = self.latches.get(int(x[0]) - 1)
        if latch is not None:
            latch.hold()
        return x * self.factor


def live_tensors() -> int:
    """Tensors that are alive in this process."""
    gc.collect()
    return sum(type(value) in (torch.Tensor, torch.nn.Parameter) for value in gc.get_objects())


async def test_a_thousand_calls_at_once() -> None:
    """Of 1,000 concurrent passes a tenth is cancelled and a tenth fails; the others are all right.

    Ten of the cancelled run at that time, the others are queued. No lane is broken, and neither a thread
    nor a tensor is left over.
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
    runtime = asyncdp.default_runtime()
    tensors, threads = live_tensors(), lane_threads()
    async with anyio.create_task_group() as group:
        first = Latch()
        group.start_soon(lambda: run_stages(runtime, [(lane, first.hold) for lane in runtime.lanes]))
        await first.wait_entered()
        for number in range(NUM_CALLS):
            group.start_soon(call, number)
        await wait_until(lambda: runtime.statistics().num_running == 1 + NUM_CALLS)
        for number in scopes.keys() - module.latches.keys():
            scopes[number].cancel()  # all are queued
        first.open()
        held = dict(module.latches)  # trio begins tasks in any order
        while held:
            await wait_until(lambda: any(latch.is_entered for latch in held.values()))
            number = next(number for number, latch in held.items() if latch.is_entered)
            scopes[number].cancel()
            await anyio.lowlevel.checkpoint()
            assert number not in outcomes, "it drains"
            held.pop(number).open()
    assert len(outcomes) == NUM_CALLS
    assert Counter(outcomes.values()) == {
        "right": NUM_CALLS * 8 // 10,
        "failed": NUM_CALLS // 10,
        "cancelled": NUM_CALLS // 10,
    }
    assert torch.equal(await asyncdp.data_parallel(module, torch.ones(4), "cpu*2"), torch.full((4,), 2.0))
    scopes.clear()
    assert lane_threads() <= threads
    assert live_tensors() <= tensors
