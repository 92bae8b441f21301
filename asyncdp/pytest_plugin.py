"""Fixtures and markers for suites that test code over asyncdp.

pytest loads this module in every environment that has asyncdp, so torch and the rest of asyncdp are
imported only when a fixture or marker is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from asyncdp import Runtime
    from asyncdp.testing import FakeDevice, Fault, VirtualClock

DEFAULT_NUM_DEVICES = 2
_CLOSE_SECONDS = 5.0


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where torch sees none")
    config.addinivalue_line("markers", "multi_device: needs two CUDA devices; skipped where torch sees fewer")
    config.addinivalue_line(
        "markers",
        "asyncdp_faults(faults): what goes wrong on the fake devices, by (lane, number of the task)",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs devices that are not there."""
    for marker, needed in (("gpu", 1), ("multi_device", 2)):
        if item.get_closest_marker(marker) is not None and (found := _num_cuda_devices()) < needed:
            pytest.skip(f"marked {marker}: needs {needed} CUDA devices, torch sees {found}")


@pytest.fixture
def asyncdp_clock() -> VirtualClock:
    """Return the virtual clock of `asyncdp_devices`."""
    from asyncdp.testing import VirtualClock

    return VirtualClock()


@pytest.fixture
def asyncdp_devices(request: pytest.FixtureRequest, asyncdp_clock: VirtualClock) -> list[FakeDevice]:
    """Make two fake devices, one lane each, with the faults of the marker `asyncdp_faults`.

    Parametrize it indirectly for another number of devices.
    """
    from asyncdp.testing import fake_devices

    marker = request.node.get_closest_marker("asyncdp_faults")
    faults = None if marker is None else asyncdp_faults(*marker.args, **marker.kwargs)
    count = getattr(request, "param", DEFAULT_NUM_DEVICES)
    return fake_devices(count, clock=asyncdp_clock, faults=faults)


def asyncdp_faults(faults: Mapping[tuple[int, int], Fault]) -> Mapping[tuple[int, int], Fault]:
    """Return the argument of the marker of this name."""
    return faults


@pytest.fixture
def asyncdp_runtime(asyncdp_devices: list[FakeDevice], asyncdp_clock: VirtualClock) -> Iterator[Runtime]:
    """Make a runtime over `asyncdp_devices`; tasks that are still held or delayed at the end are released.

    A plain fixture, not an async one, so that it works under pytest-asyncio, anyio and trio alike.
    """
    from asyncdp import Runtime

    runtime = Runtime(asyncdp_devices)
    yield runtime
    for device in asyncdp_devices:
        device.release()
    asyncdp_clock.advance(math.inf)
    runtime._core.shut_down(_CLOSE_SECONDS)


def _num_cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
