"""What bad samples cost their neighbours: good answers per second of a `Batcher`, by their share.

The model takes as long for one sample as for a full batch ("fixed"), which is the dearest case, since a run
that raises then wastes the most, or a time in proportion to its samples, as most models on a CPU do. It
raises either before it computes ("early", as one that checks its input) or after ("late"). Where the time
is fixed, a search by runs that only say whether they raise has a bound: if a share p of the samples is bad,
each of them holds H(p) bits, and a run tells no more than one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import statistics
import time
from collections import defaultdict
from typing import Any

from machine import load, origin, save

from asyncdp import Batcher, Runtime

BATCH_SIZE = 32


class Model:
    """Takes its time for a batch, and raises if a sample is bad.

    Args:
        seconds: for a full batch.
        is_early: whether it raises before it takes its time.
        is_fixed: whether smaller batches take as long.
    """

    def __init__(self, seconds: float, *, is_early: bool = False, is_fixed: bool = True) -> None:
        self.seconds = seconds
        self.is_early = is_early
        self.is_fixed = is_fixed
        self.is_down = False
        self.num_runs = 0

    def __call__(self, batch: list[bool]) -> list[bool]:
        """Return the batch, each sample of which says whether it is bad."""
        self.num_runs += 1
        is_bad = self.is_down or any(batch)
        if is_bad and self.is_early:
            raise ValueError("bad")
        time.sleep(self.seconds * (1.0 if self.is_fixed else len(batch) / BATCH_SIZE))
        if is_bad:
            raise ValueError("bad")
        return batch


def batcher_of(model: Model, runtime: Runtime) -> Batcher:
    """Serve a model on one lane."""
    return Batcher(
        model,
        max_batch_size=BATCH_SIZE,
        collate=list,
        split=lambda output, _: output,
        runtime=runtime,
    )


async def serve(model: Model, share: float, clients: int, seconds: float) -> dict[str, float]:
    """Return good answers per second and the latency of good calls, with clients that call again at once."""
    chance = random.Random(0)
    latencies: list[float] = []

    async def client(batcher: Batcher) -> None:
        while time.perf_counter() < until:
            is_bad = chance.random() < share
            began = time.perf_counter()
            try:
                answer = await batcher(is_bad)
            except ValueError:
                assert is_bad
            else:
                assert answer is is_bad is False
                latencies.append(time.perf_counter() - began)

    async with Runtime("cpu") as runtime, batcher_of(model, runtime) as batcher:
        began = time.perf_counter()
        until = began + seconds
        await asyncio.gather(*(client(batcher) for _ in range(clients)))
        rate = len(latencies) / (time.perf_counter() - began)
    return {"rate": rate, "p99_ms": statistics.quantiles(latencies, n=100)[98] * 1e3}


async def raised_cost(model: Model) -> float:
    """Return the time of a run that raises, of that of one that succeeds."""
    times: dict[bool, list[float]] = {False: [], True: []}
    async with Runtime("cpu") as runtime, batcher_of(model, runtime) as batcher:
        for is_bad in [False, True] * 20:
            began = time.perf_counter()
            await asyncio.gather(batcher(is_bad), return_exceptions=True)
            times[is_bad].append(time.perf_counter() - began)
    return min(1.0, statistics.median(times[True]) / statistics.median(times[False]))


def bound(share: float, cost: float) -> float:
    """Return the most that the rate of good answers can be, of that without bad samples.

    A run that raises costs `cost`. Runs that succeed with a chance of x, where x + x ** cost = 1, say most
    for what they cost: -log(x).
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        x = (low + high) / 2
        low, high = (x, high) if x + x**cost < 1 else (low, x)
    entropy = -share * math.log(share) - (1 - share) * math.log1p(-share)
    return min(1.0, (1 - share) * -math.log(low) / entropy / BATCH_SIZE)


async def runs_when_down(model: Model, num_batches: int = 8) -> list[int]:
    """Return how often a model that is down runs for each of some batches, one after the other."""
    found = []
    model.is_down = True
    async with Runtime("cpu") as runtime, batcher_of(model, runtime) as batcher:
        for _ in range(num_batches):
            model.num_runs = 0
            await asyncio.gather(*(batcher(False) for _ in range(BATCH_SIZE)), return_exceptions=True)
            found.append(model.num_runs)
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all shares in turns."""
    model_seconds = options.milliseconds / 1e3
    raising = {"early": True, "late": False}
    timing = {"fixed": True, "in proportion": False}
    costs = {
        kind: await raised_cost(Model(model_seconds, is_early=is_early)) for kind, is_early in raising.items()
    }
    cases = [
        *((timed, "late", 0.0) for timed in timing),
        *itertools.product(timing, raising, options.shares),
    ]
    rounds: dict[tuple[str, str, float], list[dict[str, float]]] = defaultdict(list)
    for _ in range(options.rounds):
        for timed, kind, share in random.sample(cases, len(cases)):
            model = Model(model_seconds, is_early=raising[kind], is_fixed=timing[timed])
            rounds[timed, kind, share].append(await serve(model, share, options.clients, options.seconds))
    medians = {
        case: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for case, found in rounds.items()
    }
    clean = {timed: medians.pop((timed, "late", 0.0)) for timed in timing}
    rows = [
        {
            "time": timed,
            "kind": kind,
            "share": share,
            **found,
            "of_clean": found["rate"] / clean[timed]["rate"],
            "bound": bound(share, costs[kind]) if timing[timed] else None,
        }
        for (timed, kind, share), found in sorted(medians.items())
    ]
    down = await runs_when_down(Model(model_seconds, is_early=False))
    return {"clean": clean, "costs": costs, "rows": rows, "runs_when_down": down}


def report(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    clean = result["clean"]
    lines = [
        "# What bad samples cost",
        "",
        f"`scripts/bench_poison --rounds {result['rounds']} --seconds {result['seconds']:g}`,",
        f"{result['date']}, commit {result['commit']},",
        f"{result['machine']}, Python {result['python']}, torch {result['torch']}.",
        f"Load of the machine before and after: {result['load']}.",
        f"A model on one lane takes {result['milliseconds']:g} ms for a batch of {BATCH_SIZE} samples,",
        f"for smaller ones the same (fixed) or less in proportion; {result['clients']} clients call again at",
        f"once. Where the time is fixed, a run that raises early takes {result['costs']['early']:.2f}",
        "of that of one that succeeds. The bound is what no search by",
        "runs that say only whether they raise can exceed: a sample holds H(p) bits, a run tells one.",
        "",
        "| time | bad samples | raises | good answers/s | of clean | bound | p99 of good calls, ms |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {timed} | none | | {found['rate']:.0f} | 1.00 | | {found['p99_ms']:.0f} |"
            for timed, found in clean.items()
        ),
        *(
            f"| {row['time']} | {row['share']:.0%} | {row['kind']} | {row['rate']:.0f} "
            f"| {row['of_clean']:.2f} | {'' if row['bound'] is None else format(row['bound'], '.2f')} "
            f"| {row['p99_ms']:.0f} |"
            for row in result["rows"]
        ),
        "",
        f"Runs of a model that is down, for one batch after another: {result['runs_when_down']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--milliseconds", type=float, default=10.0, help="that the model takes for a batch")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05], help="of bad samples")
    options = parser.parse_args()
    before = load()
    result = {**origin(), **vars(options), **asyncio.run(measure(options))}
    result["load"] = f"{before:.2f}, {load():.2f}"
    save("bench_poison", result, report(result))


if __name__ == "__main__":
    main()
