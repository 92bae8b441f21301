"""What one batch means as arguments."""

from __future__ import annotations

from typing import Any


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that one batch stands for.

    A tuple holds positional arguments and a dict keyword arguments; subclasses of them, and anything
    else, are the only argument.

    Raises:
        TypeError: a key of the dict is no str.
    """
    if type(batch) is tuple:
        return batch, {}
    if type(batch) is not dict:
        return (batch,), {}
    for key in batch:
        if not isinstance(key, str):
            raise TypeError(
                f"a batch that is a dict holds keyword arguments, but its key {key!r} is no str. Name the "
                "keys as the parameters, or put the dict in a tuple to pass it as the only argument."
            )
    return (), batch
