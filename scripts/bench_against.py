"""This tree beside an earlier commit of it: overhead and serving, in turns.

Times of a single run tell more of the machine than of the code. Here the two trees alternate, every
turn in a process of its own, measured by this tree's code; both ran on the same machine in the same
minutes, so their ratio tells what the changes between them have made of it.
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
import tempfile
from pathlib import Path

from machine import origin

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
NUM_SENTENCES = 512
STALL, CLIENT_STALL = "loop stall p99 while a large forward runs, ms", "{} clients, loop stall p99, ms"
CONTROL = "asyncio.to_thread, us"
"""Not ours: how far its ratio is from 1 tells how far the others may be trusted."""


async def measure() -> dict[str, float]:
    """All figures of the asyncdp that this process imports."""
    import bench_overhead
    import bench_serving
    import serving_contender

    calls = await bench_overhead.call_overhead(60)
    passes = await bench_overhead.pass_overhead(40)
    stalls = await bench_overhead.loop_stalls(2.0)
    fixed = (await bench_serving.bench_fixed_cost(4))["Batcher, engine on two lanes"]
    figures = {
        CONTROL: calls["asyncio.to_thread"],
        "runtime.run, us": calls["runtime.run"],
        **{
            f"{name}, us": passes[name]
            for name in ("engine, both lanes", "engine, automatic", "data_parallel")
        },
        STALL: stalls["engine p99"],
        **{f"Batcher, callers at once: {count}, us per call": cost["us"] for count, cost in fixed.items()},
    }
    sentences, chance = bench_serving.find_sentences(2048), random.Random(0)
    async with serving_contender.open_asyncdp(bench_serving.MODEL) as call:
        await serving_contender.run_round(call, 64, sentences[:NUM_SENTENCES])
        for count in (64, 256):
            rounds = [
                await serving_contender.run_round(call, count, chance.sample(sentences, NUM_SENTENCES))
                for _ in range(3)
            ]
            figures[f"{count} clients, MiniLM, sentences/s"] = statistics.median(
                NUM_SENTENCES / each["seconds"] for each in rounds
            )
            figures[CLIENT_STALL.format(count)] = (
                statistics.median(each["stall_p99"] for each in rounds) * 1e3
            )
    return figures


def take_turn(tree: Path) -> dict[str, float]:
    """Measure a tree in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure"],
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    if Path(told.pop("tree")) != tree:
        raise SystemExit(f"asyncdp was not imported from {tree}")
    return told  # type: ignore[no-any-return]


def race(earlier: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """The figures of every turn of both trees."""
    found: dict[str, list[dict[str, float]]] = {"earlier": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "earlier"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, earlier], check=True)
        try:
            trees = {"earlier": tree, "now": HERE.parent.resolve()}
            for number in range(rounds):
                for name in random.sample(list(trees), 2):
                    found[name].append(take_turn(trees[name]))
                print(f"{number + 1} of {rounds} rounds", file=sys.stderr, flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], check=True)
    return found


def as_table(result: dict[str, object], found: dict[str, list[dict[str, float]]]) -> str:
    """The result as Markdown."""
    lines = [
        f"# Commit {result['commit']} beside {result['earlier']}",
        "",
        f"`scripts/bench_against {result['earlier']} --rounds {len(found['now'])}`, {result['date']}, "
        f"{result['machine']},",
        f"Python {result['python']}, torch {result['torch']}. Medians over turns of the two trees, each in a",
        "process of its own; the ratio is the median of those of turns beside each other, in brackets the",
        "quartiles. The first row is not asyncdp's: it tells how much of a ratio is the machine's doing.",
        "",
        f"| | {result['earlier']} | {result['commit']} | now / earlier |",
        "|---|---|---|---|",
    ]
    for name in found["now"][0]:
        earlier, now = ([turn[name] for turn in found[tree]] for tree in ("earlier", "now"))
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
    parser.add_argument("--rounds", type=int, default=8, help="turns of each tree, of about 40 s")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        import asyncdp

        tree = Path(asyncdp.__file__).resolve().parent.parent
        print(json.dumps({"tree": str(tree), **asyncio.run(measure())}))
        return
    if options.commit is None or options.rounds < 2:
        parser.error("name the earlier commit, and at least 2 rounds.")
    found = race(options.commit, options.rounds)
    result = {
        "earlier": options.commit,
        **origin(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "bench_against.json").write_text(json.dumps(result | {"turns": found}, indent=2) + "\n")
    text = as_table(result, found)
    (RESULTS / "bench_against.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
