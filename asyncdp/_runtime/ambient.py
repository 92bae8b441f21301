"""Torch's thread-local modes and the context variables of a caller, applied again in a lane."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import (
    get_autocast_dtype,
    is_autocast_cache_enabled,
    is_autocast_enabled,
    is_grad_enabled,
    is_inference_mode_enabled,
)

# Which event loop runs, for whoever asks this library; not everyone has it.
_event_loop_name: contextvars.ContextVar[str | None] | None
try:
    from sniffio import current_async_library_cvar as _event_loop_name
except ImportError:
    _event_loop_name = None

T = TypeVar("T")

Modes = tuple[Any, ...]
"""Grad mode, inference mode, autocast's cache; then each device type, whether autocast is on, its dtype."""


def current_modes(device_types: tuple[str, ...]) -> Modes:
    """The modes of the calling thread."""
    name = device_types[0]
    modes: Modes = (
        is_grad_enabled(),
        is_inference_mode_enabled(),
        is_autocast_cache_enabled(),
        name,
        is_autocast_enabled(name),
        get_autocast_dtype(name),
    )
    for name in device_types[1:]:
        modes += (name, is_autocast_enabled(name), get_autocast_dtype(name))
    return modes


def _entered(modes: Modes, present: Modes) -> ExitStack:
    """Switch the calling thread from its `present` modes to `modes`; closing the result switches it back."""
    grad, inference, cache_enabled, *autocasts = modes
    stack = ExitStack()
    if inference != present[1]:
        stack.enter_context(torch.inference_mode(inference))
    stack.enter_context(torch.set_grad_enabled(grad))
    if modes[2:] != present[2:]:
        for name, enabled, dtype in zip(*[iter(autocasts)] * 3, strict=True):
            stack.enter_context(
                torch.autocast(name, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
            )
    return stack


class Ambient:
    """What a caller had switched on when it submitted a pass.

    Grad mode, inference mode and autocast belong to a thread in torch, so a lane knows nothing of
    the caller's. The default dtype belongs to the process and needs no carrying; the default
    device inside a lane is always the lane's own.
    """

    __slots__ = ("_contexts", "modes")

    def __init__(self, device_types: tuple[str, ...]) -> None:
        self.modes = current_modes(device_types)
        context = contextvars.copy_context()
        # The lane's thread runs no event loop, whatever the caller's context says.
        if _event_loop_name is not None and _event_loop_name.get() is not None:
            context.run(_event_loop_name.set, None)
        self._contexts = [context]

    def copy(self) -> Ambient:
        """The same once more: works of different passes may change their context variables, each its own."""
        other = Ambient.__new__(Ambient)
        other.modes = self.modes
        other._contexts = [self._contexts[0].copy()]
        return other

    def bind(self, function: Callable[[], T], index: int) -> Callable[[], T]:
        """Give `function` the caller's context variables; works of one stage differ in `index`."""
        # A context can be entered once at a time, and the works of one stage run at the same time.
        while index >= len(self._contexts):
            self._contexts.append(self._contexts[0].copy())
        return partial(self._contexts[index].run, function)


class LaneModes:
    """The modes of a lane's thread, on which everything here is called.

    Grad and inference mode stay as one work had them until another asks for others, since most ask
    for the same.
    """

    def __init__(self) -> None:
        self._stack: ExitStack | None = None
        self.are_brief = False
        """Whether to leave them after the work.

        As long as anything of autocast is entered it keeps its casts of weights, which may change then.
        """

    def switch(self, modes: Modes, device_types: tuple[str, ...]) -> None:
        """Let the thread have `modes`."""
        self.leave()
        present = current_modes(device_types)
        if modes != present:
            self._stack = _entered(modes, present)
            self.are_brief = modes[2:] != present[2:]

    def leave(self) -> None:
        """Let the thread have the modes that it began with."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None
            self.are_brief = False
