"""The base class of every error."""

from __future__ import annotations

from typing import Any


class AsyncDPError(Exception):
    """Base class of every error that asyncdp itself raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructors take what the message is made of, so that the default, which calls them with the
        # message, would fail in the process that the error is sent to.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls: type[AsyncDPError], args: tuple[Any, ...], state: dict[str, Any]) -> AsyncDPError:
    error = cls.__new__(cls, *args)
    error.args = args  # an `OSError`, as is a `TimeoutError`, sets them only in its constructor
    error.__dict__.update(state)
    return error
