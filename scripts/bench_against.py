"""This tree beside an earlier commit of it: overhead, serving, training and streams, in turns.

Times of a single run tell more of the machine than of the code. Here the two trees alternate, every
turn in a process of its own, measured by this tree's code; both ran on the same machine in the same
minutes, so their ratio tells what the changes between them have made of it.

With `--busy N`, N other processes compute all the time: what is quick on an idle machine only because it
takes time from others becomes slow beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from machine import busy_processes, origin, save
from torch import nn
from torch.nn import functional
from trees import THIS, answer, checked_out, run_on

import asyncdp

NUM_SENTENCES = 512
NUM_BATCHES = 200
STALL, CLIENT_STALL = "loop stall p99 while a large forward runs, ms", "{} clients, loop stall p99, ms"
CONTROLS = {
    "asyncio.to_thread, us": "asyncio.to_thread",
    "plain training step, us": "plain",
}
"""Not asyncdp's: how far their ratios are from 1 tells how far the others may be trusted."""


def small_mlp() -> nn.Module:
    """Return a module so small that most of a step is overhead."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer that steps by torch's loop in every tree, whatever it is left to choose."""
    return torch.optim.SGD(module.parameters(), 0.01, foreach=False)


async def training_steps(rounds: int) -> dict[str, float]:
    """Time a step of a small MLP on one lane, on two, and in plain torch on the loop's thread."""
    import bench_overhead

    inputs, targets = torch.randn(64, 64), torch.randint(0, 10, (64,))
    plain, single, double = small_mlp(), small_mlp(), small_mlp()
    optimizers = {module: sgd(module) for module in (plain, single, double)}

    async def plain_step() -> None:
        optimizers[plain].zero_grad()
        functional.cross_entropy(plain(inputs), targets).backward()
        optimizers[plain].step()

    async with (
        asyncdp.DataParallel(single, "cpu") as one_lane,
        asyncdp.DataParallel(double, "cpu*2", num_lanes="all") as two_lanes,
    ):
        loss_fn = functional.cross_entropy
        return await bench_overhead.interleaved(
            {
                "plain": plain_step,
                "one lane": lambda: one_lane.train_step(inputs, targets, loss_fn, optimizers[single]),
                "two lanes": lambda: two_lanes.train_step(inputs, targets, loss_fn, optimizers[double]),
            },
            rounds,
        )


async def stream_cost(rounds: int) -> float:
    """Return the microseconds per batch of a stream of identity batches over two lanes."""
    batches, times = [torch.randn(16, 16)] * NUM_BATCHES, []
    async with asyncdp.DataParallel(nn.Identity(), "cpu*2") as engine:
        for _ in range(rounds + 1):
            started = time.perf_counter()
            async for _ in engine.map(batches):
                pass
            times.append((time.perf_counter() - started) / NUM_BATCHES * 1e6)
    return statistics.median(times[1:])


async def client_figures(counts: Iterable[int]) -> dict[str, float]:
    """Return the rates and stalls of closed-loop clients of MiniLM."""
    import bench_serving
    import serving_contender

    sentences, chance, figures = bench_serving.find_sentences(2048), random.Random(0), {}
    async with serving_contender.open_asyncdp(bench_serving.MODEL) as call:
        await serving_contender.run_round(call, 64, sentences[:NUM_SENTENCES])
        for count in counts:
            rounds = [
                await serving_contender.run_round(call, count, chance.sample(sentences, NUM_SENTENCES))
                for _ in range(3)
            ]
            rates = [NUM_SENTENCES / each["seconds"] for each in rounds]
            stalls = [each["stall_p99"] * 1e3 for each in rounds]
            figures[f"{count} clients, MiniLM, sentences/s"] = statistics.median(rates)
            figures[CLIENT_STALL.format(count)] = statistics.median(stalls)
    return figures


async def measure(*, quick: bool) -> dict[str, float]:
    """Return all figures of the asyncdp that this process imports."""
    import bench_overhead
    import bench_serving

    calls = await bench_overhead.call_overhead(60)
    passes = await bench_overhead.pass_overhead(40)
    steps = await training_steps(40)
    fixed = await bench_serving.bench_fixed_cost(4)
    times = calls | passes | steps
    figures = {
        **{name: times[measured] for name, measured in CONTROLS.items()},
        "runtime.run, us": calls["runtime.run"],
        **{
            f"{name}, us": passes[name]
            for name in ("engine, both lanes", "engine, automatic", "data_parallel")
        },
        **{f"train_step, {name}, us": steps[name] for name in ("one lane", "two lanes")},
        "map, us per batch": await stream_cost(5),
        **{
            f"Batcher, callers at once: {count}, us per call": cost["us"]
            for count, cost in fixed["Batcher, engine on two lanes"].items()
        },
    }
    if not quick:
        figures[STALL] = (await bench_overhead.loop_stalls(2.0))["engine p99"]
        figures |= await client_figures((64, 256))
    return figures


def race(earlier: str, rounds: int, options: list[str]) -> dict[str, list[dict[str, float]]]:
    """Return the figures of every turn of both trees."""
    turns: dict[str, list[dict[str, float]]] = {"earlier": [], "now": []}
    with checked_out(earlier) as tree:
        trees = {"earlier": tree, "now": THIS}
        for number in range(rounds):
            for name in random.sample(list(trees), 2):
                turns[name].append(run_on(trees[name], __file__, "--measure", *options))
            print(f"{number + 1} of {rounds} rounds", file=sys.stderr, flush=True)
    return turns


def as_table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    turns = result["turns"]
    beside = f", beside {result['busy']} busy processes" if result["busy"] else ""
    lines = [
        f"# Commit {result['commit']} beside {result['earlier']}{beside}",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']},",
        f"Python {result['python']}, torch {result['torch']}. Medians over turns of the two trees, each in a",
        "process of its own; the ratio is the median of those of turns beside each other, in brackets the",
        f"quartiles. The first {len(CONTROLS)} rows are controls: they show how noisy the machine is.",
        "",
        f"| | {result['earlier']} | {result['commit']} | now / earlier |",
        "|---|---|---|---|",
    ]
    for name in turns["now"][0]:
        earlier, now = ([turn[name] for turn in turns[tree]] for tree in ("earlier", "now"))
        ratios = [new / old for new, old in zip(now, earlier, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(
            f"| {name} | {statistics.median(earlier):.4g} | {statistics.median(now):.4g} "
            f"| {middle:.2f} ({low:.2f} - {high:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", help="the earlier one")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each tree, of about 45 s")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="processes that compute beside")
    parser.add_argument("--quick", action="store_true", help="leave out MiniLM and the stalls: 20 s a turn")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        answer(asyncio.run(measure(quick=options.quick)))
        return
    if options.commit is None or options.rounds < 2:
        parser.error("name the earlier commit, and at least 2 rounds.")
    with busy_processes(options.busy) if options.busy else nullcontext():
        turns = race(options.commit, options.rounds, ["--quick"] if options.quick else [])
    result = {
        "earlier": options.commit,
        **origin(),
        "command": " ".join(["scripts/bench_against", *sys.argv[1:]]),
        "busy": options.busy,
        "turns": turns,
    }
    save("bench_against_busy" if options.busy else "bench_against", result, as_table(result))


if __name__ == "__main__":
    main()
