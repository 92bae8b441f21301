"""`DataParallel.map`: ordered or not, bounded, with a policy for errors, closed when left."""

from __future__ import annotations

import contextvars
import gc
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
import torch
from torch import nn

from asyncdp import Batcher, DataParallel, PerRow, Runtime
from asyncdp.testing.fake import FakeDevice, fake_devices

pytestmark = pytest.mark.anyio


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            raise ValueError("negative")
        return x * 2


def numbers(count: int) -> list[torch.Tensor]:
    return [torch.tensor([float(n)]) for n in range(count)]


class Source:
    """A source that counts what was read and notices that it was closed."""

    def __init__(self, values: list[torch.Tensor]) -> None:
        self.values = values
        self.num_read = 0
        self.closed = anyio.Event()

    def sync(self) -> Iterator[torch.Tensor]:
        for value in self.values:
            self.num_read += 1
            yield value

    async def asynchronous(self) -> AsyncIterator[torch.Tensor]:
        try:
            for value in self.values:
                await anyio.lowlevel.checkpoint()
                self.num_read += 1
                yield value
        finally:
            self.closed.set()


@pytest.mark.parametrize("kind", ["list", "sync", "asynchronous"])
async def test_results_come_in_order(kind: str) -> None:
    """Every kind of source gives its results in its own order."""
    values = numbers(20)
    source: Any = values if kind == "list" else getattr(Source(values), kind)()
    async with DataParallel(Double(), "cpu*2") as engine:
        results = [result.item() async for result in engine.map(source)]
    assert results == [2.0 * n for n in range(20)]


async def test_a_batch_holds_arguments() -> None:
    """A dict holds keyword arguments, a tuple positional ones, anything else is the only argument."""

    class Arguments(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    batches = [{"position": 1, "y": 2}, OrderedDict(y=2), (1, 2), [1, 2], (), 3]
    async with DataParallel(Arguments(), "cpu*2") as engine:
        assert [result async for result in engine.map(batches)] == [
            ((), {"position": 1, "y": 2}),
            ((OrderedDict(y=2),), {}),
            ((1, 2), {}),
            (([1, 2],), {}),
            ((), {}),
            ((3,), {}),
        ]
        with pytest.raises(TypeError, match=r"key 1 is no string. Put the dict into a tuple"):
            await anext(engine.map([{1: 2}]))


async def test_unordered_gives_what_is_ready() -> None:
    """With `ordered=False` a result does not wait for an earlier batch that runs longer."""
    slow, quick = fake_devices(2)
    slow.hold()
    async with Runtime([slow, quick]) as runtime, DataParallel(Double(), runtime=runtime) as engine:
        results = engine.map(numbers(2), ordered=False, max_in_flight=2)
        first = (await anext(results)).item()
        slow.release()
        assert sorted([first, (await anext(results)).item()]) == [0.0, 2.0]
        with pytest.raises(StopAsyncIteration):
            await anext(results)


async def test_reading_ahead_is_bounded() -> None:
    """No more than `max_in_flight` batches are read before a result is taken."""
    source = Source(numbers(10))
    async with DataParallel(Double(), "cpu*2") as engine:
        async with engine.map(source.asynchronous(), max_in_flight=3) as results:
            await anext(results)
            await anyio.wait_all_tasks_blocked()
            assert source.num_read <= 4
        assert source.closed.is_set()


async def test_error_policies() -> None:
    """`raise` ends the stream at the bad batch, `skip` leaves it out, `return` hands it over."""
    values = [torch.tensor([value]) for value in (1.0, -1.0, 3.0)]
    async with DataParallel(Double(), "cpu*2") as engine:
        results = engine.map(values)
        assert (await anext(results)).item() == 2.0
        with pytest.raises(ValueError, match="negative"):
            await anext(results)
        with pytest.raises(StopAsyncIteration):
            await anext(results)
        assert [result.item() async for result in engine.map(values, on_error="skip")] == [2.0, 6.0]
        kept = [result async for result in engine.map(values, on_error="return")]
        assert isinstance(kept[1], ValueError)
        assert kept[2].item() == 6.0


async def test_source_errors_take_their_turn() -> None:
    """A source that fails does so behind the results of what it gave before."""

    def source() -> Iterator[torch.Tensor]:
        yield torch.tensor([1.0])
        raise OSError("disk")

    async with DataParallel(Double(), "cpu*2") as engine:
        results = engine.map(source(), on_error="raise")
        assert (await anext(results)).item() == 2.0
        with pytest.raises(OSError, match="disk"):
            await anext(results)


async def test_break_closes_everything() -> None:
    """A loop that is left closes the source, although nobody said so."""
    source = Source(numbers(50))
    async with DataParallel(Double(), "cpu*2") as engine:
        async for _ in engine.map(source.asynchronous()):
            break
        gc.collect()
        await source.closed.wait()
        assert source.num_read < 50
        assert (await engine(torch.ones(2))).tolist() == [2.0, 2.0]


class Batches:
    """An iterator that has no end but its own, as that of a DataLoader with workers."""

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> torch.Tensor:
        return torch.ones(2)


async def test_a_source_that_is_left_is_dropped_at_once() -> None:
    """Without waiting for a garbage collection, and although the stream is still there."""
    batches = Batches()
    dropped = weakref.ref(batches)
    async with DataParallel(Double(), "cpu") as engine:
        stream = engine.map(batches)
        del batches
        gc.disable()
        try:
            async with stream as results:
                assert (await anext(results)).tolist() == [2.0, 2.0]
            assert dropped() is None
        finally:
            gc.enable()


async def test_cancellation_drains() -> None:
    """A cancelled reader waits until the device is done with its batches."""
    device = FakeDevice(held=True)
    source = Source(numbers(50))
    async with Runtime([device]) as runtime, DataParallel(Double(), runtime=runtime) as engine:
        async with anyio.create_task_group() as group:

            async def read() -> None:
                with anyio.CancelScope() as scope:
                    results = engine.map(source.asynchronous())
                    scopes.append(scope)
                    await anext(results)
                with anyio.CancelScope(shield=True):
                    await results.aclose()
                assert device.num_pending == 0

            scopes: list[anyio.CancelScope] = []
            group.start_soon(read)
            await device.wait_issued()
            scopes[0].cancel()
            device.release()
        assert source.closed.is_set()


async def test_modes_are_those_of_the_call() -> None:
    """Grad mode is noted when `map` is called, so that no mode need be held over an await."""
    module = nn.Linear(1, 1)
    async with DataParallel(module, "cpu*2") as engine:
        with torch.no_grad():
            without = engine.map(numbers(2))
        assert [result.requires_grad async for result in without] == [False, False]
        assert [result.requires_grad async for result in engine.map(numbers(1))] == [True]


async def test_mistakes_are_told_at_once() -> None:
    """Wrong arguments are refused by the call, not by the loop."""
    async with DataParallel(Double(), "cpu") as engine:
        with pytest.raises(TypeError, match="but got int"):
            engine.map(7)  # type: ignore[arg-type]
        ones = torch.ones(2)
        for batch in (ones, ones.numpy(), {"x": ones}, PerRow(["a", "b"]), "text", b"text"):
            with pytest.raises(TypeError, match="Wrap a single batch in a list"):
                engine.map(batch)
        with pytest.raises(ValueError, match="on_error"):
            engine.map([], on_error="ignore")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="max_in_flight"):
            engine.map([], max_in_flight=0)


async def test_every_way_of_running_a_batch_counts_as_a_pass() -> None:
    """Calls, whole batches, streams and a batcher's batches count as passes of an engine; failures do not."""
    async with DataParallel(Double(), "cpu*2") as engine, Batcher(engine) as batcher:
        await engine(torch.ones(4))
        await engine.on_one_lane(torch.ones(4))
        assert len([result async for result in engine.map(numbers(3))]) == 3
        await batcher(torch.ones(1))
        with pytest.raises(ValueError, match="negative"):
            await engine(-torch.ones(4))
        assert engine.statistics().num_passes == 6


async def test_other_modes_and_context_are_those_of_the_call_too() -> None:
    """Autocast and context variables are those of the call of `map`; a batch sets nothing for the next."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    found: list[tuple[str, bool]] = []

    class Noting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.append((variable.get(), torch.is_autocast_enabled("cpu")))
            variable.set("set by a batch")
            return x

    async with DataParallel(Noting(), "cpu") as engine:
        variable.set("at the call")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = engine.map(numbers(2))
        variable.set("later")
        assert len([result async for result in results]) == 2
    assert found == [("at the call", True)] * 2


async def test_many_batches_at_once_leave_the_loop_its_turns() -> None:
    """However many batches may be in flight, other tasks run while they are started."""
    num_turns = 0
    read_in: list[int] = []

    class Watched(list[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            for value in super().__iter__():
                read_in.append(num_turns)
                yield value

    async def turn() -> None:
        nonlocal num_turns
        while True:
            await anyio.lowlevel.checkpoint()
            num_turns += 1

    async with DataParallel(Double(), "cpu") as engine, anyio.create_task_group() as group:
        group.start_soon(turn)
        results = [result.item() async for result in engine.map(Watched(numbers(1000)), max_in_flight=1000)]
        group.cancel_scope.cancel()
    assert results == [2.0 * n for n in range(1000)]
    assert len(set(read_in)) > 10


@pytest.mark.parametrize(("device", "most"), [(FakeDevice, 2), ("cpu", 8)])
async def test_quick_batches_are_read_further_ahead(device: Any, most: int) -> None:
    """Two batches per lane are in flight, and eight once they are known to take less than a millisecond."""
    ahead: list[int] = []
    source = Source(numbers(300))
    devices = device if isinstance(device, str) else [device()]  # which never says how long its tasks take
    async with Runtime(devices) as runtime, DataParallel(Double(), runtime=runtime) as engine:
        async for _ in engine.map(source.asynchronous()):
            ahead.append(source.num_read - len(ahead))
    assert max(ahead) <= most
    assert (max(ahead) > 2) == (most > 2)
