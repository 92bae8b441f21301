"""What a call costs as a module grows: parameters or submodules, one lane or many, beside the plain module.

The modules compute next to nothing: one has many parameters, all used by a single operation, the other many
submodules that forward leaves alone. So what is measured is what it takes to know that nothing has changed,
to give every lane its parameters, and to bring gradients back. Each kind, size and number of lanes is a
process of its own, in which the plain module and the engine take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import origin
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

SCRIPT = Path(__file__).resolve()
RESULTS = SCRIPT.parent.parent / "docs" / "results"
NUM_ROWS = 64
MIN_ROUNDS = 3
NUM_WARM_UPS = 3  # fewer, but one, where they take longer than all timed turns may
NUM_LEARNING = 24  # calls after which an engine has chosen how many lanes to take
MAX_REPLICATED = 160_000  # more parameters or submodules on all lanes together take minutes
AUTO = "auto"
"""In the place of a number of lanes: two, of which the engine takes as many as it finds quickest."""
CALLS = ("no gradients", "forward", "forward and backward", "step")
PLAIN, ENGINE = "plain", "engine"
Contender = Callable[[], Awaitable[Any]]


class ManyParameters(nn.Module):
    """Parameters of one number each, all of them used by one operation."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for position in range(count):
            self.register_parameter(f"number_{position}", nn.Parameter(torch.ones(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the rows; `parameters()` would take longer than the operation."""
        return x * torch.cat(list(self._parameters.values())).mean()


class ManySubmodules(nn.Module):
    """Submodules that forward does not call, beside one parameter."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.ones(1))
        self.others = nn.ModuleList(nn.Identity() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the rows."""
        return x * self.number


KINDS: dict[str, Callable[[int], nn.Module]] = {"parameters": ManyParameters, "submodules": ManySubmodules}


def plain_contenders(module: nn.Module, x: Tensor) -> dict[str, Contender]:
    """Return the calls of the module itself."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-6, fused=True)

    async def no_gradients() -> None:
        with torch.no_grad():
            module(x)

    async def forward() -> Tensor:
        result: Tensor = module(x)
        return result

    async def forward_and_backward() -> None:
        module(x).sum().backward()

    async def step() -> None:
        functional.mse_loss(module(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return dict(zip(CALLS, (no_gradients, forward, forward_and_backward, step), strict=True))


def engine_contenders(engine: asyncdp.DataParallel, x: Tensor) -> dict[str, Contender]:
    """Return the same calls over an engine's lanes."""
    optimizer = torch.optim.SGD(engine.module.parameters(), 1e-6, fused=True)

    async def no_gradients() -> None:
        with torch.no_grad():  # around an await only because no other task runs here
            await engine(x)

    async def forward() -> Any:
        return await engine(x)

    async def forward_and_backward() -> None:
        await asyncdp.backward((await engine(x)).sum())

    async def step() -> None:
        await engine.train_step(x, x, functional.mse_loss, optimizer)

    return dict(zip(CALLS, (no_gradients, forward, forward_and_backward, step), strict=True))


async def measure(kind: str, count: int, lanes: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Return the median seconds of each call of the plain module and of the engine, which take turns."""
    x = torch.randn(NUM_ROWS, 4)
    plain, ours = KINDS[kind](count), KINDS[kind](count)
    devices, num_lanes = ("cpu*2", "auto") if lanes == AUTO else (f"cpu*{lanes}", "all")
    found: dict[str, Any] = {"kind": kind, "count": count, "lanes": lanes}
    async with asyncdp.DataParallel(ours, devices, num_lanes=num_lanes) as engine:
        contenders = {PLAIN: plain_contenders(plain, x), ENGINE: engine_contenders(engine, x)}
        for call in CALLS:
            times: dict[str, list[float]] = {PLAIN: [], ENGINE: []}
            num_warm_ups = NUM_LEARNING if lanes == AUTO else NUM_WARM_UPS
            began = time.perf_counter()
            while len(times[PLAIN]) < rounds:
                for name in random.sample(list(times), 2):
                    started = time.perf_counter()
                    await contenders[name][call]()
                    if num_warm_ups == 0:
                        times[name].append(time.perf_counter() - started)
                for module in (plain, ours):
                    for parameter in module.parameters():
                        parameter.grad = None
                is_late = time.perf_counter() - began > seconds
                if num_warm_ups > 0:
                    num_warm_ups = 0 if is_late else num_warm_ups - 1
                    began = time.perf_counter() if num_warm_ups == 0 else began
                elif is_late and len(times[PLAIN]) >= MIN_ROUNDS:
                    break
            found[call] = {name: statistics.median(each) for name, each in times.items()}
            found[call]["rounds"] = len(times[PLAIN])
    return found


def measure_in_process(kind: str, count: int, lanes: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one size in a process that ends with its memory."""
    asked = ["--here", kind, str(count), lanes]
    limits = ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *asked, *limits], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        return {"kind": kind, "count": count, "lanes": lanes, "failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def slope(rows: Sequence[dict[str, Any]], call: str, who: str) -> float:
    """Return the microseconds that each item adds from one size to the other."""
    one, other = rows
    return float(other[call][who] - one[call][who]) / (other["count"] - one["count"]) * 1e6


def pick(rows: list[dict[str, Any]], kind: str, lanes: str) -> list[dict[str, Any]]:
    """Return what was measured of one kind of module on so many lanes, smallest first."""
    found = [row for row in rows if (row["kind"], row["lanes"]) == (kind, lanes) and "failed" not in row]
    return sorted(found, key=lambda row: row["count"])


def time_table(rows: list[dict[str, Any]], kind: str, lanes: list[str]) -> list[str]:
    """Return milliseconds of every call, of the engine and (in brackets) of the plain module beside it."""
    lines = [f"| {kind} | lanes | " + " | ".join(CALLS) + " |", "|---:|---:|" + "---:|" * len(CALLS)]
    counts = sorted({row["count"] for row in rows if row["kind"] == kind})
    for count in counts:
        for each in lanes:
            for row in pick(rows, kind, each):
                if row["count"] == count:
                    cells = [
                        f"{row[call][ENGINE] * 1e3:.3g} ({row[call][PLAIN] * 1e3:.3g})" for call in CALLS
                    ]
                    lines.append(f"| {count:,} | {each} | {' | '.join(cells)} |")
    return lines


def slope_table(rows: list[dict[str, Any]], kind: str, lanes: list[str]) -> list[str]:
    """Return microseconds per item between the sizes, of the engine and (in brackets) of the plain module."""
    lines = [
        f"| from - to {kind} | lanes | " + " | ".join(CALLS) + " |",
        "|---:|---:|" + "---:|" * len(CALLS),
    ]
    for each in lanes:
        found = pick(rows, kind, each)
        for pair in pairwise(found):
            cells = [f"{slope(pair, call, ENGINE):.2f} ({slope(pair, call, PLAIN):.2f})" for call in CALLS]
            sizes = f"{pair[0]['count']:,} - {pair[1]['count']:,}"
            lines.append(f"| {sizes} | {each} | {' | '.join(cells)} |")
    return lines


def as_markdown(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    rows, lanes = result["rows"], result["lanes"]
    lines = [
        "# What calls cost as modules grow",
        "",
        f"`{result['command']}`, commit {result['commit']}, {result['date']}, {result['machine']}, Python "
        f"{result['python']}, torch {result['torch']}; load before it: {result['load']:.1f}. Medians of "
        "calls that take turns with those of the plain module, which are in brackets; "
        f"{NUM_ROWS} rows of 4 numbers. The modules compute next to nothing: one has parameters of one "
        "number each, all used by one operation, the other submodules that forward does not call. Lanes "
        "share the cores. `auto`: an engine of two lanes that takes as many as it finds quickest; the others "
        "always take all.",
        "",
        "![Times over sizes](bench_growth.svg)",
    ]
    for kind in KINDS:
        if any(row["kind"] == kind for row in rows):
            lines += ["", f"## {kind.capitalize()}", "", "Milliseconds of a call:", ""]
            lines += time_table(rows, kind, lanes)
            if len(result["counts"]) > 1:
                lines += ["", f"Microseconds for each of the {kind}:", "", *slope_table(rows, kind, lanes)]
    failed = [row for row in rows if "failed" in row]
    if failed:
        lines += ["", "Not measured, since their process failed:", ""]
        lines += [f"- {row['count']:,} {row['kind']}, lanes: {row['lanes']}" for row in failed]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw times over sizes, both logarithmic."""
    rows = result["rows"]
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    all_axes = figure.subplots(len(KINDS), len(CALLS), sharex=True, sharey=True)
    for kind, line_of_axes in zip(KINDS, all_axes, strict=True):
        for call, axes in zip(CALLS, line_of_axes, strict=True):
            for lanes in result["lanes"]:
                found = pick(rows, kind, lanes)
                label = AUTO if lanes == AUTO else f"{lanes} lane" + "s" * (lanes != "1")
                axes.plot(
                    [row["count"] for row in found],
                    [row[call][ENGINE] * 1e3 for row in found],
                    "o-",
                    markersize=3,
                    label=label,
                )
            found = pick(rows, kind, result["lanes"][0])
            axes.plot(
                [row["count"] for row in found],
                [row[call][PLAIN] * 1e3 for row in found],
                "k--",
                label="plain module",
            )
            axes.set(title=call, xlabel=kind, xscale="log", yscale="log")
            axes.grid(alpha=0.3)
        line_of_axes[0].set_ylabel("ms")
    all_axes[0][0].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=[10, 100, 1_000, 10_000], metavar="N")
    parser.add_argument(
        "--lanes", nargs="+", default=["1", "2", "4", "16", "64", AUTO], metavar="N", help="numbers, or auto"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=50, help="at most so many timed turns of each")
    parser.add_argument("--seconds", type=float, default=0.7, help="no new turn of a call after so long")
    parser.add_argument("--large", action="store_true", help="also 10,000 on 64 lanes, which take minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        kind, count, lanes = options.here
        found = asyncio.run(measure(kind, int(count), lanes, options.rounds, options.seconds))
        print(json.dumps(found))
        return
    if any(lanes != AUTO and not lanes.isdigit() for lanes in options.lanes):
        parser.error("--lanes takes numbers and auto.")
    asked = {"counts": sorted(options.counts), "lanes": options.lanes}
    result: dict[str, Any] = {**origin(), "load": os.getloadavg()[0], **asked, "rows": []}
    result["command"] = " ".join(["scripts/bench_growth", *sys.argv[1:]])
    for kind in options.kinds:
        for count in result["counts"]:
            for lanes in options.lanes:
                if lanes != AUTO and count * int(lanes) > MAX_REPLICATED and not options.large:
                    continue
                result["rows"].append(measure_in_process(kind, count, lanes, options))
                print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench_growth.json").write_text(json.dumps(result, indent=1) + "\n")
    text = as_markdown(result)
    (options.out / "bench_growth.md").write_text(text)
    draw(result, options.out / "bench_growth.svg")
    print(text)


if __name__ == "__main__":
    main()
