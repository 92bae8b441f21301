"""What calls, training steps and a batcher on one device cost beside plain torch; run by scripts/gpu_check.

All ways of one row run in one process and take turns, each measured to its end on the device. A row is
written as soon as it is measured, so that a run which is cut off leaves what it has. `--dry` runs the same
code with tiny sizes on a CPU lane: it shows that the script works, and no figure that means anything.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it at first use, which takes seconds
from bench_training import mlp
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

Row = dict[str, Any]
Ways = dict[str, Callable[[], Awaitable[float]]]
"""Each way runs once and returns seconds."""


class Classifier(nn.Module):
    """A transformer encoder of a BERT's sizes, with random weights, and a classifier over its mean."""

    def __init__(self, depth: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(30522, width)
        layer = nn.TransformerEncoderLayer(width, num_heads, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify token ids of shape [rows, tokens]; 0 is padding."""
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class Bench:
    """The device, how much to measure, and where rows go.

    Args:
        spec: the device.
        dry: whether sizes are tiny.
        out: a file of JSON lines; None for none.
    """

    def __init__(self, spec: str, *, dry: bool, out: Path | None) -> None:
        self.spec = spec
        self.dry = dry
        self.device = asyncdp.parse_devices(spec)[0]
        self.num_rounds = 3 if dry else 30
        self._out = out
        self._late: list[float] = []

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int:
        """Return the bytes that torch has allocated on the device; 0 on the CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def write(self, row: Row) -> None:
        """Write a row down at once."""
        print(json.dumps(row), flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def workloads(self) -> Iterator[tuple[str, nn.Module, tuple[Tensor, Tensor]]]:
        """Yield name, module and batch of each workload, one on the device at a time."""
        tokens = (lambda *shape: torch.randint(1, 30522, shape)) if not self.dry else _few_tokens
        scale = 8 if self.dry else 1
        width, rows = 1024 // scale, 512 // scale
        makers: list[tuple[str, Callable[[], nn.Module], Callable[[], Tensor]]] = [
            ("MLP 4x1024 b512", lambda: mlp(4, width), lambda: torch.randn(rows, width)),
            (
                "encoder 6x384 b16x32",
                lambda: Classifier(6 // (1 + self.dry), 384 // scale, 6),
                lambda: tokens(16, 32),
            ),
            (
                "BERT-base b8x128",
                lambda: Classifier(12 // (1 + 5 * self.dry), 768 // scale, 12),
                lambda: tokens(8, 128),
            ),
        ]
        for name, make, batch in makers:
            inputs = batch().to(self.device)
            targets = torch.randint(0, 10, (len(inputs),), device=self.device)
            yield name, make().to(self.device), (inputs, targets)

    async def turns(self, ways: Ways) -> dict[str, float]:
        """Return the median milliseconds of each way; the first three rounds warm up."""
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(self.num_rounds + 3):
            for name, run in ways.items():
                seconds = await run()
                if number >= 3:
                    times[name].append(seconds * 1e3)
        return {name: median(each) for name, each in times.items()}

    async def tick(self) -> None:
        """Note how late the loop is, every 2 ms."""
        while True:
            due = time.perf_counter() + 0.002
            await asyncio.sleep(0.002)
            self._late.append(time.perf_counter() - due)

    async def stalls(self, run: Callable[[], Awaitable[object]]) -> float:
        """Return by how many milliseconds the loop is late, p99, while something runs on it."""
        self._late.clear()
        ticker = asyncio.create_task(self.tick())
        await run()
        ticker.cancel()
        return sorted(self._late)[int(len(self._late) * 0.99)] * 1e3 if self._late else 0.0


def _few_tokens(num_rows: int, length: int) -> Tensor:
    return torch.randint(1, 30522, (num_rows // 4, length // 8))


@contextmanager
def stopwatch(bench: Bench) -> Iterator[list[float]]:
    """Measure a block to its end on the device."""
    seconds: list[float] = []
    bench.wait()
    started = time.perf_counter()
    yield seconds
    bench.wait()
    seconds.append(time.perf_counter() - started)


async def bench_calls(bench: Bench) -> None:
    """Measure `await engine(x)` on one lane."""
    for name, module, (inputs, _) in bench.workloads():
        async with asyncdp.DataParallel(module.eval(), bench.spec) as engine:

            async def plain(module: nn.Module = module, inputs: Tensor = inputs) -> float:
                with stopwatch(bench) as seconds, torch.no_grad():
                    module(inputs)
                return seconds[0]

            async def ours(engine: Any = engine, inputs: Tensor = inputs) -> float:
                with stopwatch(bench) as seconds, torch.no_grad():
                    await engine(inputs)
                return seconds[0]

            found = await bench.turns({"plain_ms": plain, "engine_ms": ours})
        added = (found["engine_ms"] - found["plain_ms"]) * 1e3
        bench.write({"row": f"call, {name}", **found, "added_us": added, "aim": "added_us <= 100"})


async def bench_steps(bench: Bench) -> None:
    """Measure steps beside a plain loop that waits for each, and one that does not."""
    num_steps = 10 if not bench.dry else 3
    for name, module, batch in bench.workloads():
        optimizer = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9)
        async with asyncdp.DataParallel(module, bench.spec) as engine:
            await _bench_steps_of(bench, name, engine, optimizer, batch, num_steps)


async def _bench_steps_of(
    bench: Bench, name: str, engine: Any, optimizer: Any, batch: tuple[Tensor, Tensor], num_steps: int
) -> None:
    inputs, targets = batch

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(engine.module(inputs), targets).backward()
        optimizer.step()

    async def plain(*, waits: bool = False) -> float:
        with stopwatch(bench) as seconds:
            for _ in range(num_steps):
                step()
                if waits:
                    bench.wait()
        return seconds[0] / num_steps

    async def single() -> float:
        with stopwatch(bench) as seconds:
            for _ in range(num_steps):
                await engine.train_step(inputs, targets, functional.cross_entropy, optimizer)
        return seconds[0] / num_steps

    async def stream(count: int = num_steps) -> float:
        with stopwatch(bench) as seconds:
            async for _ in engine.train(itertools.repeat(batch, count), functional.cross_entropy, optimizer):
                pass
        return seconds[0] / count

    ways: Ways = {
        "plain_ms": plain,
        "plain_waiting_ms": lambda: plain(waits=True),
        "train_step_ms": single,
        "train_ms": stream,
    }
    found = await bench.turns(ways)
    before = bench.memory()
    late = await bench.stalls(lambda: stream(1000 if not bench.dry else 20))
    bench.write(
        {
            "row": f"training, {name}",
            **found,
            "train_step_of_waiting": found["train_step_ms"] / found["plain_waiting_ms"],
            "train_of_waiting": found["train_ms"] / found["plain_waiting_ms"],
            "train_of_plain": found["train_ms"] / found["plain_ms"],
            "loop_late_p99_ms": late,
            "grown_bytes": bench.memory() - before,
            "aim": "train_step_of_waiting <= 1.08, train_of_* <= 1.02, loop_late_p99_ms < 2, grown_bytes 0",
        }
    )


async def bench_batcher(bench: Bench) -> None:
    """Measure a batcher over an encoder of MiniLM's sizes beside all texts in sorted batches."""
    module = Classifier(6 // (1 + bench.dry), 384 // (8 if bench.dry else 1), 12).to(bench.device).eval()
    module = module.half() if bench.device.type == "cuda" else module
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 64, (64 if bench.dry else 8192,), generator=generator).tolist()
    texts = [torch.randint(1, 30522, (length,), generator=generator) for length in lengths]
    for num_clients in (4,) if bench.dry else (64, 256, 1024):
        async with asyncdp.DataParallel(module, bench.spec, output_device="cpu") as engine:

            async def plain() -> float:
                with stopwatch(bench) as seconds, torch.no_grad():
                    ordered = sorted(texts, key=len)
                    for batch in _batches(ordered, 64):
                        padded = nn.utils.rnn.pad_sequence(batch, batch_first=True)
                        module(padded.to(bench.device)).cpu()
                return seconds[0]

            async def ours(num_clients: int = num_clients, engine: Any = engine) -> float:
                async with asyncdp.Batcher(engine, max_batch_size=64, size_of=len, pad=0) as batcher:
                    waiting = iter(texts)

                    async def client() -> None:
                        for text in waiting:
                            await batcher(text)

                    with stopwatch(bench) as seconds:
                        await asyncio.gather(*(client() for _ in range(num_clients)))
                return seconds[0]

            bench.num_rounds = min(bench.num_rounds, 3)
            found = await bench.turns({"sorted_ms": plain, "batcher_ms": ours})
            late = await bench.stalls(ours)
        bench.write(
            {
                "row": f"batcher, {num_clients} clients",
                **found,
                "of_sorted": found["sorted_ms"] / found["batcher_ms"],
                "loop_late_p99_ms": late,
                "aim": "of_sorted >= 0.85, loop_late_p99_ms < 2",
            }
        )


def _batches(texts: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


async def drive(bench: Bench) -> None:
    for part in (bench_calls, bench_steps, bench_batcher):
        await part(bench)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU lane")
    parser.add_argument("--json", type=Path, help="file that rows are appended to, a line each")
    asked = parser.parse_args()
    asyncio.run(drive(Bench("cpu*1" if asked.dry else asked.device, dry=asked.dry, out=asked.json)))


if __name__ == "__main__":
    main()
