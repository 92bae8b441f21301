"""A stream of batches through an engine: read ahead, bounded, ordered or as they complete."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import AsyncIterable, Callable, Iterable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel

from .. import _loops
from .._checks import check_counts, check_flags, shown
from .._loops import ends_tasks, is_cancelled
from .._runtime.lane_runner import StatefulLaneRunner
from .flow import Flow
from .source import END, Source, check_iterable, sayable

ON_ERROR = ("raise", "skip", "return")

_FATAL = (KeyboardInterrupt, SystemExit)
"""Errors that end a stream for every `on_error`."""

_MAX_PER_TURN = 64  # batches started in one turn of the loop, about 1 ms of it


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
        max_in_flight: int | None,
        on_error: str,
    ) -> None:
        self._flow = Flow(runner, ordered, max_in_flight)
        self._on_error = on_error
        self._source = Source(batches)
        self._fill = partial(_fill, self._flow, self._source)
        self._cancel: Callable[[], object] | None = None
        self._closed = False

    def __aiter__(self) -> BatchStream:
        return self

    async def __anext__(self) -> Any:
        if self._closed:
            raise StopAsyncIteration
        if self._cancel is None:
            self._flow.check_not_nested()
            # Cancels once: a second cancellation would interrupt the closing of the source.
            self._cancel = cancel = weakref.finalize(self, _loops.current().spawn(self._fill))
            cancel.atexit = False
        while (outcome := await self._flow.get()) is not None:
            if outcome.error is None:
                return outcome.value
            is_fatal = isinstance(outcome.error, _FATAL)
            if self._on_error == "return" and not is_fatal:
                return outcome.error
            if self._on_error == "raise" or is_fatal:
                try:
                    raise sayable(outcome.error)
                finally:
                    del outcome  # its error's traceback refers to this frame
                    await self.aclose()
        self._closed = True
        self._flow.raise_failure()
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
        self._flow.failure = None  # from reading ahead, which the caller has given up
        if self._flow.has_ended:
            return
        # Without the shield anyio would cancel the wait again and again on asyncio.
        with anyio.CancelScope(shield=True):
            if self._cancel is None:
                self._flow.end()
                await self._source.aclose()
                return
            closed = _loops.current().completion(lambda: None)  # the wait goes on to its end
            self._flow.closed.append(closed)
            self._flow.closing = True
            self._cancel()
            await closed
        self._flow.raise_failure()


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
    check_iterable(batches)
    check_flags(ordered=ordered)
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, but got {shown(on_error)}.")
    if max_in_flight is not None:
        check_counts(max_in_flight=max_in_flight)
    return BatchStream(runner, batches, ordered, max_in_flight, on_error)


async def _fill(flow: Flow, source: Source) -> None:
    """Keep batches of the source in flight, until it ends or the task is cancelled."""
    try:
        async with anyio.create_task_group() as group:
            # In a task of the group, since the cancellation of this one would not wait for a thread
            # that reads; the group's does.
            group.start_soon(_read_all, flow, source)
            await flow.wait_idle()
    except BaseException:
        if not flow.closing:
            flow.failure = RuntimeError(
                "the task that fills this stream was cancelled before its end, not by closing the stream. "
                "Do not cancel tasks of an event loop that you did not start."
            )
        raise
    finally:
        try:
            await flow.drain()
        finally:
            flow.end()


async def _read_all(flow: Flow, source: Source) -> None:
    """Start each batch once there is room; what the source raises comes at the end."""
    try:
        try:
            for count in itertools.count(1):
                await flow.wait_room()
                batch = await source.next()
                if batch is END:
                    break
                flow.start(batch)
                del batch
                if count % _MAX_PER_TURN == 0:
                    await anyio.lowlevel.checkpoint()
        finally:
            with anyio.CancelScope(shield=True):
                await source.aclose()
    except BaseException as error:
        if ends_tasks(error) and is_cancelled():
            raise
        flow.failure = error
    finally:
        flow.note_read()
