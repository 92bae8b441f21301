"""Shared fixtures: the two event loops, and a guard against code that blocks them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import hypothesis  # noqa: F401  before `quick_collections`: as it is imported it asks for referrers
import pytest
import torch
from blockbuster import BlockBuster, blockbuster_ctx


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more CUDA devices than there are."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for mark, num_needed in (("gpu", 1), ("multi_device", 2)):
        if num_devices < num_needed:
            skip = pytest.mark.skip(reason=f"needs {num_needed} CUDA device(s), torch sees {num_devices}")
            for item in items:
                if item.get_closest_marker(mark) is not None:
                    item.add_marker(skip)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run every test marked `anyio` on both event loops."""
    return str(request.param)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Have tests that collect garbage look through their own, not through all that was imported before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def never_block_the_loop() -> Iterator[BlockBuster]:
    """Fail any test whose code makes a blocking call on an asyncio event loop's thread."""
    with blockbuster_ctx() as blockbuster:
        yield blockbuster
