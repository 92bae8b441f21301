"""How many asyncdp functions one warm call enters, in how many files, and how often it moves between files.

Counted on the loop's thread and on all lanes' threads, in the order of time: every entry into a Python
function of the package, generator expressions, lambdas and resumed coroutines included. A *move* is an entry
into another file than the entry before. Lanes run at the same time, so counts differ a little from one call
to the next; shown are medians. Compare counts of one Python version only: newer ones inline comprehensions.
The tree is the one asyncdp is imported from, so `PYTHONPATH` chooses it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from trees import answer, checked_out, run_on

import asyncdp

PACKAGE = str(Path(asyncdp.__file__).parent) + "/"
NUM_WARM_UP, NUM_CALLS = 50, 25
COUNTS = ("calls", "files", "moves")
Call = Callable[[], Awaitable[Any]]


class Counter:
    """Notes the file of every entry into a function of the package, while it is switched on.

    Threads are profiled that start after `install`.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._files: list[str] = []

    def install(self) -> None:
        """Profile this thread and the ones to come."""
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    def _on_event(self, frame: FrameType, event: str, argument: object) -> None:
        if self.is_on and event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self._files.append(frame.f_code.co_filename)

    async def count(self, call: Call) -> tuple[int, int, int]:
        """Return the calls, files and moves of one awaited call."""
        self._files.clear()
        self.is_on = True
        await call()
        self.is_on = False
        moves = sum(before != after for before, after in itertools.pairwise(self._files))
        return len(self._files), len(set(self._files)), moves


def small_module() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def frozen_engine(num_lanes: int) -> asyncdp.DataParallel:
    """Return an engine that records no gradients, forced onto all its lanes."""
    module = small_module().eval().requires_grad_(False)
    return asyncdp.DataParallel(module, f"cpu*{num_lanes}", num_lanes="all")


@asynccontextmanager
async def open_run() -> AsyncIterator[Call]:
    async with asyncdp.Runtime("cpu*2") as runtime:
        yield lambda: runtime.run(int)


@asynccontextmanager
async def open_engine(num_lanes: int) -> AsyncIterator[Call]:
    inputs = torch.randn(64, 16)
    async with frozen_engine(num_lanes) as engine:
        yield lambda: engine(inputs)


@asynccontextmanager
async def open_train_step(num_lanes: int) -> AsyncIterator[Call]:
    module, inputs, targets = small_module(), torch.randn(64, 16), torch.randn(64, 4)
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    async with asyncdp.DataParallel(module, f"cpu*{num_lanes}", num_lanes="all") as engine:
        yield lambda: engine.train_step(inputs, targets, functional.mse_loss, optimizer)


@asynccontextmanager
async def open_batcher() -> AsyncIterator[Call]:
    sample = torch.randn(16)
    async with frozen_engine(2) as engine, asyncdp.Batcher(engine) as batcher:
        yield lambda: batcher(sample)


ROWS = {
    "runtime.run": open_run,
    "engine, one lane": lambda: open_engine(1),
    "engine, two lanes": lambda: open_engine(2),
    "train_step, one lane": lambda: open_train_step(1),
    "train_step, two lanes": lambda: open_train_step(2),
    "lone Batcher call, engine of two lanes": open_batcher,
}


async def count_all() -> dict[str, dict[str, int]]:
    """Return the medians of every row."""
    counter = Counter()
    counter.install()
    found = {}
    for name, opened in ROWS.items():
        async with opened() as call:
            for _ in range(NUM_WARM_UP):
                await call()
            counts = []
            for _ in range(NUM_CALLS):
                await asyncio.sleep(0.01)  # what a call leaves to do after its result is not the next one's
                counts.append(await counter.count(call))
        medians = map(statistics.median_low, zip(*counts, strict=True))
        found[name] = dict(zip(COUNTS, medians, strict=True))
    return found


def as_table(found: dict[str, dict[str, dict[str, int]]]) -> str:
    """Return the counts of all trees side by side, as Markdown."""
    lines = [
        "| one warm call | " + " | ".join(f"{tree}: {', '.join(COUNTS)}" for tree in found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for name in ROWS:
        cells = [" / ".join(str(rows[name][count]) for count in COUNTS) for rows in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Count, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="count an earlier commit, too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        answer(asyncio.run(count_all()))
        return
    found = {}
    if options.against:
        with checked_out(options.against) as tree:
            found[options.against] = run_on(tree, __file__, "--measure")
    found["this tree"] = asyncio.run(count_all())
    print(json.dumps(found, indent=2) if options.json else as_table(found))


if __name__ == "__main__":
    main()
