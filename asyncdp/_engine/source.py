"""Any kind of iterable, read without blocking the event loop."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

import anyio
import anyio.to_thread
import torch

from .._tree import PerRow

END = object()
"""What a source gives once it has nothing more."""


class Source:
    """Reads any kind of iterable, and closes what it reads from.

    Not an async generator: those cannot pass on every exception.
    """

    def __init__(self, batches: Iterable[Any] | AsyncIterable[Any]) -> None:
        self._is_async = isinstance(batches, AsyncIterable)
        self._batches: Any = batches
        self._iterator: Any = None
        self._error: BaseException | None = None

    async def next(self) -> Any:
        """Return the next batch, or `END`."""
        if self._is_async:
            if self._iterator is None:
                self._iterator = aiter(self._batches)
            return await anext(self._iterator, END)
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
            return next(self._iterator, END)
        except BaseException as error:
            self._error = error
            return END

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


class SourceFailure:
    """What ended the reading of a stream's source, until the stream raises it.

    Attributes:
        failure: of the source, or of a batch that cannot be run; None if there is none, or no more.
    """

    failure: BaseException | None = None

    def raise_failure(self) -> None:
        """Raise the failure, if it was not raised yet."""
        failure, self.failure = self.failure, None
        if failure is not None:
            try:
                raise sayable(failure)
            finally:
                del failure  # its traceback refers to this frame: they would keep each other alive


def sayable(error: BaseException) -> BaseException:
    """Return an error as a stream can raise it: `StopAsyncIteration` would pass for its end."""
    if not isinstance(error, StopAsyncIteration):
        return error
    wrapped = RuntimeError(
        "a batch, or the source of batches, raised StopAsyncIteration (the cause of this error). "
        "Call anext() with a default there, or catch it."
    )
    wrapped.__cause__ = error
    return wrapped


def check_iterable(batches: object) -> None:
    """Raise `TypeError` for what is no iterable of batches, or a single batch."""
    is_one_batch = isinstance(batches, (torch.Tensor, Mapping, str, bytes, PerRow))
    if hasattr(batches, "__array__") or is_one_batch or not isinstance(batches, (Iterable, AsyncIterable)):
        raise TypeError(
            f"expected an iterable or an async iterable of batches, but got {type(batches).__qualname__}. "
            "Wrap a single batch in a list."
        )
