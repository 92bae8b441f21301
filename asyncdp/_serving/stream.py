"""A stream of batches through an engine: read ahead, bounded, ordered or as they complete."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio
import anyio.to_thread
import torch

from .._parallel_apply import arguments
from .prefetch import Prefetcher
from .tasks import spawn
from .waiter import Waiter, new_waiter

if TYPE_CHECKING:
    from .._data_parallel import DataParallel

ON_ERROR = ("raise", "skip", "return")

_END = object()


class _Outcome(NamedTuple):
    value: Any
    error: BaseException | None = None


class _Shared:
    """What the reader of a stream and the task that fills it share; all on one event loop.

    The task must not refer to the reader: a reader that was dropped in mid-stream is noticed by
    nobody else, and ends the task.
    """

    def __init__(self, max_in_flight: int, ordered: bool) -> None:
        self._room = max_in_flight
        self._ordered = ordered
        self._ready: dict[int, _Outcome] = {}
        self._next = 0
        self._order: deque[int] = deque()  # of completion
        self._ended = False
        self._reader: Waiter | None = None
        self._filler: Waiter | None = None
        self.gone: list[Waiter] = []  # woken when the task has ended

    @property
    def ended(self) -> bool:
        return self._ended

    async def wait_room(self) -> None:
        """Wait until one more batch may be in flight, and count it."""
        while self._room == 0:
            self._filler = new_waiter()
            await self._filler.wait()
        self._room -= 1

    def give_back_room(self) -> None:
        self._room += 1
        if self._filler is not None:
            self._filler.wake()

    def put(self, index: int, outcome: _Outcome) -> None:
        self._ready[index] = outcome
        self._order.append(index)
        self._wake_reader()

    def end(self) -> None:
        self._ended = True
        self._wake_reader()
        for waiter in self.gone:
            waiter.wake()

    async def get(self) -> _Outcome | None:
        """The next outcome, or None at the end of the stream."""
        while True:
            index = self._next if self._ordered else (self._order[0] if self._order else -1)
            if index in self._ready:
                self._next += 1
                if not self._ordered:
                    self._order.popleft()
                self.give_back_room()
                return self._ready.pop(index)
            if self._ended:
                return None
            self._reader = new_waiter()
            await self._reader.wait()

    def _wake_reader(self) -> None:
        if self._reader is not None:
            self._reader.wake()


class BatchStream:
    """The results of `DataParallel.map`: an async iterator, and an async context manager.

    Leaving a loop over it early cancels what is in flight and closes the source. That happens in the
    background; to wait for it, use `async with engine.map(...) as results:` or `aclose()`.
    """

    def __init__(
        self,
        engine: DataParallel,
        batches: Iterable[Any] | AsyncIterable[Any],
        ordered: bool,
        max_in_flight: int,
        on_error: str,
    ) -> None:
        self._shared = _Shared(max_in_flight, ordered)
        self._on_error = on_error
        # Noted here: a mode that is held over an await would leak into other tasks.
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self._fill = partial(_fill, self._shared, engine, batches, modes)
        self._cancel: Callable[[], object] | None = None
        self._closed = False

    def __aiter__(self) -> BatchStream:
        return self

    async def __anext__(self) -> Any:
        if self._closed:
            raise StopAsyncIteration
        if self._cancel is None:
            self._cancel = spawn(self._fill)
            weakref.finalize(self, self._cancel).atexit = False
        while (outcome := await self._shared.get()) is not None:
            if outcome.error is None:
                return outcome.value
            if self._on_error == "return" and isinstance(outcome.error, Exception):
                return outcome.error
            if self._on_error == "raise" or not isinstance(outcome.error, Exception):
                await self.aclose()
                raise outcome.error
        self._closed = True
        raise StopAsyncIteration

    async def __aenter__(self) -> BatchStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is in flight, wait until the lanes have drained, close the source."""
        self._closed = True
        if self._cancel is None or self._shared.ended:
            return
        self._cancel()
        waiter = new_waiter()
        self._shared.gone.append(waiter)
        await waiter.wait()


def map_batches(
    engine: DataParallel,
    batches: Iterable[Any] | AsyncIterable[Any],
    *,
    ordered: bool,
    max_in_flight: int | None,
    on_error: str,
) -> BatchStream:
    """Make the stream behind `DataParallel.map`, which tells the arguments.

    Raises:
        TypeError: `batches` is no iterable.
        ValueError: `max_in_flight` or `on_error` is out of range.
    """
    if not isinstance(batches, (Iterable, AsyncIterable)):
        raise TypeError(
            f"expected an iterable or an async iterable of batches, but got {type(batches).__qualname__}. "
            "Wrap a single batch in a list."
        )
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, but got {on_error!r}.")
    # Two per lane: while one runs, the next is at hand.
    limit = 2 * len(engine.lanes) if max_in_flight is None else max_in_flight
    if limit < 1:
        raise ValueError(f"max_in_flight must be 1 or more, but got {limit}.")
    return BatchStream(engine, batches, ordered, limit, on_error)


async def _fill(
    shared: _Shared,
    engine: DataParallel,
    batches: Iterable[Any] | AsyncIterable[Any],
    modes: tuple[bool, bool],
) -> None:
    """Read the source and keep batches in flight, until the source ends or the task is cancelled."""
    count = 0
    prefetcher = Prefetcher(engine.lanes)
    try:
        source = _read(batches)
        async with anyio.create_task_group() as group:
            try:
                while True:
                    await shared.wait_room()
                    batch = await anext(source, _END)
                    if batch is _END:
                        break
                    group.start_soon(_run, shared, engine, prefetcher, count, batch, modes)
                    count += 1
                    del batch
            except Exception as error:
                # The source's own failure takes its turn behind the batches it gave before.
                shared.put(count, _Outcome(None, error))
            finally:
                with anyio.CancelScope(shield=True):
                    await source.aclose()
    finally:
        prefetcher.close()
        shared.end()


async def _run(
    shared: _Shared,
    engine: DataParallel,
    prefetcher: Prefetcher,
    index: int,
    batch: Any,
    modes: tuple[bool, bool],
) -> None:
    position = engine.pick_lane()
    lane = engine.lanes[position]
    num_threads = engine.runtime.thread_share(len(engine.lanes))
    inputs = prefetcher.start(lane, arguments(batch))
    work = partial(run_batch, modes, engine, position, inputs)
    try:
        outcome = _Outcome(await engine.runtime.run(work, lane=lane, num_threads=num_threads))
    except (anyio.get_cancelled_exc_class(), GeneratorExit):
        raise
    except BaseException as error:
        outcome = _Outcome(None, error)
    shared.put(index, outcome)


def run_batch(
    modes: tuple[bool, bool], engine: DataParallel, position: int, inputs: Callable[[], tuple[Any, ...]]
) -> Any:
    """Run one batch of a stream on a lane, under the modes that were on when the stream was made."""
    grad, inference = modes
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        return engine.run_here(position, *inputs())


ItemT = TypeVar("ItemT")


async def _read(batches: Iterable[ItemT] | AsyncIterable[ItemT]) -> AsyncGenerator[ItemT, None]:
    """Read any kind of source; close it at the end.

    What is no plain sequence may block (a DataLoader reads files), so it is read on a thread.
    """
    if isinstance(batches, (list, tuple, range)):
        for batch in batches:
            yield batch
        return
    source: Any = aiter(batches) if isinstance(batches, AsyncIterable) else iter(batches)
    is_async = isinstance(batches, AsyncIterable)
    try:
        while True:
            batch = await (anext(source, _END) if is_async else anyio.to_thread.run_sync(next, source, _END))
            if batch is _END:
                return
            yield batch
            del batch
    finally:
        with anyio.CancelScope(shield=True):
            await _close(source, is_async)


async def _close(source: Any, is_async: bool) -> None:
    if is_async and hasattr(source, "aclose"):
        await source.aclose()
    elif not is_async and hasattr(source, "close"):
        await anyio.to_thread.run_sync(source.close)
