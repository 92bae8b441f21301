"""Training steps: asyncdp, plain torch and DDP side by side.

Every contender is a process of its own (DDP: two), launched several times for every workload, since some
processes are a few percent quicker than others that do the same. They take turns, a few steps each, so that
whatever else the machine does hits all of them alike. All of them step the same optimizer; with `--fused` it
is torch's fused one. For comparison, plain steps awaited through `asyncio.to_thread` take turns, too.

Reported are medians over all timed steps, the peak memory of each contender's processes added up, and how
asyncdp's median of a turn compares with that of the better peer in the same round: the median of those
ratios, since the machine changes its pace from one round to the next. A turn of `engine.train` is a stream of
its own, whose steps are timed from one result to the next.

With lanes on a GPU (`--devices cuda:0,cuda:0`) all of them work on that GPU, every step is timed to its end
there, and memory is what torch allocated on it. DDP takes part only where two different GPUs are named.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import itertools
import json
import operator
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
from machine import RESULTS, commit, describe, load, save
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

SCRIPT = Path(__file__).resolve()
CONTENDERS = ("plain", "ddp", "to_thread", "asyncdp", "asyncdp-train", "asyncdp-all")
STALLS = ("asyncdp", "train", "inline")


class Place:
    """The devices of all contenders, and their optimizer.

    Args:
        spec: the lanes' devices, as asyncdp takes them.
        fused: whether the optimizer is torch's fused one.
    """

    def __init__(self, spec: str, *, fused: bool) -> None:
        self.spec = spec
        self.fused = fused
        self.lanes = asyncdp.parse_devices(spec)
        self.home = self.lanes[0]
        self.is_cpu = self.home.type == "cpu"
        self.has_ddp = self.is_cpu or len(set(self.lanes)) > 1

    def options(self) -> list[str]:
        """Return the command line that makes the same place in another process."""
        return ["--devices", self.spec, *(["--fused"] if self.fused else [])]

    def titles(self) -> dict[str, str]:
        """Return who takes part, and under which title."""
        ddp = "DDP gloo, 2 processes x 1 thread" if self.is_cpu else "DDP nccl, 2 processes"
        return {
            "plain": "plain torch, all threads" if self.is_cpu else "plain torch",
            **({"ddp": ddp} if self.has_ddp else {}),
            "to_thread": "plain torch by asyncio.to_thread",
            "asyncdp": "asyncdp, step by step",
            "asyncdp-train": "asyncdp, `engine.train`",
            "asyncdp-all": f"asyncdp, always {len(self.lanes)} lanes",
        }

    def of_rank(self, rank: int) -> torch.device:
        """Return the device of a process of DDP."""
        return self.home if self.is_cpu else sorted(set(self.lanes), key=str)[rank]

    def wait(self, device: torch.device | None = None) -> None:
        """Wait until what was issued on a device, or on the first one, is done."""
        if not self.is_cpu:
            torch.cuda.synchronize(device or self.home)

    def peak_bytes(self) -> int:
        """Return the most memory this process had at once; on GPUs, what torch had there."""
        if not self.is_cpu:
            return sum(torch.cuda.max_memory_allocated(device) for device in set(self.lanes))
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])


class Workload(NamedTuple):
    """A module, its batch, how long a turn is, and how many there are."""

    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    num_steps: int
    """Steps per turn."""
    num_rounds: int = 15
    """Turns of each contender in a launch. On a shared machine those of short steps differ most."""


def mlp(depth: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """Six layers, and a classifier over the mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6)
        self.head = nn.Linear(384, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences."""
        return self.head(self.encoder(x).mean(1))


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return functional.relu(x + self.body(x))


def resnet() -> nn.Module:
    stages: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for channels in (16, 32):
        stages += [
            Block(channels),
            Block(channels),
            nn.Conv2d(channels, channels * 2, 3, stride=2, padding=1),
        ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def classes(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(*shape), torch.randint(0, 10, (shape[0],)))


WORKLOADS = {
    "mlp256": Workload("MLP 8 x Linear(256), batch 64", lambda: mlp(8, 256), classes(64, 256), 20, 60),
    "mlp1024": Workload("MLP 4 x Linear(1024), batch 512", lambda: mlp(4, 1024), classes(512, 1024), 2),
    "encoder": Workload("TransformerEncoder 6 x 384, batch 16 x 32", Encoder, classes(16, 32, 384), 1),
    "resnet": Workload("small ResNet, batch 64 x 3 x 32 x 32", resnet, classes(64, 3, 32, 32), 2),
}


# --- one contender, in a process of its own ---------------------------------------------------------

Step = Callable[[], None]


def optimizer_of(module: nn.Module, place: Place) -> torch.optim.Optimizer:
    """Return the optimizer of all contenders; torch chooses the implementation unless `fused` does."""
    return torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, fused=place.fused or None)


def plain_step(module: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(module(batch[0]), batch[1]).backward()
    optimizer.step()


def timed(step: Step, count: int) -> list[float]:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return times


def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


def serve(step: Step, place: Place) -> None:
    """Run steps as the driver asks for them."""
    answer("ready")
    for line in sys.stdin:
        count = int(line)
        answer(timed(step, count) if count else place.peak_bytes())


def made(workload: Workload, device: torch.device) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return the module and its batch on a device."""
    inputs, targets = workload.batch()
    return workload.make().to(device), (inputs.to(device), targets.to(device))


def run_plain(workload: Workload, place: Place) -> None:
    module, batch = made(workload, place.home)
    optimizer = optimizer_of(module, place)

    def step() -> None:
        plain_step(module, optimizer, batch)
        place.wait()

    serve(step, place)


def run_ddp(workload: Workload, place: Place, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    device = place.of_rank(rank)
    if not place.is_cpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "gloo" if place.is_cpu else "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
    )
    inner, whole = made(workload, device)
    module = nn.parallel.DistributedDataParallel(inner)
    optimizer = optimizer_of(module, place)
    batch = (whole[0].chunk(2)[rank].clone(), whole[1].chunk(2)[rank].clone())
    del whole

    def step() -> None:
        plain_step(module, optimizer, batch)
        place.wait(device)

    serve(step, place)


async def run_to_thread(workload: Workload, place: Place) -> None:
    module, batch = made(workload, place.home)
    optimizer = optimizer_of(module, place)

    def step() -> None:
        plain_step(module, optimizer, batch)
        place.wait()

    await serve_async(lambda: asyncio.to_thread(step), place)


async def run_asyncdp(workload: Workload, place: Place, num_lanes: str) -> None:
    module, batch = made(workload, place.home)
    optimizer = optimizer_of(module, place)
    async with asyncdp.DataParallel(module, place.spec, num_lanes=num_lanes) as engine:
        await serve_async(lambda: engine.train_step(*batch, functional.cross_entropy, optimizer), place)


async def run_train(workload: Workload, place: Place) -> None:
    module, batch = made(workload, place.home)
    optimizer = optimizer_of(module, place)

    async def turn(count: int) -> list[float]:
        seen = [time.perf_counter()]
        async for _ in engine.train([batch] * count, functional.cross_entropy, optimizer):
            seen.append(time.perf_counter())  # noqa: PERF401  while the next one runs
        return [after - before for before, after in itertools.pairwise(seen)]

    async with asyncdp.DataParallel(module, place.spec) as engine:
        answer("ready")
        for line in sys.stdin:
            count = int(line)
            answer(await turn(count) if count else place.peak_bytes())


async def serve_async(step: Callable[[], Awaitable[object]], place: Place) -> None:
    """Do as `serve` does, with steps to await."""
    answer("ready")
    for line in sys.stdin:
        count = int(line)
        times = []
        for _ in range(count):
            started = time.perf_counter()
            await step()
            times.append(time.perf_counter() - started)
        answer(times if count else place.peak_bytes())


async def run_stall(workload: Workload, place: Place, way: str) -> None:
    """Answer how late a tick of 2 ms comes while steps are taken in one way of `STALLS`, in seconds."""
    module, batch = made(workload, place.home)
    optimizer = optimizer_of(module, place)
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + 0.002
            await asyncio.sleep(0.002)
            late.append(time.perf_counter() - due)

    async with asyncdp.DataParallel(module, place.spec) as engine:
        for _ in range(24):
            await engine.train_step(*batch, functional.cross_entropy, optimizer)
        ticker = asyncio.create_task(tick())
        ends = time.perf_counter() + 3.0
        if way == "train":
            async for _ in engine.train(itertools.repeat(batch), functional.cross_entropy, optimizer):
                if time.perf_counter() > ends:
                    break
        while time.perf_counter() < ends:
            if way == "inline":
                plain_step(module, optimizer, batch)
                place.wait()
                await asyncio.sleep(0)
            else:
                await engine.train_step(*batch, functional.cross_entropy, optimizer)
        ticker.cancel()
        choices = [
            (choice.workload, choice.num_lanes, choice.reason) for choice in engine.statistics().choices
        ]
    late.sort()
    answer({"p99": late[int(len(late) * 0.99)], "worst": late[-1], "ticks": len(late), "choices": choices})


# --- the driver --------------------------------------------------------------------------------------


class Contender:
    """The processes of one contender, waiting for their turn."""

    def __init__(self, name: str, workload: str, place: Place) -> None:
        commands = [["--contender", name, "--workload", workload, *place.options()]]
        environment = dict(os.environ)
        if name == "ddp":
            port = free_port()
            environment["OMP_NUM_THREADS"] = "1"
            commands = [[*commands[0], "--rank", str(rank), "--port", str(port)] for rank in (0, 1)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for command in commands
        ]
        for process in self._processes:
            self._hear(process)

    def ask(self, count: int) -> list[Any]:
        """Let every process do the same at once."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        return [self._hear(process) for process in self._processes]

    def end(self) -> None:
        """Let the processes go."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _hear(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        return json.loads(process.stdout.readline())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def race(workload: str, num_launches: int, place: Place) -> dict[str, Any]:
    count = WORKLOADS[workload].num_steps
    turns: dict[str, list[list[float]]] = {name: [] for name in place.titles()}
    peaks: dict[str, list[int]] = {name: [] for name in turns}
    for _ in range(num_launches):
        contenders = {name: Contender(name, workload, place) for name in turns}
        for each in contenders.values():
            each.ask(24)  # warm up; asyncdp learns how many lanes pay
        for turn in range(WORKLOADS[workload].num_rounds):
            order = list(contenders)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                turns[name].append(contenders[name].ask(count)[0])
        for name, each in contenders.items():
            peaks[name].append(sum(each.ask(0)))
            each.end()
    return {
        name: {
            "median_ms": statistics.median(chain.from_iterable(turns[name])) * 1e3,
            "best_ms": min(chain.from_iterable(turns[name])) * 1e3,
            "turns_ms": [round(statistics.median(turn) * 1e3, 3) for turn in turns[name]],
            "peak_mib": max(peaks[name]) / 2**20,
        }
        for name in turns
    }


def ratio_to(peer: str, found: dict[str, Any], name: str = "asyncdp") -> float:
    """Return how many times a peer's step one of asyncdp takes: the median over the turns."""
    turns = map(operator.truediv, found[name]["turns_ms"], found[peer]["turns_ms"])
    return statistics.median(turns)


def measure_stall(workload: str, place: Place) -> dict[str, Any]:
    found = {}
    for name in STALLS:
        asked = ["--stall", name, "--workload", workload, *place.options()]
        command = [sys.executable, str(SCRIPT), *asked]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


async def measure_equality(place: Place) -> dict[str, float]:
    """Return the largest difference of a weight from the serial run after 50 steps."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)).to(place.home, dtype)
        serial = copy.deepcopy(module)
        optimizer, serial_optimizer = optimizer_of(module, place), optimizer_of(serial, place)
        async with asyncdp.DataParallel(module, place.spec, num_lanes="all") as engine:
            for _ in range(50):
                x, y = torch.randn(33, 64, dtype=dtype), torch.randint(0, 10, (33,))
                x, y = x.to(place.home), y.to(place.home)
                await engine.train_step(x, y, functional.cross_entropy, optimizer)
                plain_step(serial, serial_optimizer, (x, y))
        pairs = zip(module.parameters(), serial.parameters(), strict=True)
        found[str(dtype)] = max(float((weight - expected).detach().abs().max()) for weight, expected in pairs)
    return found


async def measure_digits(place: Place) -> dict[str, float]:
    """Return the test accuracy on scikit-learn's digits, trained in series and on two lanes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)
    x, y = x.to(place.home), y.to(place.home)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(place.home)
    serial = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    serial_optimizer = torch.optim.AdamW(serial.parameters(), 3e-3)
    async with asyncdp.DataParallel(module, place.spec, num_lanes="all") as engine:
        for epoch in range(30):
            shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))]
            for rows in shuffled.split(64):
                await engine.train_step(x[rows], y[rows], functional.cross_entropy, optimizer)
                plain_step(serial, serial_optimizer, (x[rows], y[rows]))
    return {
        name: float((each(x[test]).argmax(1) == y[test]).float().mean())
        for name, each in (("asyncdp", module), ("serial", serial))
    }


def table(report: dict[str, Any], titles: dict[str, str]) -> str:
    has_ddp = "ddp" in titles
    lines = [
        "# Training steps",
        "",
        f"Medians of interleaved turns on {report['machine']}; `scripts/bench_training` measures again. "
        f"Ratios are medians of those within each round, of {report['num_launches']} launches together. "
        f"The optimizer is SGD with momentum{', fused' if report['fused'] else ''}, the same for all. "
        f"The load of the machine before it began: {report['load']:.1f}.",
        "",
        "| workload | rounds | "
        + " | ".join(f"{title}, ms" for title in titles.values())
        + (" | step by step / better of plain and DDP |" if has_ddp else " | step by step / plain |")
        + " `engine.train` / plain |",
        "|---|" + "---:|" * (len(titles) + 3),
    ]
    for workload in report["workloads"].values():
        cells = [str(len(workload["contenders"]["plain"]["turns_ms"]))]
        cells += [f"{workload['contenders'][name]['median_ms']:.2f}" for name in titles]
        lines.append(
            f"| {workload['title']} | {' | '.join(cells)} | {workload['ratio']:.3f} "
            f"| {workload['train_ratio']:.3f} |"
        )
    lines += [
        "",
        "| workload | "
        + " | ".join(f"{title}, MiB" for title in titles.values())
        + (" | asyncdp / DDP |" if has_ddp else " |"),
        "|---|" + "---:|" * (len(titles) + has_ddp),
    ]
    for workload in report["workloads"].values():
        cells = [f"{workload['contenders'][name]['peak_mib']:.0f}" for name in titles]
        if has_ddp:
            cells.append(f"{workload['memory_ratio']:.2f}")
        lines.append(f"| {workload['title']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| workload | lanes chosen | loop late by, p99 | by `engine.train` | steps inline |",
        "|---|---|---:|---:|---:|",
    ]
    for workload in report["workloads"].values():
        stall = workload["stall"]
        chosen = "; ".join(f"{lanes} ({reason})" for _, lanes, reason in stall["asyncdp"]["choices"])
        lines.append(
            f"| {workload['title']} | {chosen} | {stall['asyncdp']['p99'] * 1e3:.2f} ms "
            f"| {stall['train']['p99'] * 1e3:.2f} ms "
            f"| {stall['inline']['p99'] * 1e3:.1f} ms |"
        )
    equality = ", ".join(f"{value:.1e} in {dtype}" for dtype, value in report["equality"].items())
    digits = report["digits"]
    lines += [
        "",
        f"Largest difference of a weight from the serial run after 50 steps: {equality}. "
        f"Test accuracy on digits: {digits['asyncdp']:.4f}, in series {digits['serial']:.4f}.",
        "",
    ]
    return "\n".join(lines)


def machine(place: Place) -> str:
    gpu = "" if place.is_cpu else f"{torch.cuda.get_device_name(place.home)}, "
    return (
        f"{gpu}{describe()}, commit {commit()}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def drive(num_launches: int, workloads: list[str], place: Place, out: Path) -> None:
    report: dict[str, Any] = {
        "load": load(),
        "fused": place.fused,
        "machine": machine(place),
        "num_launches": num_launches,
        "workloads": {},
    }
    for name in workloads:
        found = race(name, num_launches, place)
        peers = [peer for peer in ("plain", "ddp") if peer in found]
        better = min(peers, key=lambda peer: found[peer]["median_ms"])
        row: dict[str, Any] = {
            "title": WORKLOADS[name].title,
            "contenders": found,
            "ratio": ratio_to(better, found),
            "train_ratio": ratio_to("plain", found, "asyncdp-train"),
        }
        if "ddp" in found:
            row["memory_ratio"] = found["asyncdp"]["peak_mib"] / found["ddp"]["peak_mib"]
        report["workloads"][name] = {**row, "stall": measure_stall(name, place)}
        print(name, json.dumps(report["workloads"][name]), file=sys.stderr, flush=True)
    report["equality"] = asyncio.run(measure_equality(place))
    report["digits"] = asyncio.run(measure_digits(place))
    save("bench_training", report, table(report, place.titles()), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=3, help="how often each contender is launched")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--devices", default="cpu*2", help="lanes of asyncdp; the others work where the first is"
    )
    parser.add_argument(
        "--fused", action="store_true", help="step by torch's fused SGD, all contenders alike"
    )
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which ones to race"
    )
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--stall", choices=STALLS, help=argparse.SUPPRESS)
    parser.add_argument("--workload", choices=WORKLOADS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    place = Place(asked.devices, fused=asked.fused)
    workload = WORKLOADS.get(asked.workload)
    if workload is None:
        drive(asked.launches, asked.workloads, place, asked.out)
    elif asked.stall:
        asyncio.run(run_stall(workload, place, asked.stall))
    elif asked.contender == "plain":
        run_plain(workload, place)
    elif asked.contender == "ddp":
        run_ddp(workload, place, asked.rank, asked.port)
    elif asked.contender == "to_thread":
        asyncio.run(run_to_thread(workload, place))
    elif asked.contender == "asyncdp-train":
        asyncio.run(run_train(workload, place))
    else:
        num_lanes = "all" if asked.contender == "asyncdp-all" else "auto"
        asyncio.run(run_asyncdp(workload, place, num_lanes))


if __name__ == "__main__":
    main()
