"""An engine with the interface of asyncdp.DataParallel, and options, for tests of the pipeline alone."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import anyio.to_thread

from asyncdp.infer import InferOptions


def options(**chosen):
    """Make the options of a job whose input, model and output the test gives to the pipeline itself."""
    return InferOptions(("-",), "no:model", Path("nowhere"), **chosen)


class FakeEngine:
    """Runs a module in worker threads, as many at once as it has lanes."""

    def __init__(self, module, num_lanes=2):
        self.module = module
        self.busy = 0.0
        self.runtime = SimpleNamespace(
            lanes=tuple(SimpleNamespace(name=f"cpu:{index}") for index in range(num_lanes)),
            statistics=self.statistics,
        )
        self._limiter = anyio.CapacityLimiter(num_lanes)

    def statistics(self):
        return SimpleNamespace(
            lanes=[SimpleNamespace(name=lane.name, busy_seconds=self.busy) for lane in self.runtime.lanes]
        )

    async def on_one_lane(self, *args, **kwargs):
        return await anyio.to_thread.run_sync(lambda: self._run(args, kwargs), limiter=self._limiter)

    def _run(self, args, kwargs):
        start = time.perf_counter()
        try:
            return self.module(*args, **kwargs)
        finally:
            self.busy += time.perf_counter() - start

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        return None
