"""`DataParallel.map` when the engine, the source or the reader goes wrong: nothing is lost, all is closed."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from torch import nn

from asyncdp import DataParallel, Runtime
from asyncdp.errors import DeviceLostError
from asyncdp.testing.fake import FakeDevice, fake_devices

pytestmark = pytest.mark.anyio

NOT_OURS = [asyncio.CancelledError, GeneratorExit]


class Bang(Exception):
    pass


class Raising(nn.Module):
    """Doubles a batch, but raises what it was given for a negative one."""

    def __init__(self, error: Callable[[], BaseException] = Bang) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            raise self.error()
        return x * 2


def batches(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


class Source:
    """An iterator, of either kind, that gives some batches, then raises, and notes that it was closed."""

    def __init__(self, values: list[torch.Tensor], error: BaseException | None = None) -> None:
        self.values = values
        self.error = error
        self.num_read = 0
        self.num_closed = 0

    def sync(self) -> Iterator[torch.Tensor]:
        return _SyncSource(self)

    def asynchronous(self) -> AsyncIterator[torch.Tensor]:
        return _AsyncSource(self)

    def next(self, end: BaseException) -> torch.Tensor:
        self.num_read += 1
        if self.num_read <= len(self.values):
            return self.values[self.num_read - 1]
        raise self.error or end


class _SyncSource:
    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> _SyncSource:
        return self

    def __next__(self) -> torch.Tensor:
        return self.source.next(StopIteration())

    def close(self) -> None:
        self.source.num_closed += 1


class _AsyncSource:
    def __init__(self, source: Source) -> None:
        self.source = source

    def __aiter__(self) -> _AsyncSource:
        return self

    async def __anext__(self) -> torch.Tensor:
        await anyio.lowlevel.checkpoint()
        return self.source.next(StopAsyncIteration())

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.source.num_closed += 1


kinds = pytest.mark.parametrize("kind", ["sync", "asynchronous"])


@pytest.mark.parametrize("error", NOT_OURS)
async def test_a_cancellation_that_the_engine_raises_is_its_batchs_error(error: type[BaseException]) -> None:
    """What looks like a cancellation but comes from the engine goes by the policy; no other batch is lost."""
    values = batches(1.0, -1.0, 3.0)
    async with DataParallel(Raising(error), "cpu*2") as engine:
        results = engine.map(values)
        assert (await anext(results)).item() == 2.0
        with pytest.raises(error):
            await anext(results)
        assert [result.item() async for result in engine.map(values, on_error="skip")] == [2.0, 6.0]
        kept = [result async for result in engine.map(values, on_error="return")]
        assert isinstance(kept[1], error)
        assert [kept[0].item(), kept[2].item()] == [2.0, 6.0]


@pytest.mark.parametrize("of_source", [False, True])
async def test_no_error_passes_for_the_end_of_the_stream(of_source: bool) -> None:
    """A batch, or a source, that raises `StopAsyncIteration` fails: the results after it are not lost."""

    def source() -> Iterator[torch.Tensor]:
        yield from batches(1.0)
        if of_source:
            raise StopAsyncIteration
        yield from batches(-1.0, 3.0)

    async with DataParallel(Raising(StopAsyncIteration), "cpu") as engine:
        results = engine.map(source())
        assert (await anext(results)).item() == 2.0
        with pytest.raises(RuntimeError, match="raised StopAsyncIteration") as caught:
            await anext(results)
        assert isinstance(caught.value.__cause__, StopAsyncIteration)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("on_error", ["skip", "return"])
async def test_no_policy_holds_up_the_end_of_the_program(error: type[BaseException], on_error: Any) -> None:
    """KeyboardInterrupt and SystemExit of a batch are raised, whatever the policy."""
    async with DataParallel(Raising(error), "cpu") as engine:
        with pytest.raises(error):
            async for _ in engine.map(batches(-1.0), on_error=on_error):
                pass


async def test_batches_that_cannot_begin_are_failures_too() -> None:
    """With every device lost, each batch has its error, by the policy."""
    devices = fake_devices(2)
    async with Runtime(devices) as runtime, DataParallel(Raising(), runtime=runtime) as engine:
        for device in devices:
            device.lose()
        for _ in devices:
            with pytest.raises(RuntimeError, match="lost"):
                await engine.on_one_lane(torch.ones(1))
        kept = [result async for result in engine.map(batches(1.0, 2.0), on_error="return")]
        assert [type(result) for result in kept] == [DeviceLostError, DeviceLostError]


async def test_errors_on_the_way_to_a_lane_are_failures_too() -> None:
    """A batch whose task cannot even be made has its error, by the policy."""
    async with DataParallel(Raising(), "cpu") as engine:
        kept = [result async for result in engine.map([{1: 2}, *batches(1.0)], on_error="return")]
        assert [type(result) for result in kept] == [TypeError, torch.Tensor]
        with pytest.raises(TypeError, match="key 1 is no string"):
            await anext(engine.map([{1: 2}]))


@kinds
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("on_error", ["raise", "skip", "return"])
@pytest.mark.parametrize("error", [Bang, KeyboardInterrupt, *NOT_OURS])
async def test_errors_of_the_source_end_the_stream(
    kind: str, ordered: bool, on_error: Any, error: type[BaseException]
) -> None:
    """No policy hides an error of the source, and no result of what it gave before is lost."""
    slow, quick = fake_devices(2)
    slow.hold()
    source = Source(batches(1.0, 2.0), error())
    async with Runtime([slow, quick]) as runtime, DataParallel(Raising(), runtime=runtime) as engine:
        results = engine.map(getattr(source, kind)(), ordered=ordered, on_error=on_error)
        if not ordered:
            found = [(await anext(results)).item()]
            await anyio.wait_all_tasks_blocked()  # by now the source has failed
            slow.release()
        else:
            slow.release()
            found = [(await anext(results)).item()]
        found.append((await anext(results)).item())
        with pytest.raises(error) as caught:
            await anext(results)
        with pytest.raises(StopAsyncIteration):
            await anext(results)
    assert sorted(found) == [2.0, 4.0]
    assert caught.value is source.error
    assert source.num_closed == 1


@kinds
async def test_a_source_that_does_not_begin_ends_the_stream(kind: str) -> None:
    """An error of the iterable when an iterator is made of it is the source's as well."""

    class Sync:
        def __iter__(self) -> Any:
            raise Bang

    class Asynchronous:
        def __aiter__(self) -> Any:
            raise Bang

    source: Any = Sync() if kind == "sync" else Asynchronous()
    async with DataParallel(Raising(), "cpu") as engine:
        with pytest.raises(Bang):
            await anext(engine.map(source, on_error="skip"))


async def test_iterators_are_made_on_a_thread() -> None:
    """Making an iterator may take long (a DataLoader starts processes), so the loop does not do it."""
    made_by: list[threading.Thread] = []

    class Loader:
        def __iter__(self) -> Iterator[torch.Tensor]:
            made_by.append(threading.current_thread())
            return iter(batches(1.0))

    async with DataParallel(Raising(), "cpu") as engine:
        assert [result.item() async for result in engine.map(Loader())] == [2.0]
    assert made_by
    assert made_by[0] is not threading.current_thread()


@kinds
async def test_a_source_that_begins_anew_does(kind: str) -> None:
    """What is its own iterator is still asked for one: loaders begin anew that way."""

    class Loader:
        left = 0

        def __iter__(self) -> Any:
            self.left = 3
            return self

        def __next__(self) -> torch.Tensor:
            if self.left == 0:
                raise StopIteration
            self.left -= 1
            return torch.ones(1)

    class AsyncLoader(Loader):
        def __aiter__(self) -> Any:
            self.left = 3
            return self

        async def __anext__(self) -> torch.Tensor:
            if self.left == 0:
                raise StopAsyncIteration
            return super().__next__()

    loader: Any = Loader() if kind == "sync" else AsyncLoader()
    async with DataParallel(Raising(), "cpu") as engine:
        for _ in range(2):
            assert len([result async for result in engine.map(loader)]) == 3


@kinds
async def test_closing_waits_although_the_scope_is_cancelled(kind: str) -> None:
    """A block that is left by a cancellation waits until the lanes have drained and the source is closed."""
    device = FakeDevice(held=True)
    source = Source(batches(*range(50)))
    left = False

    async def read(scope: anyio.CancelScope) -> None:
        nonlocal left
        with scope:
            async with engine.map(getattr(source, kind)()) as results:
                await anext(results)
        left = True
        assert (device.num_pending, source.num_closed) == (0, 1)

    async with Runtime([device]) as runtime, DataParallel(Raising(), runtime=runtime) as engine:
        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope()
            group.start_soon(read, scope)
            await device.wait_issued()
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            assert not left
            device.release()
        assert left


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_closing_waits_although_the_task_is_cancelled() -> None:
    """A task of asyncio's own, cancelled while it closes a stream, ends once everything is closed."""
    device = FakeDevice(held=True)
    source = Source(batches(*range(50)))

    async def read() -> None:
        async with engine.map(source.sync()) as results:
            await anext(results)

    async with Runtime([device]) as runtime, DataParallel(Raising(), runtime=runtime) as engine:
        task = asyncio.create_task(read())
        await device.wait_issued()
        for _ in range(3):
            task.cancel()
            await anyio.wait_all_tasks_blocked()
        assert not task.done()
        device.release()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (device.num_pending, source.num_closed) == (0, 1)


async def test_a_source_that_is_being_read_is_closed_afterwards() -> None:
    """A stream that is left while a thread reads the source lets it end, then closes the source."""
    entered, may_go_on = threading.Event(), threading.Event()
    closed: list[bool] = []

    def source() -> Iterator[torch.Tensor]:
        try:
            yield torch.tensor([1.0])
            entered.set()
            assert may_go_on.wait(30)
            yield torch.tensor([2.0])
        finally:
            closed.append(True)

    async with DataParallel(Raising(), "cpu") as engine:
        async with anyio.create_task_group() as group:
            results = engine.map(source())
            assert (await anext(results)).item() == 2.0
            await anyio.to_thread.run_sync(entered.wait)
            group.start_soon(results.aclose)
            await anyio.wait_all_tasks_blocked()
            assert not closed
            may_go_on.set()
        assert closed == [True]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_stream_that_others_cancel_does_not_just_end() -> None:
    """Who cancels all tasks of a loop does not make a stream look as if it were complete."""
    device = FakeDevice()
    async with Runtime([device]) as runtime, DataParallel(Raising(), runtime=runtime) as engine:
        others = asyncio.all_tasks()
        results = engine.map(batches(*range(50)))
        await anext(results)
        for task in asyncio.all_tasks() - others:
            task.cancel()
        with pytest.raises(RuntimeError, match="cancelled"):
            async for _ in results:
                pass
        with pytest.raises(StopAsyncIteration):
            await anext(results)


@kinds
async def test_errors_of_closing_come_out_of_the_block(kind: str) -> None:
    """What the source raises when it is closed early is told to whoever waits for that."""
    source = Source(batches(*range(50)))

    def close() -> None:
        raise Bang

    async def aclose() -> None:
        raise Bang

    iterator: Any = getattr(source, kind)()
    iterator.close, iterator.aclose = close, aclose
    async with DataParallel(Raising(), "cpu") as engine:
        with pytest.raises(Bang):
            async with engine.map(iterator) as results:
                await anext(results)
        assert (await engine(torch.ones(1))).item() == 2.0


@kinds
async def test_a_stream_that_is_never_read_closes_its_source(kind: str) -> None:
    """A block that is left before the first result closes the source too, without reading from it."""
    source = Source(batches(1.0))
    async with DataParallel(Raising(), "cpu") as engine:
        async with engine.map(getattr(source, kind)()) as results:
            pass
        await results.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(results)
    assert (source.num_read, source.num_closed) == (0, 1)


async def test_several_tasks_may_read_one_stream() -> None:
    """Workers that share a stream get each result once, and all of them its end."""
    found: list[float] = []
    async with DataParallel(Raising(), "cpu*2") as engine:
        results = engine.map(batches(*range(20)))

        async def work() -> None:
            async for result in results:
                found.append(result.item())
                await anyio.lowlevel.checkpoint()

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(work)
    assert sorted(found) == [2.0 * n for n in range(20)]


@pytest.mark.parametrize("origin", ["engine", "source"])
async def test_errors_are_kept_alive_by_nobody(origin: str) -> None:
    """Once handled, an error of a batch or of the source is gone without a garbage collection."""
    errors: list[weakref.ref[BaseException]] = []

    def source() -> Iterator[torch.Tensor]:
        yield from batches(1.0, -1.0) if origin == "engine" else batches(1.0)
        raise Bang

    async def read() -> None:
        try:
            async for _ in engine.map(source()):
                pass
        except Bang as error:
            errors.append(weakref.ref(error))

    async with DataParallel(Raising(), "cpu") as engine:
        gc.collect()
        gc.disable()
        try:
            await read()
            await engine(torch.ones(1))
            with anyio.fail_after(5):  # the thread that read lets go of it a moment later
                while errors[0]() is not None:
                    await anyio.lowlevel.checkpoint()
        finally:
            gc.enable()


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
async def test_limits_are_whole_numbers(limit: Any) -> None:
    """A limit that would never be met exactly is refused."""
    async with DataParallel(Raising(), "cpu") as engine:
        with pytest.raises(ValueError, match="max_in_flight must be 1 or more, an int, but got"):
            engine.map([], max_in_flight=limit)
