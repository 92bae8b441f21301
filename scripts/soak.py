"""Load on the embedding service while texts are bad, clients leave, a lane is lost and one hangs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from bench_infer import find_sentences
from machine import RESULTS, load, origin, save
from service_client import (
    BROKEN,
    Answer,
    closed_loop,
    connected,
    embed,
    open_loop,
    percentiles,
    serving,
    statuses,
)
from soak_service import FOLDER, NUM_LANES, POISON

from asyncdp.infer.model.embed import embed_steps, load_embedder

LOAD = 0.8  # of the capacity
NUM_TEXTS = 128
NUM_CLIENTS = 64  # that measure the capacity
NUM_WARMING = 256  # that warm up: every lane runs full batches, which memory depends on
SHARES = {"poison": 0.01, "cancelled": 0.02, "hung up": 0.01}  # of the requests; all others are good
LEFT = -1  # the status of a request whose client did not wait
WRONG = -2  # of an answer with another text's vector
MAX_SLOWER, MAX_GROWTH = 3.0, 1.03


class Soak:
    """Asks the service, and keeps what came of it.

    Attributes:
        counts: how requests ended, by their kind and status.
        rss: bytes of the service's memory, with the time.
        states: the states that lanes were seen in.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, process: psutil.Process) -> None:
        self.counts: dict[str, Counter[int]] = {}
        self.rss: list[tuple[float, int]] = []
        self.states: Counter[str] = Counter()
        self._session, self._process = session, process
        self._address = url.removeprefix("http://").split(":")
        self._chance = random.Random(0)
        self._texts, self._vectors = expected_vectors()
        self._places = itertools.cycle(range(NUM_TEXTS))

    async def good(self) -> int:
        """Ask for a text's vector; return the status, or `WRONG`."""
        place = next(self._places)
        status, told = await embed(self._session, [self._texts[place]])
        if status == 200:
            vector = torch.tensor(told["vectors"][0])
            if not torch.allclose(vector, self._vectors[place], atol=1e-4):
                status = WRONG
        return self._count("good", status)

    async def any_kind(self) -> int:
        """Ask as some client does; return the status if it was a good request, as most are, else `LEFT`."""
        [kind] = self._chance.choices(["good", *SHARES], [1 - sum(SHARES.values()), *SHARES.values()])
        if kind == "good":
            return await self.good()
        if kind == "poison":
            status, _ = await embed(self._session, [f"{POISON} {self._texts[0]}"])
            self._count(kind, status)
        elif kind == "cancelled":
            status = LEFT
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._chance.expovariate(20)):
                    status, _ = await embed(self._session, [self._texts[0]])
            self._count(kind, status)
        else:
            await self._hang_up()
            self._count(kind, LEFT)
        return LEFT

    async def _hang_up(self) -> None:
        """Send half of a request, and close the connection."""
        _, writer = await asyncio.open_connection(*self._address)
        writer.write(b'POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"texts": ["')
        await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def _count(self, kind: str, status: int) -> int:
        self.counts.setdefault(kind, Counter())[status] += 1
        return status

    async def watch(self) -> None:
        """Look at memory and lanes every second."""
        while True:
            self.rss.append((time.perf_counter(), self._process.memory_info().rss))
            async with self._session.get("/healthz") as answer:
                self.states.update((await answer.json())["lanes"].values())
            await asyncio.sleep(1.0)

    async def fault(self, kind: str) -> None:
        """Have a lane lost or hung."""
        async with self._session.post(f"/fault/{kind}") as answer:
            assert answer.status == 200

    async def ask(self, path: str) -> Any:
        """Return what the service tells."""
        async with self._session.get(path) as answer:
            return await answer.json()


def expected_vectors() -> tuple[list[str], torch.Tensor]:
    """Return texts without unknown characters, and their vectors by the model itself."""
    torch.set_num_threads(1)
    model, steps = load_embedder(FOLDER)[0].eval(), embed_steps(FOLDER)
    texts = [text for text in find_sentences(2 * NUM_TEXTS) if text.isascii()][:NUM_TEXTS]
    with torch.inference_mode():
        vectors = [model(**steps.collate(steps.preprocess([text])))["embedding"][0] for text in texts]
    return texts, torch.stack(vectors)


def tell(what: str) -> None:
    """Say what happens now, and when."""
    print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


async def soak(url: str, process: psutil.Process, minutes: float) -> dict[str, Any]:
    """Measure the capacity, then the service at a share of it without faults, then with them."""
    seconds = minutes * 60
    async with connected(url) as session:
        one = Soak(session, url, process)
        chance = random.Random(1)
        tell("warming up")
        await closed_loop(one.good, NUM_WARMING, max(5.0, seconds / 20))
        tell("measuring the capacity")
        measured = max(10.0, seconds / 20)
        capacity = len(await closed_loop(one.good, NUM_CLIENTS, measured)) / measured
        rate = LOAD * capacity
        tell(f"{rate:.1f} requests/s without faults")
        watching = asyncio.create_task(one.watch())
        calm = await open_loop(one.good, rate, seconds * 0.3, chance)
        one.counts.clear()
        started = time.perf_counter()
        tell("the same with bad texts and clients that leave")
        async with asyncio.TaskGroup() as group:
            faulty_load = group.create_task(open_loop(one.any_kind, rate, seconds, chance))
            await asyncio.sleep(seconds * 0.25)
            tell("losing a lane")
            await one.fault("lose")
            await asyncio.sleep(seconds * 0.25)
            tell("hanging a lane")
            await one.fault(f"hang?seconds={seconds * 0.1}")
        faulty = faulty_load.result()
        tell("all is answered")
        watching.cancel()
        return {
            "capacity": capacity,
            "rate": rate,
            "calm": {**percentiles(calm), "statuses": statuses(calm)},
            "faulty": percentiles(faulty),
            "counts": {kind: dict(sorted(counts.items())) for kind, counts in one.counts.items()},
            "rss": [(round(when - started, 1), size) for when, size in one.rss],
            "lane_seconds": dict(one.states),
            "lanes": (await one.ask("/healthz"))["lanes"],
            "statistics": await one.ask("/statistics"),
            "late_faults": late_answers(faulty, started + seconds * 0.5, seconds * 0.1),
        }


def late_answers(answers: list[Answer], began: float, seconds: float) -> dict[str, float]:
    """Return the times of those good requests that were sent while a lane hung."""
    return percentiles([each for each in answers if began <= each.began < began + seconds])


def verdict(found: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Return for each promise what was found, and whether it was kept."""
    counts = {kind: Counter(by_status) for kind, by_status in found["counts"].items()}
    good = counts["good"]
    # The calls of one batch are failed with the lane that is lost, and of one they may be late.
    num_excused = sum(good[status] for status in (503, 504))
    strange = good.total() - good[200] - num_excused + counts["poison"].total() - counts["poison"][500]
    num_broken = sum(by_status[BROKEN] for by_status in counts.values())
    ended = ("num_done", "num_failed", "num_cancelled", "num_timed_out")
    left = [
        found["statistics"][name][key]
        for name in ("tokenizer", "batcher")
        for key in ("num_queued", "num_running")
    ]
    passed_on = found["statistics"]["tokenizer"]["num_done"]
    batcher = found["statistics"]["batcher"]
    num_ended = sum(batcher[key] for key in (*ended, "num_refused"))
    growth = memory_growth(found["rss"])
    slower = found["faulty"]["p99"] / found["calm"]["p99"]
    lanes = Counter(found["lanes"].values())
    return {
        "requests without an answer": (str(num_broken), num_broken == 0),
        "good texts with another text's vector": (str(good[WRONG]), good[WRONG] == 0),
        "other answers than expected (good: 200; bad: 500)": (str(strange), strange == 0),
        "good requests failed with the lost lane, or late by the hung one": (
            f"{num_excused}, at most 64",
            num_excused <= 64,
        ),
        "calls still in a queue or a batch at the end": (str(sum(left)), sum(left) == 0),
        "texts tokenized, and calls of the model that ended": (
            f"{passed_on}, {num_ended}",
            passed_on == num_ended,
        ),
        "memory at the end, of that before the faults": (f"{growth:.3f}", growth <= MAX_GROWTH),
        "p99 of good requests, of that without faults": (f"{slower:.2f}", slower <= MAX_SLOWER),
        "lanes at the end": (
            ", ".join(f"{count} {state}" for state, count in lanes.items()),
            lanes == {"open": NUM_LANES - 1, "lost": 1},
        ),
        "seconds with a suspect lane": (
            str(found["lane_seconds"].get("suspect", 0)),
            found["lane_seconds"].get("suspect", 0) > 0,
        ),
    }


def memory_growth(rss: list[tuple[float, int]]) -> float:
    """Return the memory in the last tenth of the time with faults, as a multiple of that before them."""
    before = [size for when, size in rss if when < 0]
    return at_the_end(rss) / statistics.median(before[len(before) // 2 :])


def late_memory_growth(rss: list[tuple[float, int]]) -> float:
    """Return the same as a multiple of that after half of the time with faults: a leak would go on."""
    half = rss[-1][0] / 2
    return at_the_end(rss) / next(size for when, size in rss if when >= half)


def at_the_end(rss: list[tuple[float, int]]) -> float:
    """Return the memory in the last tenth of the time with faults, in bytes."""
    after = [size for when, size in rss if when >= 0]
    return statistics.median(after[-max(1, len(after) // 10) :])


def as_page(found: dict[str, Any]) -> str:
    """Return the result as a page."""
    names = {str(LEFT): "left", str(WRONG): "wrong vector", str(BROKEN): "no answer"}
    lines = [
        "# Soak",
        "",
        f"`scripts/soak --minutes {found['minutes']:g}`,",
        f"{found['date']}, commit {found['commit']},",
        f"{found['machine']}, Python {found['python']}, torch {found['torch']}.",
        f"Load of the machine before and after: {found['load']}.",
        "The client shares the cores with the service.",
        "",
        f"The embedding service over {NUM_LANES} lanes, MiniLM, one text a request, over HTTP.",
        f"{NUM_CLIENTS} clients in a closed loop got {found['capacity']:.1f} answers/s.",
        f"Then {found['rate']:.1f} requests/s came at random moments,",
        f"for {found['minutes'] * 0.3:.1f} minutes without faults, and for {found['minutes']:g}",
        "with 1 % bad texts, 2 % clients that leave while they wait and 1 % that hang up in the midst of",
        "their request. After a quarter of that time a lane was lost for good, after half of it one hung",
        "for a tenth of the time.",
        "",
        "| promise | found | kept |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {value} | {'yes' if kept else '**no**'} |"
        for name, (value, kept) in found["verdict"].items()
    ]
    late = late_memory_growth(found["rss"])
    lines += ["", f"Memory at the end was {late:.3f} of that after half of the time with faults."]
    lines += ["", "| good requests | p50, ms | p90, ms | p99, ms | longest, ms |", "|---|---|---|---|---|"]
    for name, key in (
        ("without faults", "calm"),
        ("with faults", "faulty"),
        ("of these, sent while a lane hung", "late_faults"),
    ):
        times = " | ".join(
            f"{found[key].get(each, 0) * 1e3:.0f}" for each in ("p50", "p90", "p99", "longest")
        )
        lines.append(f"| {name} | {times} |")
    lines += ["", "| requests | answers |", "|---|---|"]
    for kind, counts in found["counts"].items():
        told = ", ".join(f"{count} x {names.get(str(status), status)}" for status, count in counts.items())
        lines.append(f"| {kind} | {told} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="with faults; 0.3 of it more without")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    chosen = parser.parse_args()
    before = load()
    with serving([str(Path(__file__).with_name("soak_service.py"))]) as (process, url):
        found = asyncio.run(soak(url, psutil.Process(process.pid), chosen.minutes))
    found = {**origin(), "minutes": chosen.minutes, **found, "load": f"{before:.2f}, {load():.2f}"}
    found["verdict"] = verdict(found)
    save("soak", found, as_page(found), chosen.out)
    sys.exit(not all(kept for _, kept in found["verdict"].values()))


if __name__ == "__main__":
    main()
