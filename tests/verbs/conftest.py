"""Both ways to run a pass, so that every promise is held to each of them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import asyncdp


class Passes:
    """Runs passes from a test that is no coroutine, all on one event loop.

    Args:
        form: "functional" for `data_parallel`, "engine" for one `DataParallel` per module.
        runner: the event loop.
    """

    def __init__(self, form: str, runner: asyncio.Runner) -> None:
        self.form = form
        self.runner = runner
        self._engines: dict[tuple[int, int], asyncdp.DataParallel] = {}

    def __call__(self, module: nn.Module, *args: Any, lanes: int = 2, **kwargs: Any) -> Any:
        """One pass over `lanes` CPU lanes."""
        one = self.begin(module, *args, lanes=lanes, **kwargs)
        return self.runner.run(one, context=contextvars.copy_context())

    async def begin(self, module: nn.Module, *args: Any, lanes: int = 2, **kwargs: Any) -> Any:
        """As a coroutine."""
        if self.form == "functional":
            return await asyncdp.data_parallel(module, args, f"cpu*{lanes}", module_kwargs=kwargs)
        key = (id(module), lanes)
        if key not in self._engines:
            self._engines[key] = asyncdp.DataParallel(module, f"cpu*{lanes}", num_lanes="all")
        return await self._engines[key](*args, **kwargs)

    def forget(self) -> None:
        """Close and drop the engines, which hold their modules."""
        for engine in self._engines.values():
            self.runner.run(engine.aclose())
        self._engines.clear()


@pytest.fixture(params=["functional", "engine"])
def dp(request: pytest.FixtureRequest) -> Iterator[Passes]:
    """Return passes of both forms."""
    with asyncio.Runner() as runner:
        passes = Passes(request.param, runner)
        yield passes
        passes.forget()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)
