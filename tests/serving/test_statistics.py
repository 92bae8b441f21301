"""What a batcher counts: failures by kind, refusals by reason, tokens and padding, lanes that hang."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
import torch

from asyncdp import Batcher, QueueFull, Runtime
from asyncdp.errors import BatcherClosedError, CallTimeoutError, EngineCancelledError

from ..runtime.helpers import wait_until

pytestmark = pytest.mark.anyio


async def fail_all(batcher: Batcher, samples: Sequence[Any]) -> None:
    calls = [batcher.call_nowait(sample) for sample in samples]
    for call in calls:
        with pytest.raises((Exception, EngineCancelledError)):
            await call


async def test_failures_are_counted_by_the_class_of_their_error() -> None:
    """What the engine raises, and what it is wrapped in for callers, each has a count of its own."""

    def choose(numbers: list[int]) -> list[int]:
        return [[1, 2][number] if number < 9 else exit() for number in numbers]

    async with (
        Runtime("cpu") as runtime,
        Batcher(choose, collate=list, split=lambda out, _: out, runtime=runtime) as batcher,
    ):
        await fail_all(batcher, [5])
        await fail_all(batcher, [5, 6])
        await fail_all(batcher, [9])
        assert await batcher(1) == 2
        stats = batcher.statistics()
    assert dataclasses.asdict(stats)["failures"] == {"IndexError": 3, "EngineCancelledError": 1}
    assert (stats.num_failed, stats.num_done, stats.num_samples, stats.num_batches) == (4, 1, 5, 4)


async def test_kinds_of_failures_are_bounded() -> None:
    """Classes that are made anew for each error do not make series without end."""

    def fail(batch: torch.Tensor) -> None:
        raise type(f"Error{int(batch[0])}", (ValueError,), {})

    async with Runtime("cpu") as runtime, Batcher(fail, runtime=runtime, retry="none") as batcher:
        for number in range(60):
            await fail_all(batcher, [number])
        failures = batcher.statistics().failures
    assert len(failures) == 51
    assert failures["other"] == 10


async def test_refusals_are_counted_by_their_reason() -> None:
    """A full queue, wrong arguments and a closed batcher refuse calls, each for a reason of its own."""
    async with Runtime("cpu") as runtime:
        batcher = Batcher(torch.neg, runtime=runtime, max_queue=1)
        async with batcher:
            call = batcher.call_nowait(torch.ones(1))
            with pytest.raises(QueueFull):
                batcher.call_nowait(torch.ones(1))
            await call
            for wrong in ({"priority": "1"}, {"timeout": True}):
                with pytest.raises(ValueError, match=r"must be|seconds"):
                    await batcher(torch.ones(1), **wrong)  # type: ignore[arg-type]
        with pytest.raises(BatcherClosedError):
            await batcher(torch.ones(1))
        stats = batcher.statistics()
    assert stats.refused == {"queue_full": 1, "invalid": 2, "closed": 1}
    assert (stats.num_refused, stats.num_done, stats.num_failed) == (4, 1, 0)


@pytest.mark.parametrize("options", [{"size_of": len, "max_padding": 1.0}, {}])
async def test_tokens_are_counted_with_and_without_sizes(options: dict[str, Any]) -> None:
    """By `size_of`, else by what the default collate pads, real and padding tokens come to the same."""
    async with Runtime("cpu") as runtime, Batcher(torch.neg, pad=0, runtime=runtime, **options) as batcher:
        calls = [batcher.call_nowait(torch.ones(length)) for length in (4, 1, 3)]
        for call in calls:
            await call
        await batcher(torch.ones(5))
        stats = batcher.statistics()
    assert (stats.real_tokens, stats.padding_tokens) == (13, 4)
    assert stats.padding_waste == pytest.approx(4 / 17)


async def test_without_padding_no_tokens_are_counted() -> None:
    """A batcher that can pad nothing, or whose collate is its own, claims nothing."""
    async with Runtime("cpu") as runtime, Batcher(torch.neg, runtime=runtime) as batcher:
        await batcher(torch.ones(4))
        stats = batcher.statistics()
    assert (stats.real_tokens, stats.padding_tokens, stats.padding_waste) == (0, 0, 0)


async def test_batches_that_hang_are_counted() -> None:
    """A batch that makes its lane suspect counts once, also after it has answered."""
    latch = threading.Event()

    def wait(batch: torch.Tensor) -> torch.Tensor:
        assert latch.wait(30)
        return batch

    async with (
        Runtime("cpu") as runtime,
        Batcher(wait, runtime=runtime, hang_timeout=0.02) as batcher,
        anyio.create_task_group() as group,
    ):
        group.start_soon(batcher, torch.ones(1))
        await wait_until(lambda: batcher.statistics().num_hung > 0)
        assert batcher.statistics().num_suspect == 1
        latch.set()
    assert (batcher.statistics().num_hung, batcher.statistics().num_suspect) == (1, 0)


async def test_timeouts_are_counted_by_where_the_call_was() -> None:
    """A call that never ran says so, by its error and its count, awaited or not; one whose batch ran, too."""
    latch = threading.Event()

    def wait(batch: torch.Tensor) -> torch.Tensor:
        assert latch.wait(30)
        return batch

    async with Runtime("cpu") as runtime, Batcher(wait, runtime=runtime) as batcher:
        running = batcher.call_nowait(torch.ones(1), timeout=0.05)
        await wait_until(lambda: batcher.statistics().num_running == 1)
        unawaited = batcher.call_nowait(torch.ones(1), timeout=0.01)
        with pytest.raises(CallTimeoutError, match="waited in the queue") as queued:
            await batcher(torch.ones(1), timeout=0.01)
        with pytest.raises(CallTimeoutError, match="was in a batch") as late:
            await running
        latch.set()
        with pytest.raises(CallTimeoutError, match="waited in the queue"):
            await unawaited
        stats = batcher.statistics()
    assert (queued.value.has_waited, late.value.has_waited) == (True, False)
    assert stats.timeouts == {"queued": 2, "running": 1}
    assert (stats.num_timed_out, stats.num_failed, dict(stats.failures)) == (3, 0, {})
