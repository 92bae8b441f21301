"""A lane works under the torch state and the context variables of its caller."""

from __future__ import annotations

import contextvars
import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import asyncdp
from asyncdp._devices import LaneDevice
from asyncdp.testing import FakeDevice

from .helpers import run_stages, runtime

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


async def test_the_default_device_is_the_callers() -> None:
    """Nothing is set in a lane where the caller set nothing; else the same, with the lane's own index."""

    def defaults() -> list[torch.device]:
        # Asked of torch itself, since no tensor can be made there without the device.
        return [mode.device for mode in torch.overrides._get_current_function_mode_stack()]

    lane = torch.device("cuda", 1)
    async with asyncdp.Runtime([LaneDevice(lane)]) as rt:
        assert await rt.run(defaults) == []
        for name, expected in (("cuda:0", lane), ("meta", torch.device("meta"))):
            with torch.device(name):
                assert await rt.run(defaults) == [expected]
        assert await rt.run(defaults) == []


async def test_context_variables_are_carried_and_isolated() -> None:
    """A lane sees the caller's context variables; what it sets stays in the lane's call."""
    async with runtime(2) as rt:
        REQUEST.set("r1")

        def work() -> str:
            before = REQUEST.get()
            REQUEST.set("changed")
            return before

        assert await run_stages(rt, [(lane, work) for lane in rt.lanes]) == ["r1", "r1"]
        assert REQUEST.get() == "r1"


async def test_a_leak_in_a_lane_does_not_reach_the_next_call() -> None:
    """Code that leaves torch's state changed in a lane does not change the next call's."""
    async with runtime(1) as rt:
        await rt.run(torch._C._set_grad_enabled, False)
        assert (await rt.run(seen))["grad"] is True


@pytest.mark.parametrize("place", ["caller", "call"])
async def test_autocast_forgets_its_casts_after_every_call(place: str) -> None:
    """Weights that change between two calls under autocast are cast anew, not taken from the first."""
    weight = torch.ones(4, 4, requires_grad=True)
    outside = torch.autocast("cpu") if place == "caller" else nullcontext()

    def product() -> float:
        with torch.autocast("cpu") if place == "call" else nullcontext():
            return (torch.ones(1, 4) @ weight).sum().item()

    torch.set_autocast_dtype("cpu", torch.float16)  # not a lane's own
    try:
        async with runtime(1) as rt:
            with outside:
                before = await rt.run(product)
                with torch.no_grad():
                    weight.mul_(2)
                assert await rt.run(product) == 2 * before
    finally:
        torch.set_autocast_dtype("cpu", torch.bfloat16)


async def test_the_end_of_a_lane_leaves_other_threads_alone() -> None:
    """A closed and collected runtime does not give its lanes' modes to the thread that collects it."""
    rt = runtime(1)
    with torch.inference_mode():
        await rt.run(seen)
    await rt.aclose()
    with torch.no_grad():
        del rt
        gc.collect()
        assert not torch.is_grad_enabled()


class _CapturingDevice(FakeDevice):
    """Has something to note for each pass, as CUDA devices have."""

    captures = True


async def test_a_later_stage_may_use_another_device() -> None:
    """What a pass noted of its first devices is not missed on one that only a later stage uses."""
    async with asyncdp.Runtime([_CapturingDevice(0), _CapturingDevice(1)]) as rt:
        first, second = rt.lanes
        result = await run_stages(
            rt, [(first, lambda: 1)], lambda results, _: [(second, lambda: results[0] + 1)]
        )
    assert result == [2]
