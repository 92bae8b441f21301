"""What asyncdp itself costs, beside what one would write by hand; all candidates interleaved in one run."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio.to_thread
import torch
from torch import nn

import asyncdp

RESULTS = Path(__file__).parent.parent / "docs" / "results"
Candidate = Callable[[], Awaitable[Any]]


def nothing() -> None:
    """The work of a call whose cost is all overhead."""


async def interleaved(candidates: dict[str, Candidate], rounds: int) -> dict[str, float]:
    """Median time of each candidate in microseconds; one call of each per round, in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + rounds // 10):
        for name, candidate in candidates.items():
            started = time.perf_counter()
            await candidate()
            if number >= rounds // 10:  # the first rounds warm up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


async def call_overhead(rounds: int) -> dict[str, float]:
    """One awaited call of a function that does nothing."""
    loop = asyncio.get_running_loop()
    async with asyncdp.Runtime("cpu*2") as runtime:
        lane = runtime.lanes[0]
        with ThreadPoolExecutor(2) as pool:
            return await interleaved(
                {
                    "runtime.run": lambda: runtime.run(nothing, lane=lane),
                    "asyncio.to_thread": lambda: asyncio.to_thread(nothing),
                    "anyio.to_thread": lambda: anyio.to_thread.run_sync(nothing),
                    "run_in_executor": lambda: loop.run_in_executor(pool, nothing),
                },
                rounds,
            )


async def pass_overhead(rounds: int) -> dict[str, float]:
    """A whole pass of an identity module over two CPU lanes."""
    module, x = nn.Identity(), torch.randn(64, 16)

    async def by_hand() -> torch.Tensor:
        halves = torch.tensor_split(x, 2)
        return torch.cat(await asyncio.gather(*(asyncio.to_thread(module, half) for half in halves)))

    async with (
        asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine,
        asyncdp.DataParallel(module, "cpu*2") as auto,
    ):
        return await interleaved(
            {
                "engine, both lanes": lambda: engine(x),
                "engine, automatic": lambda: auto(x),
                "data_parallel": lambda: asyncdp.data_parallel(module, x, "cpu*2"),
                "gather of two to_thread": by_hand,
            },
            rounds,
        )


async def loop_stalls(seconds: float) -> dict[str, float]:
    """How late a 1 ms timer fires, in milliseconds, while a large forward runs in lanes or inline."""
    module = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    x = torch.randn(1024, 1024)
    found = {}
    with torch.no_grad():
        module(x)
    module.requires_grad_(False)

    async def forwards(call: Callable[[], Awaitable[Any]]) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            await call()

    async def inline() -> None:
        module(x)
        await asyncio.sleep(0)

    async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
        for name, call in {"engine": lambda: engine(x), "inline": inline}.items():
            late: list[float] = []
            task = asyncio.create_task(forwards(call))
            while not task.done():
                started = time.perf_counter()
                await asyncio.sleep(0.001)
                late.append((time.perf_counter() - started - 0.001) * 1e3)
            await task
            found[f"{name} p99"] = statistics.quantiles(late, n=100)[98]
            found[f"{name} worst"] = max(late)
    return found


def import_cost(rounds: int = 7) -> dict[str, float]:
    """Seconds that a fresh interpreter takes to import torch, and torch together with asyncdp."""
    # The package itself is lazy: naming something of it is what imports the rest.
    codes = {"import torch": "import torch", "import asyncdp": "import asyncdp; asyncdp.DataParallel"}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, values in times.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", codes[name]], check=True)
            values.append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    call, whole, stalls, imports = (
        result["call_us"],
        result["pass_us"],
        result["stall_ms"],
        result["import_s"],
    )
    base, hand = call["asyncio.to_thread"], whole["gather of two to_thread"]
    rows = [
        "# What asyncdp itself costs",
        "",
        f"`scripts/bench_overhead --rounds {result['rounds']}`, {result['date']}, commit {result['commit']},",
        f"{result['machine']}, Python {result['python']}, torch {result['torch']}.",
        "Medians of interleaved calls; the ratios are what to look at, since machines differ.",
        "",
        "| one awaited call that does nothing | us | of asyncio.to_thread |",
        "|---|---|---|",
        *(f"| {name} | {us:.0f} | {us / base:.2f} |" for name, us in call.items()),
        "",
        "| a pass of an identity module, 64 rows, two CPU lanes | us | of gather of two to_thread |",
        "|---|---|---|",
        *(f"| {name} | {us:.0f} | {us / hand:.2f} |" for name, us in whole.items()),
        "",
        "| loop stall while 8 x Linear(1024) runs at batch 1024 | p99, ms | worst, ms |",
        "|---|---|---|",
        *(
            f"| {name} | {stalls[f'{name} p99']:.1f} | {stalls[f'{name} worst']:.1f} |"
            for name in ("engine", "inline")
        ),
        "",
        "| fresh interpreter | s |",
        "|---|---|",
        *(f"| {name} | {seconds:.2f} |" for name, seconds in imports.items()),
        "",
    ]
    return "\n".join(rows)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each stall measurement")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or "unknown",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "call_us": asyncio.run(call_overhead(options.rounds)),
        "pass_us": asyncio.run(pass_overhead(options.rounds)),
        "stall_ms": asyncio.run(loop_stalls(options.seconds)),
        "import_s": import_cost(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "bench_overhead.json").write_text(json.dumps(result, indent=2) + "\n")
    text = report(result)
    (RESULTS / "bench_overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
