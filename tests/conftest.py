"""Shared fixtures: the two event loops, and a guard against code that blocks them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run every test marked `anyio` on both event loops."""
    return str(request.param)


@pytest.fixture(autouse=True)
def never_block_the_loop() -> Iterator[BlockBuster]:
    """Fail any test whose code makes a blocking call on an asyncio event loop's thread."""
    with blockbuster_ctx() as blockbuster:
        yield blockbuster
