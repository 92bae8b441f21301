"""Load on the embedding service over HTTP: closed loop, open loop, and large requests beside small ones."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_infer import find_sentences
from machine import RESULTS, load, origin, save
from service_client import (
    Answer,
    Ask,
    closed_loop,
    connected,
    embed,
    open_loop,
    percentiles,
    serving,
    statuses,
)

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "embedding_service.py"
NUM_LARGE = 64  # texts of a large request
LARGE_SHARE = 0.5  # of all texts


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Return rate, times and statuses of some answers."""
    num_good = sum(answer.status == 200 for answer in answers)
    return {"rate": num_good / seconds, **percentiles(answers), "statuses": statuses(answers)}


async def measure(url: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure a service: first what it can do, then how it does at shares of that."""
    texts = itertools.cycle(find_sentences(2048))
    chance = random.Random(0)
    results: dict[str, Any] = {"closed": {}, "open": {}}
    async with connected(url) as session:

        def asking(count: int = 1) -> Ask:
            async def ask() -> int:
                return (await embed(session, list(itertools.islice(texts, count))))[0]

            return ask

        await closed_loop(asking(), 32, min(5.0, chosen.seconds))  # warms up
        for count in chosen.clients:
            answers = await closed_loop(asking(), count, chosen.seconds)
            results["closed"][str(count)] = summary(answers, chosen.seconds)
        capacity = max(each["rate"] for each in results["closed"].values())
        for share in chosen.loads:
            rate = share * capacity
            answers = await open_loop(asking(), rate, chosen.seconds, chance)
            results["open"][f"{share:g}"] = {"offered": rate, **summary(answers, chosen.seconds)}
        rate = 0.8 * capacity
        small, large = await asyncio.gather(
            open_loop(asking(), rate * (1 - LARGE_SHARE), chosen.seconds, chance),
            open_loop(asking(NUM_LARGE), rate * LARGE_SHARE / NUM_LARGE, chosen.seconds, chance),
        )
        results["mixed"] = {"small": summary(small, chosen.seconds), "large": summary(large, chosen.seconds)}
    return results


def as_table(results: dict[str, Any]) -> str:
    """Return the results as a page."""

    def cells(found: dict[str, Any]) -> str:
        names = ("p50", "p90", "p99", "longest")
        times = " | ".join(f"{found[name] * 1e3:.0f}" if name in found else "-" for name in names)
        told = ", ".join(f"{count} x {status}" for status, count in found["statuses"].items())
        return f"{found['rate']:.1f} | {times} | {told} |"

    head = "p50, ms | p90, ms | p99, ms | longest, ms | answers |"
    lines = [
        "# Load on the embedding service",
        "",
        f"`scripts/load_service --seconds {results['seconds']:g}`,",
        f"{results['date']}, commit {results['commit']},",
        f"{results['machine']}, Python {results['python']}, torch {results['torch']}.",
        f"Load of the machine before and after: {results['load']}.",
        "The client shares the cores with the service.",
        "A request is one sentence, MiniLM; times are those of the answers with status 200.",
        "",
        "Closed loop: each client asks anew when it has its answer.",
        "",
        f"| clients | answers/s | {head}",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {count} | {cells(found)}" for count, found in results["closed"].items()]
    lines += [
        "",
        "Open loop: requests come at random moments, whatever the answers do, and are timed from when they",
        "were to be sent. The load is a share of the highest rate above; beyond 1 the queue fills, and the",
        "rest is refused.",
        "",
        f"| load | offered/s | answers/s | {head}",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {share} | {found['offered']:.1f} | {cells(found)}" for share, found in results["open"].items()
    ]
    lines += [
        "",
        f"Open loop at a load of 0.8, where half of the texts come in requests of {NUM_LARGE}.",
        "",
        f"| requests | answers/s | {head}",
        "|---|---|---|---|---|---|---|",
        f"| of 1 text | {cells(results['mixed']['small'])}",
        f"| of {NUM_LARGE} texts | {cells(results['mixed']['large'])}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a service that runs; else the example is started")
    parser.add_argument("--devices", help="of the example")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.25, 0.5, 0.8, 0.95, 2.0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    chosen = parser.parse_args()
    before = load()
    with contextlib.ExitStack() as stack:
        url = chosen.url
        if url is None:
            devices = [] if chosen.devices is None else ["--devices", chosen.devices]
            _, url = stack.enter_context(serving([str(EXAMPLE), *devices]))
        results = {**origin(), "seconds": chosen.seconds, **asyncio.run(measure(url, chosen))}
    results["load"] = f"{before:.2f}, {load():.2f}"
    save("load_service", results, as_table(results), chosen.out)


if __name__ == "__main__":
    main()
