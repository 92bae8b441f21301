"""Every way of running a module on lanes, so that a promise is held to each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from torch import Tensor, nn

import asyncdp

Call = Callable[[Tensor], Awaitable[Any]]

ENGINES = ("all", "auto", "number", "one lane", "on_one_lane", "map", "batcher", "one lane batcher")
WAYS = ("data_parallel", "data_parallel on one lane", *ENGINES)


@asynccontextmanager
async def way(name: str, module: nn.Module) -> AsyncIterator[Call]:
    """Give what runs `module` on a batch that begins with rows for the first lane."""
    if name.startswith("data_parallel"):
        devices = "cpu" if name.endswith("one lane") else "cpu*2"
        yield lambda x: asyncdp.data_parallel(module, x, devices)
        return
    num_lanes = {"all": "all", "auto": "auto", "number": 2}.get(name, "all")
    devices = "cpu" if name.startswith("one lane") else "cpu*2"
    async with asyncdp.DataParallel(module, devices, num_lanes=num_lanes) as engine:
        if name.endswith("batcher"):
            async with asyncdp.Batcher(engine, max_batch_size=1) as batcher:

                async def rows(x: Tensor) -> list[Any]:
                    return [await batcher(row) for row in x]

                yield rows
        elif name == "map":

            async def mapped(x: Tensor) -> Any:
                return await anext(aiter(engine.map([x])))

            yield mapped
        else:
            yield engine.on_one_lane if name == "on_one_lane" else engine
