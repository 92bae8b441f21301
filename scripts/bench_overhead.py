"""What asyncdp itself costs, beside what one would write by hand; all candidates interleaved in one run.

Waking a core that has gone to sleep takes longer than all the code of a call, above all in a virtual
machine. So the calls are timed twice: with the cores as they are, and with each of them kept awake by
a process of idle priority, which gives way to anything else. The second tells the code's own cost.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio.to_thread
import torch
from machine import cores_awake, origin, save
from torch import nn

import asyncdp

CALLS_PER_TURN = 23
Candidate = Callable[[], Awaitable[Any]]


def nothing() -> None:
    """Do nothing: all that a call of this costs is overhead."""


async def interleaved(candidates: dict[str, Candidate], rounds: int) -> dict[str, float]:
    """Return the median microseconds of each candidate; in each round all have a turn, in random order."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds + rounds // 10):
        random.shuffle(names)
        for name in names:
            taken = []
            for _ in range(CALLS_PER_TURN):
                started = time.perf_counter()
                await candidates[name]()
                taken.append(time.perf_counter() - started)
            if number >= rounds // 10:  # the first rounds warm up
                # Nor does a candidate pay for what the thread of the one before still does.
                times[name] += taken[3:]
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


class BareHop:
    """A call on a thread and back with nothing around it: what no way of doing this can go below."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Lock()
        self._wake.acquire()
        self._done = os.eventfd(0, os.EFD_NONBLOCK)
        self._loop.add_reader(self._done, self._settle)
        self._future: asyncio.Future[None] | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            nothing()
            os.eventfd_write(self._done, 1)

    def _settle(self) -> None:
        os.eventfd_read(self._done)
        assert self._future is not None
        self._future.set_result(None)

    async def call(self) -> None:
        """Call `nothing` there."""
        self._future = self._loop.create_future()
        self._wake.release()
        await self._future


async def call_overhead(rounds: int) -> dict[str, float]:
    """Time one awaited call of a function that does nothing."""
    loop = asyncio.get_running_loop()
    async with asyncdp.Runtime("cpu*2") as runtime:
        lane, bare = runtime.lanes[0], BareHop()
        with ThreadPoolExecutor(2) as pool:
            return await interleaved(
                {
                    "runtime.run": lambda: runtime.run(nothing, lane=lane),
                    "asyncio.to_thread": lambda: asyncio.to_thread(nothing),
                    "anyio.to_thread": lambda: anyio.to_thread.run_sync(nothing),
                    "run_in_executor": lambda: loop.run_in_executor(pool, nothing),
                    "a bare hop, by lock and eventfd": bare.call,
                },
                rounds,
            )


async def spin_overhead(rounds: int) -> dict[str, float]:
    """Time one awaited call of a function that does nothing, on lanes that sleep at once or spin before."""
    async with asyncdp.Runtime("cpu") as sleeping, asyncdp.Runtime("cpu", spin=1e-3) as spinning:
        return await interleaved(
            {
                "runtime.run": lambda: sleeping.run(nothing),
                "runtime.run, spin=1e-3": lambda: spinning.run(nothing),
                "asyncio.to_thread": lambda: asyncio.to_thread(nothing),
            },
            rounds,
        )


async def pass_overhead(rounds: int) -> dict[str, float]:
    """Time a whole pass of an identity module over two CPU lanes."""
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


def in_bare_threads(module: nn.Module, batches: list[torch.Tensor], num_threads: int) -> list[torch.Tensor]:
    """Run a stream of batches as one would write it by hand, without anything that `map` promises."""
    results = [torch.empty(0)] * len(batches)
    numbered, lock = iter(enumerate(batches)), threading.Lock()

    def work() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            while True:
                with lock:
                    index, batch = next(numbered, (-1, None))
                if batch is None:
                    return
                results[index] = module(batch)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


async def stream_cost(rounds: int, num_batches: int = 1000) -> dict[str, dict[str, float]]:
    """Return the microseconds of a batch in a stream of small ones, through `map` and by hand, by module.

    Every lane and thread has one intra-op thread.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mlp = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).eval()
    found: dict[str, dict[str, float]] = {}

    async def mapped(engine: asyncdp.DataParallel, batches: list[torch.Tensor]) -> None:
        with torch.no_grad():
            results = engine.map(batches)
        assert len([result async for result in results]) == len(batches)

    for name, module, shape in (("nothing", nn.Identity(), (8, 8)), ("8 x Linear(256)", mlp, (32, 256))):
        batches = list(torch.randn(num_batches, *shape))
        times: dict[str, list[float]] = {"map, one lane": [], "map, two lanes": [], "two bare threads": []}
        async with (
            asyncdp.DataParallel(module, "cpu") as one,
            asyncdp.DataParallel(module, "cpu*2") as two,
        ):
            for number in range(rounds + 1):
                for candidate in random.sample([*times], len(times)):
                    started = time.perf_counter()
                    if candidate == "two bare threads":
                        in_bare_threads(module, batches, 2)
                    else:
                        await mapped(one if candidate == "map, one lane" else two, batches)
                    if number > 0:  # the first round warms up
                        times[candidate].append((time.perf_counter() - started) / num_batches * 1e6)
        found[name] = {candidate: statistics.median(values) for candidate, values in times.items()}
    torch.set_num_threads(num_threads)
    return found


async def tracing_cost(rounds: int) -> dict[str, float]:
    """Return the microseconds of an awaited call without and with a recorder."""
    times: dict[bool, list[float]] = {False: [], True: []}
    with TemporaryDirectory() as folder:
        async with asyncdp.Runtime("cpu") as runtime:
            for number in range(2 * rounds):
                traced = number % 2 == 1
                recorder = asyncdp.TraceRecorder(Path(folder) / "trace.json") if traced else nullcontext()
                async with recorder:
                    for _ in range(CALLS_PER_TURN):
                        started = time.perf_counter()
                        await runtime.run(nothing)
                        times[traced].append(time.perf_counter() - started)
    return {
        "no recorder": statistics.median(times[False]) * 1e6,
        "recording": statistics.median(times[True]) * 1e6,
    }


async def loop_stalls(seconds: float) -> dict[str, float]:
    """Return how many milliseconds late a 1 ms timer fires while a large forward runs on lanes or inline."""
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
    """Return the seconds a fresh interpreter takes to import torch, and torch together with asyncdp."""
    # The package itself is lazy: naming something of it is what imports the rest.
    codes = {"import torch": "import torch", "import asyncdp": "import asyncdp; asyncdp.DataParallel"}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, values in times.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", codes[name]], check=True)
            values.append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def _table(title: str, base: str, times: dict[str, dict[str, float]]) -> list[str]:
    ours, awake = times["as they are"], times["awake"]
    return [
        f"| {title} | us | of {base} | cores awake, us | of {base} |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {us:.0f} | {us / ours[base]:.2f} "
            f"| {awake[name]:.0f} | {awake[name] / awake[base]:.2f} |"
            for name, us in ours.items()
        ),
    ]


def report(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    stalls, imports = result["stall_ms"], result["import_s"]
    rows = [
        "# What asyncdp itself costs",
        "",
        f"`scripts/bench_overhead --rounds {result['rounds']}`, {result['date']}, commit {result['commit']},",
        f"{result['machine']}, Python {result['python']}, torch {result['torch']}.",
        "Medians of interleaved calls; the ratios are what to look at, since machines differ. Calls are",
        "timed with the cores as they are, and with a process of idle priority on each that keeps it from",
        "sleeping: waking a core can take longer than all the code of a call.",
        "",
        *_table("one awaited call that does nothing", "asyncio.to_thread", result["call_us"]),
        "",
        *_table(
            "a pass of an identity module, 64 rows, two CPU lanes",
            "gather of two to_thread",
            result["pass_us"],
        ),
        "",
        f"| a stream of 1,000 batches, us per batch | {' | '.join(result['stream_us'])} |",
        "|---|" + "---|" * len(result["stream_us"]),
        *(
            f"| {name} | {' | '.join(f'{times[name]:.0f}' for times in result['stream_us'].values())} |"
            for name in result["stream_us"]["nothing"]
        ),
        "",
        "| one awaited call | us |",
        "|---|---|",
        *(f"| {name} | {us:.2f} |" for name, us in result["tracing_us"].items()),
        "",
        "| loop stall while 8 x Linear(1024) runs at batch 1024 | p99, ms | worst, ms |",
        "|---|---|---|",
        *(
            f"| {name} | {stalls[f'{name} p99']:.1f} | {stalls[f'{name} worst']:.1f} |"
            for name in ("engine", "inline")
        ),
        "",
        "| one call, lanes that spin beside others | us |",
        "|---|---|",
        *(f"| {name} | {us:.0f} |" for name, us in result["spin_us"].items()),
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
    parser.add_argument("--rounds", type=int, default=200, help=f"turns of {CALLS_PER_TURN} calls each")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each stall measurement")
    options = parser.parse_args()
    call_us = {"as they are": asyncio.run(call_overhead(options.rounds))}
    pass_us = {"as they are": asyncio.run(pass_overhead(options.rounds))}
    with cores_awake():
        call_us["awake"] = asyncio.run(call_overhead(options.rounds))
        pass_us["awake"] = asyncio.run(pass_overhead(options.rounds))
    result = {
        **origin(),
        "rounds": options.rounds,
        "call_us": call_us,
        "pass_us": pass_us,
        "spin_us": asyncio.run(spin_overhead(options.rounds)),
        "stream_us": asyncio.run(stream_cost(max(3, options.rounds // 20))),
        "tracing_us": asyncio.run(tracing_cost(options.rounds)),
        "stall_ms": asyncio.run(loop_stalls(options.seconds)),
        "import_s": import_cost(),
    }
    save("bench_overhead", result, report(result))


if __name__ == "__main__":
    main()
