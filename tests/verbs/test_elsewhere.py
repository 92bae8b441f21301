"""Lanes away from the module's device, without one: fake devices, which the CPU's tensors are never on."""

from __future__ import annotations

import asyncio
import contextvars
import copy
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asyncdp
from asyncdp._devices import LaneDevice
from asyncdp.testing import FakeDevice, fake_devices

from .models import MODULES, Fn, numbered
from .test_autograd import penalty
from .test_modules import assert_same, gradients

CPU = torch.device("cpu")
META = torch.device("meta")  # a device that tensors can be moved to, and nothing else


def lanes(kind: str) -> list[LaneDevice]:
    """Two lanes, of which none or the first is at the module's home."""
    return [*fake_devices(2)] if kind == "both away" else [LaneDevice(CPU), FakeDevice(1)]


@pytest.fixture(params=["both away", "one at home"])
def dp(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Return passes over two lanes, none of them or only the first on the module's own device."""
    away: list[LaneDevice] = [*fake_devices(2)] if request.param == "both away" else [FakeDevice(1)]
    with asyncio.Runner() as runner:
        runtime = asyncdp.Runtime([LaneDevice(CPU), *away][-2:])
        engines: dict[nn.Module, asyncdp.DataParallel] = {}

        def one(module: nn.Module, x: Tensor) -> Any:
            if module not in engines:
                engines[module] = asyncdp.DataParallel(
                    module, output_device="cpu", num_lanes="all", runtime=runtime
                )
            return runner.run(_awaited(engines[module](x)), context=contextvars.copy_context())

        yield one
        runner.run(runtime.aclose())


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


@pytest.mark.parametrize("name", [name for name in MODULES if "norm, old" not in name])
def test_values_and_gradients(dp: Callable[..., Any], name: str) -> None:
    """Contract 4, 5, 7: on copies, three passes with changes between them equal those of the plain module."""
    case = MODULES[name]
    module = case.make()
    module = module if name == "complex" else module.double()
    twin = copy.deepcopy(module)
    for step in range(3):
        x = case.batch().requires_grad_()
        y = x.detach().clone().requires_grad_()
        with torch.set_grad_enabled(step != 1):
            found, expected = dp(module, x), twin(y)
        torch.testing.assert_close(found, expected)
        if step != 1:
            found.abs().square().sum().backward()
            expected.abs().square().sum().backward()
            torch.testing.assert_close(x.grad, y.grad)
        with torch.no_grad():
            for own, its in zip(module.parameters(), twin.parameters(), strict=True):
                own.mul_(0.9)
                its.mul_(0.9)
    assert_same(gradients(module), gradients(twin))


def test_second_derivatives(dp: Callable[..., Any]) -> None:
    """Contract 14: a gradient penalty through copies equals the plain module's."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    twin = copy.deepcopy(module)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    penalty(dp(module, x), x, list(module.parameters()))
    penalty(twin(y), y, list(twin.parameters()))
    torch.testing.assert_close(x.grad, y.grad)
    assert_same(gradients(module), gradients(twin))


def test_statistics_survive(dp: Callable[..., Any]) -> None:
    """Contract 8: lane 0's running statistics reach the module's own buffers, wherever that lane is."""
    module = nn.BatchNorm1d(3)
    twin, buffers = copy.deepcopy(module), list(module.buffers())
    for _ in range(3):
        x = torch.randn(8, 3) + 5
        dp(module, x)
        twin(x[:4])
        for own, other in zip(module.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(own, other)
    assert list(map(id, module.buffers())) == list(map(id, buffers))


class Mover(nn.Linear):
    """Notes what it is moved to."""

    moves: list[torch.device]

    def to(self, *args: Any, **kwargs: Any) -> Mover:
        self.moves.append(args[0])
        return super().to(*args, **kwargs)


@pytest.mark.anyio
async def test_a_lone_lane_moves_the_module_itself() -> None:
    """Contract 12: with one device the module itself is moved there, its buffers and all."""
    ran: list[nn.Module] = []
    module = Mover(1, 1)
    module.moves = []
    module.register_forward_hook(lambda m, _args, _output: ran.append(m))
    async with (
        asyncdp.Runtime([FakeDevice(1)]) as runtime,
        asyncdp.DataParallel(module, runtime=runtime) as engine,
    ):
        await engine(numbered(4))
    assert len(ran) == 1
    assert module.moves == [torch.device("cpu", 1)]


@pytest.mark.anyio
@pytest.mark.parametrize("num_lanes", [1, 2])
async def test_outputs_go_to_the_output_device(num_lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 11, 12: on one lane as on several, all of a result is on the output device."""
    module = Fn(lambda m, x: {"rows": x, "more": [x.sum(), "text"]})
    # So that the engine takes "meta", where nothing computes, for a device to put results on.
    monkeypatch.setattr(torch, "meta", SimpleNamespace(is_available=lambda: True), raising=False)
    devices = f"cpu*{num_lanes}"
    async with asyncdp.DataParallel(module, devices, "meta") as engine:
        found = await engine.on_one_lane(numbered(4))
        assert found["more"][1] == "text"
        assert {found["rows"].device, found["more"][0].device} == {META}
    async with asyncdp.DataParallel(nn.Identity(), devices, "meta", num_lanes="all") as engine:
        moved = await engine(numbered(4))
        assert moved.device == META
        assert moved.shape == (4, 1)
