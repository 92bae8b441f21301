"""A stream of batches through an engine: read ahead, bounded, ordered or as they complete."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.to_thread
import torch

from .. import _loops
from .._loops import Completion, Waiter, ends_tasks, is_cancelled, wake
from .._runtime import Task, scheduler_of
from .._runtime.lane_runner import StatefulLaneRunner
from .._verbs.batch import arguments
from .prefetch import Prefetcher

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

ON_ERROR = ("raise", "skip", "return")

_FATAL = (KeyboardInterrupt, SystemExit)
"""Errors that end a stream for every `on_error`."""

_END = object()


class _Outcome(NamedTuple):
    value: Any
    error: BaseException | None = None


class _Shared:
    """State shared by the reader of a stream and the task that fills it, on one event loop.

    The task must not refer to the reader: only the reader's deletion in mid-stream ends the task.
    """

    def __init__(self, max_in_flight: int, ordered: bool) -> None:
        self._room = max_in_flight
        self._ordered = ordered
        self._ready: dict[int, _Outcome] = {}
        self._next = 0
        self._order: deque[int] = deque()  # of completion
        self._ended = False
        self._readers: list[Waiter] = []
        self._filler: Waiter | None = None
        self.failure: BaseException | None = None  # of the source
        self.closing = False
        self.gone: list[Completion] = []  # finished when the task has ended

    @property
    def ended(self) -> bool:
        return self._ended

    async def wait_room(self) -> None:
        """Wait until one more batch may be in flight, and count it."""
        while self._room == 0:
            self._filler = _loops.current().waiter()
            await self._filler
        self._room -= 1

    def give_back_room(self) -> None:
        self._room += 1
        if self._filler is not None:
            wake(self._filler)

    def put(self, index: int, outcome: _Outcome) -> None:
        self._ready[index] = outcome
        self._order.append(index)
        self._wake_readers()

    def end(self) -> None:
        self._ended = True
        self._wake_readers()
        for completion in self.gone:
            completion.finish()

    def raise_failure(self) -> None:
        """Raise the source's failure, if there is one that was not raised yet."""
        failure, self.failure = self.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                # The traceback refers to this frame: they would keep each other alive.
                del failure

    async def get(self) -> _Outcome | None:
        """Return the next outcome, or None at the end of the stream."""
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
            reader = _loops.current().waiter()
            self._readers.append(reader)
            await reader

    def _wake_readers(self) -> None:
        while self._readers:
            wake(self._readers.pop())


class _Source:
    """Reads any kind of iterable, and closes what it reads from.

    Not an async generator: those cannot pass on every exception.
    """

    def __init__(self, batches: Iterable[Any] | AsyncIterable[Any]) -> None:
        self._is_async = isinstance(batches, AsyncIterable)
        self._batches: Any = batches
        self._iterator: Any = None
        self._error: BaseException | None = None

    async def next(self) -> Any:
        """Return the next batch, or `_END`."""
        if self._is_async:
            if self._iterator is None:
                self._iterator = aiter(self._batches)
            return await anext(self._iterator, _END)
        if isinstance(self._batches, (list, tuple, range)):
            batch = self._read()
        else:  # It may block: a DataLoader reads files.
            batch = await anyio.to_thread.run_sync(self._read)
        error, self._error = self._error, None
        if error is None:
            return batch
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def _read(self) -> Any:
        # An error is not raised, since a GeneratorExit would close the coroutines that it comes through,
        # and not returned, since frames of the thread would keep it alive.
        try:
            if self._iterator is None:
                self._iterator = iter(self._batches)
            return next(self._iterator, _END)
        except BaseException as error:
            self._error = error
            return _END

    async def aclose(self) -> None:
        """Close the iterator; also if nothing was read from one that was there before."""
        iterator = self._iterator
        if iterator is None and isinstance(self._batches, AsyncIterator if self._is_async else Iterator):
            iterator = self._batches
        # Dropped here, as an iterator of a DataLoader has no other end: its processes end with it.
        self._iterator, self._batches = None, ()
        if self._is_async and hasattr(iterator, "aclose"):
            await iterator.aclose()
        elif not self._is_async and hasattr(iterator, "close"):
            await anyio.to_thread.run_sync(iterator.close)


class BatchStream:
    """The results of `DataParallel.map`: an async iterator, and an async context manager.

    Leaving a loop over it early cancels what is in flight and closes the source. That happens in the
    background; to wait for it, use `async with engine.map(...) as results:` or `aclose()`.
    """

    def __init__(
        self,
        runner: StatefulLaneRunner,
        batches: Iterable[Any] | AsyncIterable[Any],
        ordered: bool,
        max_in_flight: int,
        on_error: str,
    ) -> None:
        self._shared = _Shared(max_in_flight, ordered)
        self._on_error = on_error
        # Read here, since a mode that is on during an await leaks into other tasks.
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self._source = _Source(batches)
        run = partial(run_batch, modes, runner, runner.capture())
        self._fill = partial(_fill, self._shared, runner, self._source, run)
        self._cancel: Callable[[], object] | None = None
        self._closed = False

    def __aiter__(self) -> BatchStream:
        return self

    async def __anext__(self) -> Any:
        if self._closed:
            raise StopAsyncIteration
        if self._cancel is None:
            # Cancels once: a second cancellation would interrupt the closing of the source.
            self._cancel = cancel = weakref.finalize(self, _loops.current().spawn(self._fill))
            cancel.atexit = False
        while (outcome := await self._shared.get()) is not None:
            if outcome.error is None:
                return outcome.value
            is_fatal = isinstance(outcome.error, _FATAL)
            if self._on_error == "return" and not is_fatal:
                return outcome.error
            if self._on_error == "raise" or is_fatal:
                try:
                    raise outcome.error
                finally:
                    del outcome  # its error's traceback refers to this frame
                    await self.aclose()
        self._closed = True
        self._shared.raise_failure()
        raise StopAsyncIteration

    async def __aenter__(self) -> BatchStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is in flight, wait until the lanes have drained, close the source.

        A cancellation of the caller goes on after that.

        Raises:
            Exception: what the source raised as it was closed.
        """
        self._closed = True
        self._shared.failure = None  # from reading ahead, which the caller has given up
        if self._shared.ended:
            return
        # Without the shield anyio would cancel the wait again and again on asyncio.
        with anyio.CancelScope(shield=True):
            if self._cancel is None:
                self._shared.end()
                await self._source.aclose()
                return
            gone = _loops.current().completion(lambda: None)  # the wait goes on to its end
            self._shared.gone.append(gone)
            self._shared.closing = True
            self._cancel()
            await gone
        self._shared.raise_failure()


def map_batches(
    runner: StatefulLaneRunner,
    batches: Iterable[Any] | AsyncIterable[Any],
    *,
    ordered: bool,
    max_in_flight: int | None,
    on_error: str,
) -> BatchStream:
    """Make the stream behind `DataParallel.map`; the arguments are explained there.

    Raises:
        TypeError: `batches` is no iterable, or a single batch.
        ValueError: `max_in_flight` or `on_error` is out of range.
    """
    is_one_batch = isinstance(batches, (torch.Tensor, Mapping, str, bytes))
    if is_one_batch or not isinstance(batches, (Iterable, AsyncIterable)):
        raise TypeError(
            f"expected an iterable or an async iterable of batches, but got {type(batches).__qualname__}. "
            "Wrap a single batch in a list."
        )
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, but got {on_error!r}.")
    # Two per lane: while one runs, the next is ready.
    limit = 2 * len(runner.lanes) if max_in_flight is None else max_in_flight
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"max_in_flight must be a whole number of 1 or more, but got {limit}.")
    return BatchStream(runner, batches, ordered, limit, on_error)


async def _fill(
    shared: _Shared, runner: StatefulLaneRunner, source: _Source, run_on: Callable[..., Any]
) -> None:
    """Keep batches of the source in flight, until it ends or the task is cancelled."""
    prefetcher = Prefetcher(runner.lanes)
    try:
        async with anyio.create_task_group() as group:
            # In a task of the group, since the cancellation of this one would not wait for a thread
            # that reads; the group's does.
            group.start_soon(
                _read_all, shared, group, partial(_run, shared, runner, prefetcher, run_on), source
            )
    except BaseException:
        if not shared.closing:
            shared.failure = RuntimeError(
                "the task that fills this stream was cancelled before its end, not by closing the stream. "
                "Do not cancel tasks of an event loop that you did not start."
            )
        raise
    finally:
        prefetcher.close()
        shared.end()


async def _read_all(shared: _Shared, group: TaskGroup, run: Callable[..., Any], source: _Source) -> None:
    """Start a task for each batch once there is room; what the source raises comes at the end."""
    count = 0
    try:
        try:
            while True:
                await shared.wait_room()
                batch = await source.next()
                if batch is _END:
                    break
                group.start_soon(run, count, batch)
                count += 1
                del batch
        finally:
            with anyio.CancelScope(shield=True):
                await source.aclose()
    except BaseException as error:
        if ends_tasks(error) and is_cancelled():
            raise
        shared.failure = error


async def _run(
    shared: _Shared,
    runner: StatefulLaneRunner,
    prefetcher: Prefetcher,
    run_on: Callable[..., Any],
    index: int,
    batch: Any,
) -> None:
    try:
        position = runner.pick()
        lane = runner.lanes[position]
        scheduler = scheduler_of(runner.runtime)
        num_threads = scheduler.thread_share(len(runner.lanes))
        inputs = prefetcher.start(lane, arguments(batch))
        task = Task(lane, partial(run_on, position, inputs), "run")
        shared.put(index, _Outcome((await scheduler.run([task], num_threads=num_threads))[0]))
    except BaseException as error:
        if ends_tasks(error) and is_cancelled():
            raise
        shared.put(index, _Outcome(None, error))


def run_batch(
    modes: tuple[bool, bool],
    runner: StatefulLaneRunner,
    state: Any,
    position: int,
    inputs: Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]]],
) -> Any:
    """Run one batch of a stream on a lane, in the modes and the state of when the stream was made."""
    grad, inference = modes
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        args, kwargs = inputs()
        return runner.run_as(position, state, *args, **kwargs)
