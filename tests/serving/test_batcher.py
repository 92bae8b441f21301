"""A batcher: every caller gets its own outcome, and nobody is hurt by a neighbour."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch
from torch import nn

from asyncdp import Batcher, DataParallel, Runtime
from asyncdp.errors import (
    BatcherClosedError,
    CallTimeoutError,
    DeviceLostError,
    EngineCancelledError,
    NotServableError,
    QueueFullError,
    SplitError,
)
from asyncdp.testing.fake import FakeDevice, Fault, fake_devices

pytestmark = pytest.mark.anyio


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def refuse_negative(x: torch.Tensor) -> torch.Tensor:
    if (x < 0).any():
        raise ValueError("negative")
    return x * 2


async def outcome_of(call: Any) -> Any:
    """The result of a call, or its exception."""
    try:
        return (await call).item()
    except Exception as error:
        return error


async def call_all(batcher: Batcher, values: list[float], **options: Any) -> list[Any]:
    """Call at the same time; give results, or the exceptions in their places."""
    outcomes: list[Any] = [None] * len(values)

    async def call(position: int) -> None:
        outcomes[position] = await outcome_of(batcher(torch.tensor(values[position]), **options))

    async with anyio.create_task_group() as group:
        for position in range(len(values)):
            group.start_soon(call, position)
    return outcomes


async def test_everyone_gets_their_own_result() -> None:
    """Samples that arrive together run in one batch per lane, and results find their callers."""
    async with Runtime("cpu*2") as runtime, Batcher(double, runtime=runtime) as batcher:
        calls = [batcher.call_nowait(torch.tensor(float(n))) for n in range(16)]
        assert [(await call).item() for call in calls] == [2.0 * n for n in range(16)]
        stats = batcher.statistics()
    assert (stats.num_done, stats.num_failed, stats.num_queued, stats.num_running) == (16, 0, 0, 0)
    assert stats.num_batches == 2
    assert stats.batch_fill == 0.25
    assert stats.wait.p50 <= stats.wait.longest
    assert stats.run.p99 > 0


async def test_engine_runs_whole_batches() -> None:
    """Over an engine every result equals the module's own, without a graph behind it."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    samples = torch.randn(10, 3)
    results: list[Any] = [None] * 10

    async def call(position: int) -> None:
        results[position] = await batcher(samples[position])

    for devices in ("cpu", "cpu*2"):
        async with (
            DataParallel(module, devices) as engine,
            Batcher(engine, max_batch_size=4) as batcher,
            anyio.create_task_group() as group,
        ):
            for position in range(10):
                group.start_soon(call, position)
        assert torch.allclose(torch.stack(results), module(samples), atol=1e-6)
        assert not any(result.requires_grad for result in results)


async def test_engine_over_fake_devices() -> None:
    """An engine on a runtime of its own devices serves too."""
    module = nn.Linear(3, 2)
    async with (
        Runtime(fake_devices(2)) as runtime,
        DataParallel(module, runtime=runtime) as engine,
        Batcher(engine) as batcher,
    ):
        assert torch.allclose(await batcher(torch.ones(3)), module(torch.ones(3)))


async def test_async_function_is_awaited() -> None:
    """An async callable runs on the loop, with a batch that was made on a lane."""

    async def engine(x: torch.Tensor) -> torch.Tensor:
        await anyio.lowlevel.checkpoint()
        return x + 1

    async with Runtime("cpu") as runtime, Batcher(engine, runtime=runtime) as batcher:
        assert await call_all(batcher, [1.0, 2.0]) == [2.0, 3.0]


async def test_own_collate_and_split() -> None:
    """A tuple from `collate` means positional arguments; `split` sees output and samples."""
    async with (
        Runtime("cpu") as runtime,
        Batcher(
            lambda texts, times: [text * times for text in texts],
            collate=lambda samples: (samples, 2),
            split=lambda output, samples: list(zip(output, samples, strict=True)),
            runtime=runtime,
        ) as batcher,
    ):
        assert await batcher("ab") == ("abab", "ab")


class Scale(nn.Module):
    """Has parameters of its own names for its two inputs."""

    def forward(self, x: torch.Tensor, *, times: torch.Tensor) -> torch.Tensor:
        return x * times


@pytest.mark.parametrize("kind", ["function", "async function", "engine"])
async def test_a_dict_holds_keyword_arguments(kind: str) -> None:
    """A dict sample is stacked key by key, and names the arguments of whatever runs the batch."""
    module = Scale()

    async def awaited(x: torch.Tensor, *, times: torch.Tensor) -> torch.Tensor:
        return module(x, times=times)

    async with Runtime("cpu*2") as runtime:
        engine: Any = {
            "function": module,
            "async function": awaited,
            "engine": DataParallel(module, runtime=runtime),
        }[kind]
        async with Batcher(engine, runtime=runtime) as batcher:
            calls = [batcher.call_nowait({"times": n, "x": torch.tensor(2.0)}) for n in range(4)]
            assert [(await call).item() for call in calls] == [0.0, 2.0, 4.0, 6.0]


async def test_a_dict_with_other_keys_is_refused() -> None:
    """A dict whose keys are no names cannot be keyword arguments, and the caller gets the remedy."""
    async with Runtime("cpu") as runtime, Batcher(double, runtime=runtime) as batcher:
        with pytest.raises(TypeError, match=r"key 1 is no str.*ut the dict in"):
            await batcher({1: torch.tensor(1.0)})


async def test_any_engine_may_offer_its_lanes() -> None:
    """What has the hook of an engine runs every batch whole, on the lane that the batcher chose."""

    class Engine:
        def __init__(self, runtime: Runtime) -> None:
            self.runtime, self.lanes = runtime, runtime.lanes
            self.seen: list[int] = []

        def __asyncdp_lane_runner__(self) -> Engine:
            return self

        def run_on(self, position: int, /, x: torch.Tensor) -> torch.Tensor:
            assert threading.current_thread().name.endswith(self.lanes[position].name)
            self.seen.append(position)
            return x * 2

    async with Runtime("cpu*2") as runtime:
        engine: Any = Engine(runtime)
        async with Batcher(engine, max_batch_size=2) as batcher:
            assert await call_all(batcher, [1.0, 2.0, 3.0, 4.0]) == [2.0, 4.0, 6.0, 8.0]
        assert set(engine.seen) <= {0, 1}


async def test_lengths_are_padded_and_counted() -> None:
    """`pad` fills shorter samples; statistics show how much of the batches was padding."""
    async with (
        Runtime("cpu") as runtime,
        Batcher(lambda x: x.sum(1), pad=0.0, size_of=len, max_padding=1.0, runtime=runtime) as batcher,
    ):
        first = batcher.call_nowait(torch.ones(1))
        second = batcher.call_nowait(torch.ones(3))
        assert [(await first).item(), (await second).item()] == [1.0, 3.0]
        assert batcher.statistics().padding_waste == pytest.approx(1 - 4 / 6)


async def test_one_of_eight_cancelled() -> None:
    """A caller that leaves a running batch harms none of the seven others."""
    device = FakeDevice(held=True)
    results: dict[int, float] = {}

    async def call(number: int) -> None:
        results[number] = (await batcher(torch.tensor(float(number)))).item()

    async with Runtime([device]) as runtime, Batcher(double, runtime=runtime) as batcher:
        async with anyio.create_task_group() as group, anyio.create_task_group() as other:
            for number in range(8):
                (other if number == 3 else group).start_soon(call, number)
            await device.wait_issued()
            other.cancel_scope.cancel()
            device.release()
        assert results == {number: 2.0 * number for number in range(8) if number != 3}
        stats = batcher.statistics()
        assert (stats.num_done, stats.num_cancelled) == (7, 1)


async def test_cancelled_call_leaves_the_queue() -> None:
    """A call cancelled while it waits never runs, and frees its place at once."""
    device = FakeDevice(held=True)
    seen: list[int] = []

    def engine(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x

    async with Runtime([device]) as runtime, Batcher(engine, max_queue=1, runtime=runtime) as batcher:
        running = batcher.call_nowait(torch.tensor(0.0))
        await device.wait_issued()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await batcher(torch.tensor(1.0))
        assert batcher.statistics().num_queued == 0
        last = batcher.call_nowait(torch.tensor(2.0))
        device.release()
        await running
        assert (await last).item() == 2.0
    assert seen == [1, 1]


async def test_one_poison_of_eight() -> None:
    """Only the caller of the bad sample sees the exception."""
    async with Runtime("cpu") as runtime, Batcher(refuse_negative, runtime=runtime) as batcher:
        outcomes = await call_all(batcher, [0, 1, 2, -3, 4, 5, 6, 7])
        poisoned = outcomes.pop(3)
        assert isinstance(poisoned, ValueError)
        assert outcomes == [0, 2, 4, 8, 10, 12, 14]
        stats = batcher.statistics()
        assert (stats.num_failed, stats.num_done) == (1, 7)
        # Trio starts tasks in any order: the bad sample may have been the one that went ahead alone.
        assert stats.num_retried <= 1
        assert await call_all(batcher, [8]) == [16]


async def test_engine_works_on_after_an_exception() -> None:
    """An exception in forward leaves the next call working."""

    class Fussy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return refuse_negative(x)

    async with DataParallel(Fussy(), "cpu*2") as engine, Batcher(engine) as batcher:
        for _ in range(3):
            with pytest.raises(ValueError, match="negative"):
                await batcher(torch.tensor(-1.0))
            assert (await batcher(torch.tensor(2.0))).item() == 4.0


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
async def test_base_exceptions_reach_their_caller(kind: type[BaseException]) -> None:
    """What ends a process reaches one caller, as an error; StopIteration hangs nobody."""

    def engine(x: torch.Tensor) -> torch.Tensor:
        if (x == 1).any():
            raise kind(3)
        if (x == 2).any():
            raise StopIteration
        return x

    async with Runtime("cpu") as runtime, Batcher(engine, runtime=runtime) as batcher:
        good = batcher.call_nowait(torch.tensor(0.0))
        bad = batcher.call_nowait(torch.tensor(1.0))
        worse = batcher.call_nowait(torch.tensor(2.0))
        assert (await good).item() == 0.0
        with pytest.raises(EngineCancelledError, match=kind.__name__) as caught:
            await bad
        assert isinstance(caught.value.__cause__, kind)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await worse


async def test_nowait_refuses_and_await_waits() -> None:
    """A full queue refuses `call_nowait` at once and makes awaited calls wait."""
    device = FakeDevice(held=True)
    async with Runtime([device]) as runtime, Batcher(double, max_queue=2, runtime=runtime) as batcher:
        first = batcher.call_nowait(torch.tensor(1.0))
        await device.wait_issued()
        queued = [batcher.call_nowait(torch.tensor(float(n))) for n in (2, 3)]
        with pytest.raises(QueueFullError, match=r"full \(2\)"):
            batcher.call_nowait(torch.tensor(4.0))
        async with anyio.create_task_group() as group:
            group.start_soon(batcher, torch.tensor(5.0))
            await anyio.wait_all_tasks_blocked()
            assert batcher.statistics().num_outside == 1
            device.release()
        assert [(await call).item() for call in (first, *queued)] == [2.0, 4.0, 6.0]
        assert batcher.statistics().num_refused == 1


async def test_timeout_is_the_callers_own() -> None:
    """A call times out whether it waits or runs; those beside it get their results."""
    device = FakeDevice(held=True)
    async with Runtime([device]) as runtime, Batcher(double, timeout=30.0, runtime=runtime) as batcher:
        patient = batcher.call_nowait(torch.tensor(1.0))
        with pytest.raises(CallTimeoutError, match=r"0\.01 s"):
            await batcher(torch.tensor(2.0), timeout=0.01)
        await device.wait_issued()
        with pytest.raises(TimeoutError):
            await batcher(torch.tensor(3.0), timeout=0.01)
        device.release()
        assert (await patient).item() == 2.0
        stats = batcher.statistics()
        assert (stats.num_timed_out, stats.num_cancelled) == (2, 0)


async def test_priority_goes_first() -> None:
    """Of what waits, the higher priority runs first."""
    device = FakeDevice(held=True)
    order: list[float] = []

    def engine(x: torch.Tensor) -> torch.Tensor:
        order.extend(x.tolist())
        return x

    async with Runtime([device]) as runtime, Batcher(engine, max_batch_size=1, runtime=runtime) as batcher:
        calls = [batcher.call_nowait(torch.tensor(0.0))]
        await device.wait_issued()
        calls += [batcher.call_nowait(torch.tensor(float(n)), priority=n) for n in (1, 3, 2)]
        device.release()
        for call in calls:
            await call
    assert order == [0.0, 3.0, 2.0, 1.0]


async def test_max_wait_fills_a_batch() -> None:
    """With `max_wait` a batch leaves when it is full, or when its time has come."""
    async with (
        Runtime("cpu") as runtime,
        Batcher(double, max_batch_size=2, max_wait=0.02, runtime=runtime) as batcher,
    ):
        assert await call_all(batcher, [1, 2]) == [2, 4]
        assert batcher.statistics().wait.longest < 0.02
        assert (await batcher(torch.tensor(3.0))).item() == 6.0
        assert batcher.statistics().wait.longest >= 0.0199
        assert batcher.statistics().num_batches == 2


async def test_leaving_drains() -> None:
    """Leaving the block answers what waits, and refuses what comes later."""
    device = FakeDevice(held=True)
    results: list[float] = []

    async def call(value: float) -> None:
        results.append((await batcher(torch.tensor(value))).item())

    async def leave() -> None:
        async with batcher:
            group.start_soon(call, 1.0)
            await device.wait_issued()
            group.start_soon(call, 2.0)
            while batcher.statistics().num_queued == 0:
                await anyio.lowlevel.checkpoint()

    async with Runtime([device]) as runtime:
        batcher = Batcher(double, max_wait=60.0, max_batch_size=1, runtime=runtime)
        async with anyio.create_task_group() as group:
            group.start_soon(leave)
            while "draining" not in repr(batcher):
                await anyio.lowlevel.checkpoint()
            with pytest.raises(BatcherClosedError, match="draining"):
                batcher.call_nowait(torch.tensor(0.0))
            device.release()
    assert results == [2.0, 4.0]
    with pytest.raises(BatcherClosedError, match="closed"):
        await batcher(torch.tensor(0.0))


async def test_leaving_by_an_exception_fails_what_waits() -> None:
    """The block's own exception comes out bare; calls that waited fail."""
    device = FakeDevice(held=True)
    waiting: list[Any] = []

    async def leave_by_exception() -> None:
        async with Batcher(double, runtime=runtime) as batcher:
            waiting.append(batcher.call_nowait(torch.tensor(1.0)))
            await device.wait_issued()
            waiting.append(batcher.call_nowait(torch.tensor(2.0)))
            device.release()
            raise KeyError

    async with Runtime([device]) as runtime:
        with pytest.raises(KeyError):
            await leave_by_exception()
        assert (await waiting[0]).item() == 2.0
        with pytest.raises(BatcherClosedError, match="left by an exception"):
            await waiting[1]


async def test_cancelled_batcher_leaves_nobody_hanging() -> None:
    """When the owner is cancelled every call has an outcome, and the runtime works on."""
    device = FakeDevice(held=True)
    owners = anyio.CancelScope()
    calls: list[Any] = []

    async def own() -> None:
        with owners:
            async with Batcher(double, runtime=runtime) as batcher:
                calls.append(batcher.call_nowait(torch.tensor(1.0)))
                await device.wait_issued()
                calls.append(batcher.call_nowait(torch.tensor(1.0)))
                await anyio.sleep_forever()

    async with Runtime([device]) as runtime:
        async with anyio.create_task_group() as group:
            group.start_soon(own)
            await anyio.wait_all_tasks_blocked()
            await device.wait_issued()
            await anyio.wait_all_tasks_blocked()
            owners.cancel()
            # Until its batch is cancelled, too.
            await anyio.wait_all_tasks_blocked()
            device.release()
        for call, cause in zip(calls, ("was cancelled", "was left by an exception"), strict=True):
            with pytest.raises(BatcherClosedError, match=cause):
                await call
        assert await runtime.run(lambda: 1) == 1


async def test_lost_lane_fails_its_callers_and_the_rest_goes_on() -> None:
    """Callers on a dead lane fail at once; the other lane serves everybody else."""
    first, second = fake_devices(2)
    first.hold()
    second.hold()
    async with Runtime([first, second]) as runtime, Batcher(double, runtime=runtime) as batcher:
        calls = [batcher.call_nowait(torch.tensor(float(n))) for n in range(4)]
        await first.wait_issued()
        await second.wait_issued()
        first.lose()
        second.release()
        outcomes = [await outcome_of(call) for call in calls]
        lost = [outcome for outcome in outcomes if isinstance(outcome, DeviceLostError)]
        assert ["cpu:0" in str(error) for error in lost] == [True, True]
        assert [outcome for outcome in outcomes if outcome not in lost] in ([0.0, 2.0], [4.0, 6.0])
        assert await call_all(batcher, [1.0, 2.0, 3.0]) == [2.0, 4.0, 6.0]
        assert batcher.statistics().num_lost_slots == 1


async def test_all_lanes_lost_fails_every_call() -> None:
    """With no lane left every call fails instead of hanging, and closing works."""
    async with (
        Runtime(fake_devices(1, faults={(0, 0): Fault.lose()})) as runtime,
        Batcher(double, max_batch_size=1, runtime=runtime) as batcher,
    ):
        outcomes = await call_all(batcher, [1.0, 2.0, 3.0])
        assert [type(outcome) for outcome in outcomes] == [DeviceLostError] * 3
        with pytest.raises(DeviceLostError):
            await batcher(torch.tensor(1.0))


async def test_lane_lost_by_others_is_noticed() -> None:
    """A lane that was lost under another pass takes no batch any more."""
    first, second = fake_devices(2)
    async with Runtime([first, second]) as runtime, Batcher(double, runtime=runtime) as batcher:
        first.lose()
        with pytest.raises(RuntimeError):
            await runtime.run(lambda: None, lane=runtime.lanes[0])
        for value in (1.0, 2.0, 3.0):
            assert await call_all(batcher, [value]) == [2 * value]


async def test_wrong_number_of_results_is_refused() -> None:
    """A `split` of the wrong length fails the calls of the batch instead of mixing their results up."""
    async with (
        Runtime("cpu") as runtime,
        Batcher(double, split=lambda output, samples: [], runtime=runtime) as batcher,
    ):
        with pytest.raises(SplitError, match="0 results"):
            await batcher(torch.tensor(1.0))


async def test_results_are_not_kept() -> None:
    """A batcher keeps neither samples nor results alive."""
    async with Runtime("cpu") as runtime, Batcher(double, runtime=runtime) as batcher:
        sample = torch.ones(2)
        result = await batcher(sample)
        alive = [weakref.ref(sample), weakref.ref(result)]
        del sample, result
        await runtime.run(gc.collect)
        assert [each() for each in alive] == [None, None]


@pytest.mark.parametrize(
    ("make", "error", "cause"),
    [
        (lambda: Batcher(double, max_batch_size=0), ValueError, "max_batch_size must be 1"),
        (lambda: Batcher(double, max_wait=-1), ValueError, "max_wait"),
        (lambda: Batcher(double, max_cost=5), ValueError, "size_of"),
        (lambda: Batcher(double, max_padding=2), ValueError, "from 0 to 1"),
        (lambda: Batcher(double, max_padding="a"), ValueError, "from 0 to 1, but got 'a'"),  # type: ignore[arg-type]
        (lambda: Batcher(double, max_cost="a", size_of=len), ValueError, "max_cost must be"),  # type: ignore[arg-type]
        (lambda: Batcher(double, max_queue=None), ValueError, "max_queue must be 1"),  # type: ignore[arg-type]
        (lambda: Batcher(double, size_of=3), TypeError, "size_of must be a function"),  # type: ignore[arg-type]
        (lambda: Batcher(double, collate=3), TypeError, "collate must be a function"),  # type: ignore[arg-type]
        (lambda: Batcher(double, split=3), TypeError, "split must be a function"),  # type: ignore[arg-type]
        (lambda: Batcher(7), NotServableError, "but got int"),
        (lambda: Batcher(double).call_nowait(1), BatcherClosedError, "batcher is new"),
    ],
)
async def test_mistakes_are_refused_at_once(
    make: Callable[[], object], error: type[Exception], cause: str
) -> None:
    """A wrong argument, or a call before the batcher was entered, is refused with its cause."""
    with pytest.raises(error, match=cause):
        make()


async def test_repr_shows_the_state() -> None:
    """The state and the counts of a batcher show."""
    async with Runtime("cpu") as runtime:
        batcher = Batcher(double, runtime=runtime)
        assert repr(batcher) == "<Batcher new: 0 queued, 0 running, 0 done>"
        async with batcher:
            await batcher(torch.tensor(1.0))
            assert "open: 0 queued" in repr(batcher)
        with pytest.raises(BatcherClosedError, match="only once"):
            async with batcher:
                raise AssertionError
