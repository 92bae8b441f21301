"""Task groups that raise what went wrong, not a group around it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import anyio
from anyio.abc import TaskGroup


@contextlib.asynccontextmanager
async def plain_task_group() -> AsyncIterator[TaskGroup]:
    """A task group that raises the first failure itself: the others follow from it."""
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as failures:
        error = _first(failures)
        raise error from error.__cause__


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    leaves = list(_leaves(group))
    # A queue whose other end has failed complains too, sometimes sooner than the failure arrives.
    causes = [error for error in leaves if not isinstance(error, anyio.BrokenResourceError)]
    return (causes or leaves)[0]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
