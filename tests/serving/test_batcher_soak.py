"""Ten thousand calls through cancellations, timeouts, poison and the loss of a lane."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter

import anyio
import pytest
import torch

from asyncdp import Batcher, Runtime
from asyncdp._devices.fake import fake_devices
from asyncdp.errors import CallTimeoutError, DeviceLostError

pytestmark = pytest.mark.anyio

NUM_CALLERS = 100
NUM_CALLS = 100  # of each
POISON = -1.0


def refuse_poison(x: torch.Tensor) -> torch.Tensor:
    if (x == POISON).any():
        raise ValueError("poison")
    return x * 2


async def test_every_call_has_exactly_one_outcome() -> None:
    """Nothing hangs, nobody gets a neighbour's result, counts add up and no tensor is kept."""
    chance = random.Random(5)
    outcomes: Counter[str] = Counter()
    devices = fake_devices(3)
    samples: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    async def call(number: int) -> str:
        kind = chance.choices(["plain", "cancel", "timeout", "poison"], [85, 5, 5, 5])[0]
        sample = torch.tensor(POISON if kind == "poison" else float(number))
        samples.add(sample)
        timeout = 1e-4 if kind == "timeout" else None
        with anyio.CancelScope() as scope:
            if kind == "cancel":
                group.start_soon(cancel_soon, scope)
            try:
                result = await batcher(sample, timeout=timeout, priority=chance.randrange(3))
            except ValueError:
                return "poison" if kind == "poison" else "somebody else's poison"
            except CallTimeoutError:
                return "timeout" if kind == "timeout" else "somebody else's timeout"
            except DeviceLostError:
                return "lost"
            return "right" if result.item() == 2.0 * number else "wrong"
        assert scope.cancelled_caught
        return "cancel" if kind == "cancel" else "somebody else's cancellation"

    async def cancel_soon(scope: anyio.CancelScope) -> None:
        for _ in range(chance.randrange(3)):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    async def caller(position: int) -> None:
        for number in range(NUM_CALLS):
            outcomes[await call(position * NUM_CALLS + number)] += 1
            if sum(outcomes.values()) == NUM_CALLERS * NUM_CALLS // 2:
                devices[0].lose()

    async with (
        Runtime(devices) as runtime,
        Batcher(refuse_poison, runtime=runtime, max_queue=64, max_batch_size=8) as batcher,
        anyio.create_task_group() as group,
    ):
        for position in range(NUM_CALLERS):
            group.start_soon(caller, position)
    told = batcher.statistics()
    assert sum(outcomes.values()) == NUM_CALLERS * NUM_CALLS
    assert set(outcomes) <= {"right", "poison", "timeout", "cancel", "lost"}
    assert outcomes["right"] > 0.8 * NUM_CALLERS * NUM_CALLS
    assert min(outcomes[kind] for kind in ("poison", "timeout", "cancel")) > 0
    assert (told.num_queued, told.num_outside, told.num_running) == (0, 0, 0)
    # A caller may be cancelled when its result is there already: then the call counts as done.
    assert told.num_done >= outcomes["right"]
    counted = told.num_done + told.num_failed + told.num_timed_out + told.num_cancelled
    assert counted == NUM_CALLERS * NUM_CALLS
    assert told.num_lost_slots == 1
    gc.collect()
    assert len(samples) == 0
