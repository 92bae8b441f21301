"""Fixtures and markers for suites that test code over asyncdp.

pytest loads this module in every environment that has asyncdp, so torch and the rest of asyncdp are
imported only when a fixture or marker is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from asyncdp import Runtime
    from asyncdp.testing import FakeDevice

DEFAULT_NUM_DEVICES = 2
_CLOSE_SECONDS = 5.0


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where torch sees none")
    config.addinivalue_line("markers", "multi_device: needs two CUDA devices; skipped where torch sees fewer")
    config.addinivalue_line(
        "markers",
        "asyncdp_faults(faults): what goes wrong on the fake devices, by (lane, number of the work)",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs devices that are not there."""
    for marker, needed in (("gpu", 1), ("multi_device", 2)):
        if item.get_closest_marker(marker) is not None and (found := _num_cuda_devices()) < needed:
            pytest.skip(f"marked {marker}: needs {needed} CUDA devices, torch sees {found}")


@pytest.fixture
def asyncdp_devices(request: pytest.FixtureRequest) -> list[FakeDevice]:
    """Two fake devices, one lane each, with the faults of the marker `asyncdp_faults`.

    Parametrize it indirectly for another number of devices.
    """
    from asyncdp.testing import fake_devices

    marker = request.node.get_closest_marker("asyncdp_faults")
    return fake_devices(
        getattr(request, "param", DEFAULT_NUM_DEVICES), faults=marker.args[0] if marker is not None else None
    )


@pytest.fixture
def asyncdp_runtime(asyncdp_devices: list[FakeDevice]) -> Iterator[Runtime]:
    """A runtime over `asyncdp_devices`; works that are still held at the end are released.

    A plain fixture, not an async one, so that it works under pytest-asyncio, anyio and trio alike.
    """
    from asyncdp import Runtime

    runtime = Runtime(asyncdp_devices)
    yield runtime
    for device in asyncdp_devices:
        device.release()
    runtime._core.shut_down(_CLOSE_SECONDS)


def _num_cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
