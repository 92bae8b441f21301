"""What calls get when their batch or their batcher fails."""

from __future__ import annotations

from collections.abc import Iterable

from .._loops import ends_tasks
from ..errors import BatcherClosedError, DeviceLostError, EngineCancelledError
from .call import Request


def fail_all(calls: Iterable[Request], error: BaseException) -> None:
    """Fail calls with one error."""
    for call in calls:
        call.complete(None, error)


def for_callers(error: BaseException, lost: str | None) -> BaseException:
    """Return what calls get for their engine's error, on a lane that is lost or not."""
    if lost is not None and not isinstance(error, DeviceLostError):
        wrapped: BaseException = DeviceLostError(lost, str(error).partition("\n")[0])
    elif ends_tasks(error) or not isinstance(error, Exception):
        # The engine's own: callers would take it for theirs, or the process that serves all would end.
        wrapped = EngineCancelledError(error)
    else:
        return error
    wrapped.__cause__ = error
    return wrapped


def closed_by(error: Exception | None) -> BatcherClosedError:
    """Return what calls get that end with their batcher, by its cancellation or a mistake in it."""
    if error is None:
        return BatcherClosedError("the batcher was cancelled")
    closed = BatcherClosedError(f"the batcher failed with {error!r}")
    closed.__cause__ = error
    return closed
