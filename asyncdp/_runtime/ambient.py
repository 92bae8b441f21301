"""Torch's thread-local state and the context variables of a caller, applied again in a lane."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Ambient:
    """What a caller had switched on when it submitted a pass.

    Grad mode, inference mode and autocast belong to a thread in torch, so a lane knows nothing of
    the caller's. The default dtype belongs to the process and needs no carrying; the default
    device inside a lane is always the lane's own.
    """

    __slots__ = ("_context", "_device_types", "_state")

    def __init__(self, device_types: tuple[str, ...]) -> None:
        self._device_types = device_types
        self._state = _thread_state(device_types)
        self._context = contextvars.copy_context()
        # The lane's thread runs no event loop, whatever the caller's context says.
        sniffio = sys.modules.get("sniffio")
        if sniffio is not None:
            self._context.run(sniffio.current_async_library_cvar.set, None)

    def run(self, function: Callable[[], T], device: torch.device) -> T:
        """Call `function` on this thread under the captured state; `device` is the lane's."""
        # A context can be entered once at a time, and the lanes of one pass run at the same time.
        context = self._context.copy()
        if device.type == "cpu" and self._state == _thread_state(self._device_types):
            return context.run(function)
        grad, inference, cache_enabled, *autocasts = self._state
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for name, enabled, dtype in zip(self._device_types, autocasts[::2], autocasts[1::2], strict=True):
                stack.enter_context(
                    torch.autocast(name, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
                )
            if device.type != "cpu":
                stack.enter_context(device)
            return context.run(function)


def _thread_state(device_types: tuple[str, ...]) -> tuple[Any, ...]:
    """Grad mode, inference mode, autocast's cache, then autocast on/off and dtype of each device type."""
    state: tuple[Any, ...] = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_cache_enabled(),
    )
    for name in device_types:
        state += (torch.is_autocast_enabled(name), torch.get_autocast_dtype(name))
    return state
