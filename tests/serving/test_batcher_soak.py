"""Ten thousand calls through cancellations, timeouts, refusals, poison and the loss of a lane."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch

from asyncdp import Batcher, Runtime
from asyncdp.errors import CallCancelledError, CallTimeoutError, DeviceLostError, QueueFullError
from asyncdp.testing.fake import fake_devices

pytestmark = pytest.mark.anyio

NUM_CALLERS = 100
NUM_CALLS = 100  # of each
POISON = -1.0
LONGEST = 6

KINDS = {"plain": 80, "cancelled": 5, "given up": 5, "late": 5, "poison": 5}  # and how often, in 100


def refuse_poison(x: torch.Tensor) -> torch.Tensor:
    if (x == POISON).any():
        raise ValueError("poison")
    return x[:, 0] * 2


async def test_every_call_has_exactly_one_outcome() -> None:
    """Nothing hangs, nobody gets a neighbour's result, counts add up and no tensor stays alive."""
    chance = random.Random(5)
    outcomes: Counter[str] = Counter()
    devices = fake_devices(3)
    samples: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    async def call(number: int) -> str:
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        sample = torch.full((chance.randint(1, LONGEST),), POISON if kind == "poison" else float(number))
        samples.add(sample)
        options: dict[str, Any] = {"priority": chance.randrange(3)}
        if kind == "late":
            options["timeout"] = 1e-4
        with anyio.CancelScope() as scope:
            if kind == "cancelled":
                group.start_soon(after_a_while, scope.cancel)
            try:
                result = await outcome(kind, sample, options)
            except (ValueError, CallTimeoutError, CallCancelledError, DeviceLostError) as error:
                return kind_of(error, kind)
            return "right" if result.item() == 2.0 * number else "wrong"
        assert scope.cancelled_caught
        return kind if kind == "cancelled" else "somebody else's cancellation"

    async def outcome(kind: str, sample: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Half of the calls are queued first, if there is room, and are awaited a while later."""
        pending = None
        if kind == "given up" or chance.random() < 0.5:
            try:
                pending = batcher.call_nowait(sample, **options)
            except QueueFullError:
                outcomes["refused"] += 1
        if pending is None:
            return await batcher(sample, **options)
        if kind == "given up":
            group.start_soon(after_a_while, pending.cancel)
        if kind != "cancelled":  # else its result might be there, unseen, when the cancellation comes
            for _ in range(chance.randrange(3)):
                await anyio.lowlevel.checkpoint()
        return await pending

    async def after_a_while(act: Any) -> None:
        for _ in range(chance.randrange(3)):
            await anyio.lowlevel.checkpoint()
        act()

    def kind_of(error: Exception, kind: str) -> str:
        if isinstance(error, DeviceLostError):
            return "lost"
        found = {ValueError: "poison", CallTimeoutError: "late", CallCancelledError: "given up"}[type(error)]
        return found if found == kind else f"somebody else's {found}"

    async def caller(position: int) -> None:
        nonlocal num_ended
        for number in range(NUM_CALLS):
            outcomes[await call(position * NUM_CALLS + number)] += 1
            num_ended += 1
            if num_ended == NUM_CALLERS * NUM_CALLS // 2:
                group.start_soon(lose_a_lane)

    async def lose_a_lane() -> None:
        """Lose it while it runs a batch."""
        devices[0].hold()
        await devices[0].wait_issued()
        devices[0].lose()
        devices[0].release()

    num_ended = 0
    async with (
        Runtime(devices) as runtime,
        Batcher(
            refuse_poison,
            runtime=runtime,
            max_queue=64,
            max_batch_size=8,
            max_wait=2e-4,
            size_of=len,
            max_cost=6 * LONGEST,
            max_padding=0.3,
            pad=0.0,
        ) as batcher,
        anyio.create_task_group() as group,
    ):
        for position in range(NUM_CALLERS):
            group.start_soon(caller, position)
    stats = batcher.statistics()
    assert stats.num_refused == outcomes.pop("refused") > 0
    assert outcomes.total() == NUM_CALLERS * NUM_CALLS
    assert set(outcomes) == {"right", "poison", "late", "cancelled", "given up", "lost"}
    assert outcomes["right"] > 0.75 * NUM_CALLERS * NUM_CALLS
    assert (stats.num_queued, stats.num_outside, stats.num_running) == (0, 0, 0)
    assert stats.num_done == outcomes["right"]
    assert stats.num_failed == outcomes["poison"] + outcomes["lost"]
    assert stats.num_timed_out == outcomes["late"]
    assert stats.num_cancelled == outcomes["cancelled"] + outcomes["given up"]
    assert stats.num_lost_slots == 1
    assert 0 < stats.padding_waste <= 0.3
    gc.collect()
    assert len(samples) == 0
