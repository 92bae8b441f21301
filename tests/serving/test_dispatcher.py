"""The dispatcher of a batcher: nothing that an engine or a lane does ends it; only closing does."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch

from asyncdp import Batcher, Runtime
from asyncdp.errors import (
    BatcherClosedError,
    DeviceLostError,
    EngineCancelledError,
    NestedPassError,
    SplitError,
)
from asyncdp.testing.fake import FakeDevice, fake_devices

pytestmark = pytest.mark.anyio

ONE = torch.tensor(1.0)


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


async def outcomes_of(calls: Sequence[Any]) -> list[Any]:
    """The results of some calls, or their exceptions."""
    outcomes: list[Any] = []
    for call in calls:
        try:
            outcomes.append((await call).item())
        except Exception as error:
            outcomes.append(error)
    return outcomes


# --- which batches are sent ---------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "sizes"), [(1e-6, [4]), (1.0, [2, 2]), (math.inf, [2, 2])])
async def test_what_waits_is_shared_out_where_that_pays(seconds: float, sizes: list[int]) -> None:
    """Two free lanes share what waits, unless the last batch was so quick that two batches take longer."""
    seen: list[int] = []

    def engine(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x * 2

    async with Runtime("cpu*2") as runtime, Batcher(engine, runtime=runtime) as batcher:
        for lane in runtime.lanes:
            lane._last_seconds = seconds
        assert await outcomes_of([batcher.call_nowait(ONE) for _ in range(4)]) == [2.0] * 4
    assert seen == sizes


# --- what an engine raises -------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit])
async def test_a_cancellation_of_the_engines_own_is_its_samples(
    kind: type[BaseException], is_async: bool
) -> None:
    """What looks like a cancellation but is the engine's fails one call, and ends no batcher or caller."""

    def engine(x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            raise kind
        return x * 2

    async def async_engine(x: torch.Tensor) -> torch.Tensor:
        await anyio.lowlevel.checkpoint()
        return engine(x)

    async with (
        Runtime("cpu") as runtime,
        Batcher(async_engine if is_async else engine, runtime=runtime) as batcher,
    ):
        for _ in range(2):
            calls = [batcher.call_nowait(torch.tensor(float(n))) for n in (1, -2, 3)]
            with anyio.fail_after(30):
                first, second, third = await outcomes_of(calls)
            assert (first, third) == (2.0, 6.0)
            assert isinstance(second, EngineCancelledError)
            assert isinstance(second.__cause__, kind)


async def test_an_engine_may_cancel_what_it_started() -> None:
    """A cancel scope that expires within an async engine does not end its batcher."""

    async def engine(x: torch.Tensor) -> torch.Tensor:
        with anyio.move_on_after(0):
            await anyio.sleep_forever()
        if (x < 0).any():
            with anyio.fail_after(0):
                await anyio.sleep_forever()
        return x * 2

    async with Runtime("cpu") as runtime, Batcher(engine, runtime=runtime) as batcher:
        calls = [batcher.call_nowait(torch.tensor(float(n))) for n in (1, -2, 3)]
        with anyio.fail_after(30):
            first, second, third = await outcomes_of(calls)
        assert (first, third) == (2.0, 6.0)
        assert isinstance(second, TimeoutError)
        assert (await batcher(ONE)).item() == 2.0


async def test_an_engine_that_swallows_its_cancellation_ends_all_the_same() -> None:
    """A cancelled batcher ends after the batch that runs, even if its engine went on."""
    running = anyio.Event()

    async def engine(x: torch.Tensor) -> torch.Tensor:
        running.set()
        try:
            await anyio.sleep_forever()
        except BaseException:
            return x * 2

    async with Runtime("cpu") as runtime:
        with anyio.fail_after(30), anyio.CancelScope() as scope:
            async with Batcher(engine, max_batch_size=1, runtime=runtime) as batcher:
                calls = [batcher.call_nowait(ONE) for _ in range(3)]
                await running.wait()
                scope.cancel()
                await anyio.sleep_forever()
        # On trio the engine's result meets the cancellation again, on the way to be split.
        assert [type(outcome) for outcome in await outcomes_of(calls)][1:] == [BatcherClosedError] * 2


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="needs coroutines closed when dropped")
def test_tasks_of_a_dropped_loop_are_closed_quietly() -> None:
    """A loop that is dropped in mid-batch closes its tasks, which is no error of the engine."""
    loop = asyncio.new_event_loop()
    begun = asyncio.Event()
    seen: list[str] = []

    async def engine(x: torch.Tensor) -> torch.Tensor:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            seen.append("closed")
        return x

    async def begin() -> Any:
        batcher = await Batcher(engine, runtime=runtime).__aenter__()
        call = batcher.call_nowait(ONE)
        await begun.wait()
        return call

    runtime = Runtime("cpu")
    call = loop.run_until_complete(begin())
    loop.set_exception_handler(lambda *_: None)  # asyncio reports every pending task
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    del loop
    gc.collect()
    assert seen == ["closed"]
    assert isinstance(asyncio.run(outcomes_of([call]))[0], BatcherClosedError)
    asyncio.run(runtime.aclose())


@pytest.mark.parametrize("split", [lambda output, samples: [], lambda output, samples: None])
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_wrong_split_fails_its_callers(split: Callable[..., Any], is_async: bool) -> None:
    """Calls fail if `split` gives anything but one result for each, batch after batch."""

    async def engine(x: torch.Tensor) -> torch.Tensor:
        return x

    async with (
        Runtime("cpu") as runtime,
        Batcher(engine if is_async else double, split=split, runtime=runtime) as batcher,
    ):
        for _ in range(2):
            with pytest.raises((SplitError, TypeError)):
                await batcher(ONE)


# --- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
async def test_results_carry_no_graph(is_async: bool) -> None:
    """Neither a function nor an async one records for a backward, unless it switches that on itself."""
    weight = torch.ones(1, requires_grad=True)
    modes: list[bool] = []

    def engine(x: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_grad_enabled())
        with torch.enable_grad():
            asked = x * weight
        return (x * weight, asked)

    async def async_engine(x: torch.Tensor) -> torch.Tensor:
        before = engine(x)
        await anyio.lowlevel.checkpoint()
        modes.append(torch.is_grad_enabled())
        assert (await runtime.run(torch.is_grad_enabled)) is False
        return before

    def collate(samples: Sequence[Any]) -> torch.Tensor:
        modes.append(torch.is_grad_enabled())
        return torch.stack(list(samples))

    def split(output: Any, samples: Sequence[Any]) -> list[Any]:
        modes.append(torch.is_grad_enabled())
        return [output] * len(samples)

    async with (
        Runtime("cpu") as runtime,
        Batcher(
            async_engine if is_async else engine, collate=collate, split=split, runtime=runtime
        ) as batcher,
    ):
        plain, asked = await batcher(ONE)
        assert torch.is_grad_enabled()
    assert not any(modes)
    assert (plain.requires_grad, asked.requires_grad) == (False, True)


async def test_grad_mode_of_an_async_engine_stays_its_own() -> None:
    """While an async engine waits, other tasks have their own grad mode, and it has its own afterwards."""
    modes: list[tuple[str, bool]] = []
    waiting, go_on = anyio.Event(), anyio.Event()

    async def engine(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            waiting.set()
            await go_on.wait()
            modes.append(("engine", torch.is_grad_enabled()))
        modes.append(("engine", torch.is_grad_enabled()))
        return x

    async with Runtime("cpu") as runtime, Batcher(engine, runtime=runtime) as batcher:
        call = batcher.call_nowait(ONE)
        await waiting.wait()
        modes.append(("other", torch.is_grad_enabled()))
        go_on.set()
        await call
    assert modes == [("other", True), ("engine", True), ("engine", False)]


# --- lanes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_in_flight", [1, 2])
async def test_a_slot_moves_on_to_a_living_lane(max_in_flight: int) -> None:
    """With fewer batches in flight than lanes, a lost lane is replaced by one that had none."""
    devices = fake_devices(3)
    async with (
        Runtime(devices) as runtime,
        Batcher(double, max_in_flight=max_in_flight, runtime=runtime) as batcher,
    ):
        for device in devices[:-1]:
            assert (await batcher(ONE)).item() == 2.0
            device.hold()
            calls = [batcher.call_nowait(ONE) for _ in range(max_in_flight)]
            await device.wait_issued()
            device.lose()
            device.release()
            outcomes = await outcomes_of(calls)
            assert isinstance(outcomes[0], DeviceLostError) or 2.0 in outcomes
            assert sum(isinstance(outcome, DeviceLostError) for outcome in outcomes) == 1
        with anyio.fail_after(30):
            assert (await batcher(ONE)).item() == 2.0
        assert batcher.statistics().num_lost_slots == max_in_flight - 1


async def test_state_ends_closed_without_lanes() -> None:
    """With all lanes lost calls fail, the batcher stays open, and after closing it is closed."""
    device = FakeDevice()
    async with Runtime([device]) as runtime:
        async with Batcher(double, runtime=runtime) as batcher:
            device.lose()
            for _ in range(2):
                with pytest.raises(DeviceLostError):
                    await batcher(ONE)
            await anyio.wait_all_tasks_blocked()
            assert "open" in repr(batcher)
        assert "closed" in repr(batcher)
        with pytest.raises(BatcherClosedError, match="closed"):
            await batcher(ONE)


# --- closing --------------------------------------------------------------------------------


async def test_every_close_waits_for_the_end() -> None:
    """However many close a batcher at the same time, all return when it has drained; later ones at once."""
    device = FakeDevice(held=True)
    ended: list[str] = []

    async def close() -> None:
        await batcher.aclose()
        ended.append(repr(batcher))

    async with Runtime([device]) as runtime, Batcher(double, runtime=runtime) as batcher:
        call = batcher.call_nowait(ONE)
        await device.wait_issued()
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(close)
            await anyio.wait_all_tasks_blocked()
            assert ended == []
            assert "draining" in repr(batcher)
            device.release()
        assert ended == ["<Batcher closed: 0 queued, 0 running, 1 done>"] * 3
        await batcher.aclose()
        assert (await call).item() == 2.0


async def test_a_cancelled_close_ends_the_other_one() -> None:
    """A cancelled close fails what waits, and ends every other close of the same batcher."""
    device = FakeDevice(held=True)
    impatience = anyio.CancelScope()

    async def close_impatiently() -> None:
        with impatience:
            await batcher.aclose()

    async with Runtime([device]) as runtime, Batcher(double, max_batch_size=1, runtime=runtime) as batcher:
        calls = [batcher.call_nowait(ONE) for _ in range(2)]
        await device.wait_issued()
        async with anyio.create_task_group() as group:
            group.start_soon(batcher.aclose)
            group.start_soon(close_impatiently)
            await anyio.wait_all_tasks_blocked()
            impatience.cancel()
            # Once the batch knows that it is cancelled.
            await anyio.wait_all_tasks_blocked()
            device.release()
        assert "closed" in repr(batcher)
        assert [type(outcome) for outcome in await outcomes_of(calls)] == [BatcherClosedError] * 2


@pytest.mark.parametrize("part", ["take", "on_batch", "_send_batch"])
async def test_a_mistake_of_ours_leaves_nobody_hanging(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the batcher itself raises, all calls fail, new ones are refused and closing raises the cause."""
    devices = fake_devices(2)
    for device in devices:
        device.hold()
    async with Runtime(devices) as runtime:
        batcher = await Batcher(double, max_batch_size=1, runtime=runtime).__aenter__()
        calls = [batcher.call_nowait(ONE) for _ in range(6)]
        for device in devices:
            await device.wait_issued()

        def fail(*_: object) -> None:
            raise ZeroDivisionError("ours")

        dispatcher = batcher._dispatcher
        owner = next(
            each for each in (dispatcher, dispatcher.queue, dispatcher.recorder) if hasattr(each, part)
        )
        monkeypatch.setattr(type(owner), part, fail)
        for device in devices:
            device.release()
        with anyio.fail_after(30):
            outcomes = await outcomes_of(calls)
            with pytest.raises(ZeroDivisionError):
                await batcher.aclose()
        assert outcomes[:2] == [2.0, 2.0]
        assert [type(outcome) for outcome in outcomes[2:]] == [BatcherClosedError] * 4
        assert all(isinstance(outcome.__cause__, ZeroDivisionError) for outcome in outcomes[2:])
        with pytest.raises(BatcherClosedError, match="closed"):
            await batcher(ONE)


# --- what batches run under -----------------------------------------------------------------

OWNER: contextvars.ContextVar[str] = contextvars.ContextVar("OWNER", default="nobody")


@pytest.mark.parametrize("is_async", [False, True])
async def test_batches_run_in_the_context_of_the_batcher(is_async: bool) -> None:
    """Context variables and autocast are those the batcher was entered with, not those of a caller.

    What a batch changes of them, no other batch sees.
    """
    seen: list[tuple[str, bool]] = []

    def engine(x: torch.Tensor) -> torch.Tensor:
        seen.append((OWNER.get(), torch.is_autocast_enabled("cpu")))
        OWNER.set("a batch")
        return x

    async def async_engine(x: torch.Tensor) -> torch.Tensor:
        seen.append((OWNER.get(), True))
        OWNER.set("a batch")
        return x

    def collate(samples: Sequence[Any]) -> torch.Tensor:
        seen.append((OWNER.get(), torch.is_autocast_enabled("cpu")))
        return torch.stack(list(samples))

    async def call() -> None:
        OWNER.set("a caller")
        await batcher(ONE)

    async with Runtime("cpu") as runtime:
        OWNER.set("the batcher")
        batcher = Batcher(async_engine if is_async else engine, collate=collate, runtime=runtime)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            await batcher.__aenter__()
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call)
        await call()
        await batcher.aclose()
    assert set(seen) == {("the batcher", True)}


def test_a_batcher_on_one_of_its_own_lanes_is_refused() -> None:
    """A lane that waited for its own runtime would wait for ever: entering the batcher there raises."""

    async def main() -> None:
        async with Batcher(double, runtime=runtime):
            raise AssertionError

    async def outside() -> None:
        async with runtime:
            with pytest.raises(NestedPassError):
                await runtime.run(partial(asyncio.run, main()))

    runtime = Runtime("cpu")
    asyncio.run(outside())


class FullDevice(FakeDevice):
    """A device that refuses tasks while it is full."""

    captures = True
    is_full = True

    def capture(self) -> None:
        if self.is_full:
            raise MemoryError("no room")


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_batch_that_cannot_begin_fails_its_calls_alone(is_async: bool) -> None:
    """Calls of a batch that cannot begin get the reason, however many they are; the next one runs."""

    async def engine(x: torch.Tensor) -> torch.Tensor:
        return x

    device = FullDevice()
    async with (
        Runtime([device]) as runtime,
        Batcher(
            engine if is_async else double, max_batch_size=2000, max_queue=2000, runtime=runtime
        ) as batcher,
    ):
        calls = [batcher.call_nowait(ONE) for _ in range(1200)]
        assert {type(outcome) for outcome in await outcomes_of(calls)} == {MemoryError}
        device.is_full = False
        assert (await batcher(ONE)).item() in (1.0, 2.0)
    assert batcher.statistics().num_running == 0
