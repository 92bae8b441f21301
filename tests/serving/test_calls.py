"""One call of a batcher: its time, its cancellation, and how it is counted."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import anyio
import anyio.lowlevel
import numpy
import pytest
import torch

from asyncdp import Batcher, BatcherStatistics, Runtime
from asyncdp.errors import (
    CallCancelledError,
    CallTimeoutError,
    NestedCallError,
    OtherLoopError,
    QueueFullError,
)
from asyncdp.testing.fake import FakeDevice

pytestmark = pytest.mark.anyio

ONE = torch.tensor(1.0)


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


async def wait_for(call: Any) -> None:
    """Await a call in a task of its own."""
    await call


def outcomes(stats: BatcherStatistics) -> tuple[int, int, int, int]:
    """How many calls had which outcome: done, failed, cancelled, timed out."""
    return stats.num_done, stats.num_failed, stats.num_cancelled, stats.num_timed_out


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the clock of the batchers go ahead, without a wait."""
    now = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: now() + seconds)


async def test_the_time_of_a_call_runs_before_it_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` counts from `call_nowait` on; a call awaited after that has timed out already."""
    device = FakeDevice(held=True)
    async with Runtime([device]) as runtime, Batcher(double, runtime=runtime) as batcher:
        call = batcher.call_nowait(ONE, timeout=60.0)
        pass_time(monkeypatch, 61.0)
        with anyio.fail_after(30), pytest.raises(CallTimeoutError, match=r"60\.0 s"):
            await call
        device.release()
    assert outcomes(batcher.statistics()) == (0, 0, 0, 1)


async def test_a_call_whose_time_is_over_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited for too long takes no place in a batch, although nobody awaits it."""
    device = FakeDevice(held=True)
    seen: list[int] = []

    def engine(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x

    async with Runtime([device]) as runtime, Batcher(engine, runtime=runtime) as batcher:
        running = batcher.call_nowait(ONE)
        await device.wait_issued()
        late = [batcher.call_nowait(ONE, timeout=60.0) for _ in range(2)]
        patient = batcher.call_nowait(ONE, timeout=100.0)
        pass_time(monkeypatch, 61.0)
        device.release()
        await running
        await patient
        assert seen == [1, 1]
        assert outcomes(batcher.statistics()) == (2, 0, 0, 2)
        for call in late:
            with pytest.raises(CallTimeoutError):
                await call
        assert outcomes(batcher.statistics()) == (2, 0, 0, 2)


async def test_a_result_that_came_too_late_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that ran beyond its time has timed out, and one in time keeps its result, whenever awaited."""
    device = FakeDevice(held=True)
    async with Runtime([device]) as runtime, Batcher(double, runtime=runtime) as batcher:
        late, in_time, plain = (batcher.call_nowait(ONE, timeout=t) for t in (60.0, 100.0, None))
        await device.wait_issued()
        pass_time(monkeypatch, 61.0)
        device.release()
        await plain
        pass_time(monkeypatch, 61.0)
        assert (await in_time).item() == 2.0
        with pytest.raises(CallTimeoutError):
            await late
    assert outcomes(batcher.statistics()) == (2, 0, 0, 1)


async def test_cancel_frees_the_place() -> None:
    """A call that is cancelled while it waits never runs and frees its place; awaiting it raises."""
    device = FakeDevice(held=True)
    seen: list[float] = []

    def engine(x: torch.Tensor) -> torch.Tensor:
        seen.extend(x.tolist())
        return x

    async with Runtime([device]) as runtime, Batcher(engine, max_queue=1, runtime=runtime) as batcher:
        running = batcher.call_nowait(torch.tensor(0.0))
        await device.wait_issued()
        call = batcher.call_nowait(torch.tensor(1.0))
        with pytest.raises(QueueFullError):
            batcher.call_nowait(torch.tensor(2.0))
        assert call.cancel()
        assert not call.cancel()
        assert batcher.statistics().num_queued == 0
        last = batcher.call_nowait(torch.tensor(3.0))
        with pytest.raises(CallCancelledError, match="the call was"):
            await call
        device.release()
        await running
        await last
        assert not last.cancel()
    assert seen == [0.0, 3.0]
    assert outcomes(batcher.statistics()) == (2, 0, 1, 0)


async def test_cancel_wakes_the_task_that_awaits_the_call() -> None:
    """A task that awaits a call, queued or running, gets an error when another cancels the call."""
    device = FakeDevice(held=True)
    woken: list[str] = []

    async def wait(call: Any) -> None:
        with pytest.raises(CallCancelledError):
            await call
        woken.append("cancelled")

    async with (
        Runtime([device]) as runtime,
        Batcher(double, max_batch_size=2, runtime=runtime) as batcher,
    ):
        beside = batcher.call_nowait(ONE)
        running = batcher.call_nowait(ONE)
        await device.wait_issued()
        queued = batcher.call_nowait(ONE)
        async with anyio.create_task_group() as group:
            group.start_soon(wait, running)
            group.start_soon(wait, queued)
            await anyio.wait_all_tasks_blocked()
            assert running.cancel()
            assert queued.cancel()
        assert woken == ["cancelled"] * 2
        device.release()
        assert (await beside).item() == 2.0
    assert outcomes(batcher.statistics()) == (1, 0, 2, 0)


async def test_repr_shows_the_state() -> None:
    """A call shows whether it is pending, or how it has ended."""
    device = FakeDevice(held=True)
    async with Runtime([device]) as runtime, Batcher(double, max_batch_size=1, runtime=runtime) as batcher:
        first, second = batcher.call_nowait(ONE), batcher.call_nowait(ONE)
        assert repr(first) == "<Call pending>"
        second.cancel()
        assert repr(second) == "<Call cancelled>"
        device.release()
        await first
        assert repr(first) == "<Call done>"


async def test_a_call_is_awaited_by_one_task() -> None:
    """A second task that awaits a call is refused instead of hanging."""
    device = FakeDevice(held=True)
    async with (
        Runtime([device]) as runtime,
        Batcher(double, runtime=runtime) as batcher,
        anyio.create_task_group() as group,
    ):
        call = batcher.call_nowait(ONE)
        group.start_soon(wait_for, call)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(30), pytest.raises(RuntimeError, match="two tasks"):
            await call
        device.release()


async def test_a_result_that_nobody_gets_to_see_is_not_done() -> None:
    """A caller cancelled in the very turn of the loop in which its result comes counts as cancelled."""
    device = FakeDevice(held=True)
    async with (
        Runtime([device]) as runtime,
        Batcher(double, runtime=runtime) as batcher,
        anyio.create_task_group() as group,
    ):
        call = batcher.call_nowait(ONE)
        group.start_soon(wait_for, call)
        await device.wait_issued()
        await anyio.wait_all_tasks_blocked()
        # Both in one turn: the result is there when the task learns of its cancellation.
        group.cancel_scope.cancel()
        call._request.complete(ONE)
        device.release()
    assert outcomes(batcher.statistics()) == (0, 0, 1, 0)


async def test_calls_that_nobody_awaits_are_counted() -> None:
    """Every call is counted once, whether and whenever it is awaited."""

    def engine(x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            raise ValueError("negative")
        return x

    async with Runtime("cpu") as runtime, Batcher(engine, runtime=runtime) as batcher:
        calls = [batcher.call_nowait(torch.tensor(float(n))) for n in (1, -1, 2)]
    assert outcomes(batcher.statistics()) == (2, 1, 0, 0)
    assert (await calls[0]).item() == 1.0
    with pytest.raises(ValueError, match="negative"):
        await calls[1]
    assert outcomes(batcher.statistics()) == (2, 1, 0, 0)


@pytest.mark.parametrize("size", [math.nan, math.inf, -1, None, "long"])
async def test_a_wrong_size_is_refused_before_anything_is_queued(size: Any) -> None:
    """What `size_of` gives is checked; neighbours, who wait meanwhile, lose nothing."""
    device = FakeDevice(held=True)
    sizes = {0: 5, 1: 7, 2: size, 3: 6}
    async with (
        Runtime([device]) as runtime,
        Batcher(double, size_of=lambda sample: sizes[int(sample)], runtime=runtime) as batcher,
    ):
        calls = [batcher.call_nowait(torch.tensor(0.0))]
        await device.wait_issued()
        calls.append(batcher.call_nowait(torch.tensor(1.0)))
        with pytest.raises(ValueError, match=r"size_of gave .* Return a number from 0 up"):
            batcher.call_nowait(torch.tensor(2.0))
        with pytest.raises(ValueError, match="size_of gave"):
            await batcher(torch.tensor(2.0))
        with pytest.raises(KeyError):
            await batcher(torch.tensor(4.0))
        calls.append(batcher.call_nowait(torch.tensor(3.0)))
        device.release()
        with anyio.fail_after(30):
            assert [(await call).item() for call in calls] == [0.0, 2.0, 6.0]
    assert outcomes(batcher.statistics()) == (3, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"timeout": -1.0}, "timeout is in seconds"),
        ({"timeout": math.nan}, "timeout is in seconds"),
        ({"timeout": "1"}, "timeout is in seconds"),
        ({"timeout": True}, "timeout is in seconds"),
        ({"priority": True}, "priority must be an int"),
        ({"priority": "high"}, "priority must be an int"),
        ({"priority": math.nan}, "priority must be an int"),
    ],
)
async def test_wrong_options_of_a_call_are_refused(options: dict[str, Any], cause: str) -> None:
    """A timeout or a priority of the wrong kind is refused at the call, and the queue goes on."""
    async with Runtime("cpu") as runtime, Batcher(double, runtime=runtime) as batcher:
        with pytest.raises(ValueError, match=cause):
            batcher.call_nowait(ONE, **options)
        with pytest.raises(ValueError, match=cause):
            await batcher(ONE, **options)
        assert (await batcher(ONE)).item() == 2.0


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: Batcher(double, max_wait=math.nan), "max_wait"),
        (lambda: Batcher(double, max_age=-1.0), "max_age"),
        (lambda: Batcher(double, max_wait="1"), "max_wait"),  # type: ignore[arg-type]
        (lambda: Batcher(double, hang_timeout=True), "hang_timeout"),
        (lambda: Batcher(double, max_batch_size=True), "max_batch_size"),
        (lambda: Batcher(double, timeout=math.nan), "timeout"),
        (lambda: Batcher(double, max_queue=1.5), "max_queue must be 1 or more, an int"),  # type: ignore[arg-type]
        (lambda: Batcher(double, max_cost=math.nan, size_of=len), "max_cost"),
        (lambda: Batcher(double, max_padding=math.nan), "from 0 to 1"),
        (lambda: Batcher(double, max_wait=Fraction(10**400)), "max_wait"),  # type: ignore[arg-type]
    ],
)
def test_numbers_that_are_none_are_refused(make: Callable[[], object], cause: str) -> None:
    """NaN, negative durations and fractions of calls are refused when the batcher is made."""
    with pytest.raises(ValueError, match=cause):
        make()


@pytest.mark.parametrize("kind", [numpy.float32, numpy.int64, Fraction])
async def test_durations_are_any_numbers(kind: Callable[[int], Any]) -> None:
    """Whatever kind of number a duration is, time is counted by floats: others round or overflow."""
    device = FakeDevice(held=True)
    async with Runtime([device]) as runtime, Batcher(double, runtime=runtime, timeout=kind(0)) as batcher:
        for call in (batcher.call_nowait(ONE), batcher.call_nowait(ONE, timeout=kind(0))):
            with pytest.raises(CallTimeoutError, match=r"within 0.0 s"):
                await call
        call = batcher.call_nowait(ONE, timeout=kind(1000))
        device.release()
        assert (await call).item() == 2.0


@pytest.mark.parametrize("size", [10**400, -(10**4000), math.nan, -1, None])
async def test_lengths_that_are_none_are_refused(size: Any) -> None:
    """What `size_of` gives must be a length that a float can hold."""
    async with (
        Runtime("cpu") as runtime,
        Batcher(double, runtime=runtime, size_of=lambda sample: size) as batcher,
    ):
        with pytest.raises(ValueError, match="size_of gave"):
            await batcher(ONE)


async def test_a_batcher_that_waits_for_itself_is_refused() -> None:
    """An engine that calls its own batcher gets an error, also through another one, which it may call."""

    async def engine(x: torch.Tensor) -> torch.Tensor:
        if x[0] == 0:
            return x + await batcher(ONE)
        return x + await other(x[0])

    async def back(x: torch.Tensor) -> torch.Tensor:
        return x + await batcher(ONE) if x[0] < 0 else x * 2

    async with (
        Runtime("cpu") as runtime,
        Batcher(back, runtime=runtime) as other,
        Batcher(engine, runtime=runtime) as batcher,
    ):
        with anyio.fail_after(30):
            for value in (0 * ONE, -ONE):
                with pytest.raises(NestedCallError, match="wait for itself"):
                    await batcher(value)
            assert (await batcher(ONE)).item() == 3.0


def test_a_call_is_awaited_where_its_batcher_is() -> None:
    """On another event loop a call is refused, instead of waiting for ever there and harming its own."""

    async def main() -> None:
        device = FakeDevice(held=True)
        async with Runtime([device]) as runtime, Batcher(double, runtime=runtime) as batcher:
            call = batcher.call_nowait(ONE)
            with pytest.raises(OtherLoopError):
                await asyncio.to_thread(asyncio.run, wait_for(call))
            device.release()
            assert (await call).item() == 2.0

    asyncio.run(main())


def test_a_call_in_two_tasks_has_one_outcome() -> None:
    """Of two tasks made of one call, one gets the result and the other one an error."""

    async def main() -> None:
        async with Runtime("cpu") as runtime, Batcher(double, runtime=runtime) as batcher:
            call = batcher.call_nowait(ONE)
            tasks = [asyncio.create_task(call) for _ in range(2)]
            result, error = await asyncio.gather(*tasks, return_exceptions=True)
            assert result.item() == 2.0
            assert "two tasks" in str(error)

    asyncio.run(main())


def test_a_call_goes_where_coroutines_go() -> None:
    """Tasks, `gather`, `shield`, `as_completed` and `wait` take calls; a cancelled task cancels its call."""

    async def main() -> None:
        async with Runtime("cpu") as runtime, Batcher(double, runtime=runtime) as batcher:

            def call() -> Any:
                return batcher.call_nowait(ONE)

            assert (await asyncio.create_task(call())).item() == 2.0
            assert (await asyncio.shield(call())).item() == 2.0
            assert (await asyncio.wait_for(call(), 30)).item() == 2.0
            assert [each.item() for each in await asyncio.gather(call(), call())] == [2.0, 2.0]
            assert [(await each).item() for each in asyncio.as_completed([call(), call()])] == [2.0, 2.0]
            done, pending = await asyncio.wait([asyncio.create_task(call()) for _ in range(2)])
            assert ({task.result().item() for task in done}, pending) == ({2.0}, set())
            async with asyncio.TaskGroup() as group:
                task = group.create_task(call())
            assert task.result().item() == 2.0
            for num_turns in range(2):  # before and after its first turn
                given_up = call()
                task = asyncio.create_task(given_up)
                for _ in range(num_turns):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert given_up._request.state.value in ("cancelled", "done")
        assert batcher.statistics().num_done + batcher.statistics().num_cancelled == 12

    asyncio.run(main())


async def test_a_large_request_leaves_room_for_small_ones() -> None:
    """Requests of many samples are taken whole, and while as much room stays free, which can be asked."""
    device = FakeDevice(held=True)
    async with Runtime([device]) as runtime, Batcher(double, max_queue=8, runtime=runtime) as batcher:
        running = batcher.call_nowait(ONE)
        await device.wait_issued()
        calls = batcher.call_many_nowait([ONE] * 4)
        with pytest.raises(QueueFullError, match=r"no room for 3 at once \(8\)"):
            batcher.call_many_nowait([ONE] * 3)
        with pytest.raises(QueueFullError, match=r"no room for 3 at once \(8\)"):
            batcher.check_room(3)
        batcher.check_room(2)
        calls += batcher.call_many_nowait([ONE] * 2)
        assert batcher.statistics().num_queued == 6
        calls += [*batcher.call_many_nowait([ONE]), batcher.call_nowait(ONE)]
        with pytest.raises(QueueFullError, match=r"full \(8\)"):
            batcher.call_many_nowait([ONE])
        assert batcher.statistics().num_refused == 7
        device.release()
        assert [(await call).item() for call in [running, *calls]] == [2.0] * 9
        assert batcher.call_many_nowait([]) == []
        assert len(batcher.call_many_nowait([ONE] * 8)) == 8  # the queue is empty


async def test_a_request_with_a_mistake_queues_nothing() -> None:
    """A sample that cannot be measured, too many of them or no list of samples: nothing was queued."""
    async with (
        Runtime("cpu") as runtime,
        Batcher(double, max_queue=2, size_of=len, runtime=runtime) as batcher,
    ):
        with pytest.raises(TypeError):
            batcher.call_many_nowait([torch.zeros(2), ONE])
        with pytest.raises(ValueError, match="never fit"):
            batcher.call_many_nowait([torch.zeros(2)] * 3)
        with pytest.raises(ValueError, match="never fit"):
            batcher.check_room(3)
        with pytest.raises(ValueError, match="priority"):
            batcher.call_many_nowait([torch.zeros(2)], priority="1")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="got a str"):
            batcher.call_many_nowait("ab")
        assert batcher.statistics().num_queued == 0
    assert outcomes(batcher.statistics()) == (0, 0, 0, 0)
