"""A lane works under the torch state and the context variables of its caller."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest
import torch

from .helpers import runtime

pytestmark = pytest.mark.anyio

REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("REQUEST", default="none")


def seen() -> dict[str, Any]:
    """What torch's thread-local state looks like from here."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (torch.no_grad, {"grad": False}),
        (torch.inference_mode, {"inference": True, "grad": False}),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), {"autocast": True}),
        (
            lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
            {"autocast": True, "autocast dtype": torch.float16, "autocast cache": False},
        ),
        (torch.enable_grad, {"grad": True}),
    ],
    ids=["no_grad", "inference_mode", "autocast", "autocast float16 uncached", "enable_grad"],
)
async def test_thread_local_state_is_carried(context: Any, expected: dict[str, Any]) -> None:
    """Grad mode, inference mode and autocast in a lane are the caller's, and leave no trace there."""
    async with runtime(1) as rt:
        fresh = await rt.run(seen)
        with context():
            call = rt.run(seen)
            step = call.__await__()
            waiting = next(step)
        assert (await _resume(waiting, step)) == {**fresh, **expected}
        assert await rt.run(seen) == fresh


class _resume:
    """Finish a call whose first step was made by hand."""

    def __init__(self, waiting: Any, step: Any) -> None:
        self._waiting = waiting
        self._step = step

    def __await__(self) -> Any:
        value = yield self._waiting
        while True:
            try:
                value = yield self._step.send(value)
            except StopIteration as stop:
                return stop.value


async def test_default_dtype_is_seen() -> None:
    """The process's default dtype holds in lanes."""
    async with runtime(1) as rt:
        torch.set_default_dtype(torch.float64)
        try:
            assert await rt.run(lambda: torch.ones(1).dtype) is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


async def test_the_default_device_is_the_lanes() -> None:
    """Tensors made inside a lane without naming a device are on the lane's, whatever the caller's is."""
    async with runtime(1) as rt:
        with torch.device("meta"):
            step = rt.run(lambda: torch.ones(1).device).__await__()
            waiting = next(step)
        assert await _resume(waiting, step) == torch.device("cpu")


async def test_context_variables_are_carried_and_isolated() -> None:
    """A lane sees the caller's context variables; what it sets stays in the lane's call."""
    async with runtime(2) as rt:
        REQUEST.set("r1")

        def work() -> str:
            before = REQUEST.get()
            REQUEST.set("changed")
            return before

        assert await rt.run_pass([(lane, work) for lane in rt.lanes]) == ["r1", "r1"]
        assert REQUEST.get() == "r1"


async def test_a_leak_in_a_lane_does_not_reach_the_next_call() -> None:
    """Code that leaves torch's state changed in a lane does not change the next call's."""
    async with runtime(1) as rt:
        await rt.run(torch._C._set_grad_enabled, False)
        assert (await rt.run(seen))["grad"] is True
