"""What a checkpoint holds: values under paths, and a thread's work that can be called off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ... import _loops

T = TypeVar("T")

Path_ = tuple[str, ...]
"""Where a value stands: `("module", "0.weight")`. Joined by dots it is the value's name in the files."""

Entries = dict[Path_, Any]


class Kind(NamedTuple):
    """What is known of a value before it is read; of anything but a tensor nothing."""

    shape: torch.Size
    dtype: torch.dtype


def kind_of(value: Any) -> Kind | None:
    """Return the kind of what the files hold as a tensor, None for what they hold pickled."""
    if type(value) not in (Tensor, Parameter) or value.layout is not torch.strided or value.is_quantized:
        return None
    return Kind(value.shape, value.dtype)


def some_of(names: Sequence[str]) -> str:
    """Return some of many names, for a message."""
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


class CalledOff(Exception):
    """The caller was cancelled."""


class Stop:
    """Whether the work of a thread was called off."""

    def __init__(self) -> None:
        self._is_set = threading.Event()
        self.set = self._is_set.set

    def check(self) -> None:
        """Raise `CalledOff` if it was."""
        if self._is_set.is_set():
            raise CalledOff


async def on_thread(function: Callable[..., T], *args: Any) -> T:
    """Call `function(*args, stop)` on a thread of its own; a cancellation sets `stop`, and waits for its end.

    A thread, since the lanes have other things to do than to wait for a disk.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome[:] = [function(*args, stop), None]
        except BaseException as error:
            outcome[:] = [None, error]
        finally:
            ended.finish()

    stop = Stop()
    ended = _loops.current().completion(stop.set)
    threading.Thread(target=run, name="asyncdp-checkpoint", daemon=True).start()
    await ended
    result, error = outcome
    if error is None:
        return result  # type: ignore[no-any-return]
    try:
        raise error
    finally:
        outcome.clear()  # the traceback refers to this frame
        del error
