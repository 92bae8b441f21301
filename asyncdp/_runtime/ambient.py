"""Torch's thread-local modes and the context variables of a caller, applied again in a lane."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
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
from torch.autograd.graph import saved_tensors_hooks

from .._torch_private import num_function_modes, saved_tensors_hooks_of

# Which event loop runs, as the library sniffio sees it; it may not be installed.
_event_loop_name: contextvars.ContextVar[str | None] | None
try:
    from sniffio import current_async_library_cvar as _event_loop_name
except ImportError:
    _event_loop_name = None

T = TypeVar("T")

Modes = tuple[Any, ...]
"""Grad mode, inference mode, autocast's cache; then each device type, whether autocast is on, its dtype."""


def current_modes(device_types: Sequence[str]) -> Modes:
    """Return the modes of the calling thread."""
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

    Grad mode, inference mode, autocast, the default device and hooks for saved tensors belong to a thread in
    torch, so a lane knows nothing of the caller's. The default dtype belongs to the process and needs no
    carrying.
    """

    __slots__ = ("_contexts", "_default_device", "_saved_hooks", "modes")

    def __init__(self, device_types: Sequence[str]) -> None:
        self.modes = current_modes(device_types)
        # A set default device is a mode of torch functions; looking for it among none takes microseconds.
        has_modes = num_function_modes() > 0
        self._default_device = torch.get_default_device() if has_modes else None
        # Torch itself applies only the innermost.
        self._saved_hooks = None if saved_tensors_hooks_of is None else saved_tensors_hooks_of(False)
        context = contextvars.copy_context()
        # The lane's thread runs no event loop, whatever the caller's context says.
        if _event_loop_name is not None and _event_loop_name.get() is not None:
            context.run(_event_loop_name.set, None)
        self._contexts = [context]

    def copy(self) -> Ambient:
        """Return the same for another pass, whose tasks have context variables of their own."""
        other = Ambient.__new__(Ambient)
        other.modes = self.modes
        other._default_device = self._default_device
        other._saved_hooks = self._saved_hooks
        other._contexts = [self._contexts[0].copy()]
        return other

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function that sets context variables; for an ambient that no task runs under yet."""
        self._contexts[0].run(function, *args)

    def bind(self, function: Callable[[], T], index: int, device: torch.device) -> Callable[[], T]:
        """Give `function` the caller's context variables, default device and hooks for saved tensors.

        Args:
            function: what the task at `index` of its stage calls.
            index: tasks of one stage differ in it.
            device: the lane's; it takes the place of the caller's default device of the same type.
        """
        # A context can be entered once at a time, and the tasks of one stage run at the same time.
        while index >= len(self._contexts):
            self._contexts.append(self._contexts[0].copy())
        if self._default_device is not None:
            same_type = self._default_device.type == device.type
            function = partial(_within, device if same_type else self._default_device, function)
        if self._saved_hooks is not None:
            function = partial(_within, saved_tensors_hooks(*self._saved_hooks), function)
        return partial(self._contexts[index].run, function)


def _within(block: AbstractContextManager[Any] | torch.device, function: Callable[[], T]) -> T:
    with block:
        return function()


class LaneModes:
    """The modes of a lane's thread, on which everything here is called.

    Grad and inference mode stay as one task had them until another asks for others, since most ask
    for the same.
    """

    def __init__(self) -> None:
        self._stack: ExitStack | None = None
        self.are_brief = False
        """Whether to `leave` them after the task.

        As long as anything of autocast is entered it keeps its casts of weights, which may change then.
        """

    def switch(self, modes: Modes, device_types: Sequence[str]) -> None:
        """Let the thread have `modes`, whatever earlier tasks have left switched."""
        if modes == current_modes(device_types):
            return
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
