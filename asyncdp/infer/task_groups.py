"""Task groups that raise the failure itself, not a group around it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import anyio
from anyio.abc import TaskGroup


@contextlib.asynccontextmanager
async def plain_task_group() -> AsyncIterator[TaskGroup]:
    """Run a task group that raises its first failure; the others follow from that one."""
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as failures:
        # A queue whose other end has failed raises too, sometimes sooner than the failure arrives.
        broken, causes = failures.split(anyio.BrokenResourceError)
        error: BaseException | None = causes or broken
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        assert error is not None, "a group of exceptions is never empty"
        raise error from error.__cause__
