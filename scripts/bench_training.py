"""Training steps: asyncdp, plain torch and DDP side by side.

Every contender is a process of its own (DDP: two), made anew for every workload. They take turns, a few
steps each, so that whatever else the machine does hits all of them alike. Told are medians over all
timed steps, and the peak memory of each contender's processes added up.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

SCRIPT = Path(__file__).resolve()
RESULTS = SCRIPT.parent.parent / "docs" / "results"
CONTENDERS = {
    "plain": "plain torch, all threads",
    "ddp": "DDP gloo, 2 processes x 1 thread",
    "asyncdp": "asyncdp",
    "asyncdp-all": "asyncdp, always 2 lanes",
}


class Workload(NamedTuple):
    """A module, its batch, and how long a turn is."""

    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    num_steps: int
    """Steps per turn."""


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
    "mlp256": Workload("MLP 8 x Linear(256), batch 64", lambda: mlp(8, 256), classes(64, 256), 50),
    "mlp1024": Workload("MLP 4 x Linear(1024), batch 512", lambda: mlp(4, 1024), classes(512, 1024), 4),
    "encoder": Workload("TransformerEncoder 6 x 384, batch 16 x 32", Encoder, classes(16, 32, 384), 2),
    "resnet": Workload("small ResNet, batch 64 x 3 x 32 x 32", resnet, classes(64, 3, 32, 32), 4),
}


# --- one contender, in a process of its own ---------------------------------------------------------

Step = Callable[[], None]


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)


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


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def serve(step: Step) -> None:
    """Run steps as the driver asks for them."""
    answer("ready")
    for line in sys.stdin:
        count = int(line)
        answer(timed(step, count) if count else peak_bytes())


def run_plain(workload: Workload) -> None:
    module, batch = workload.make(), workload.batch()
    optimizer = optimizer_of(module)
    serve(lambda: plain_step(module, optimizer, batch))


def run_ddp(workload: Workload, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    module = nn.parallel.DistributedDataParallel(workload.make())
    optimizer = optimizer_of(module)
    whole = workload.batch()
    batch = (whole[0].chunk(2)[rank].clone(), whole[1].chunk(2)[rank].clone())
    del whole
    serve(lambda: plain_step(module, optimizer, batch))


async def run_asyncdp(workload: Workload, num_lanes: str) -> None:
    module, batch = workload.make(), workload.batch()
    optimizer = optimizer_of(module)
    answer("ready")
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:
        for line in sys.stdin:
            count = int(line)
            times = []
            for _ in range(count):
                started = time.perf_counter()
                await engine.train_step(*batch, functional.cross_entropy, optimizer)
                times.append(time.perf_counter() - started)
            answer(times if count else peak_bytes())


async def run_stall(workload: Workload, inline: bool) -> None:
    """How late a tick of 2 ms comes while steps are taken, in seconds."""
    module, batch = workload.make(), workload.batch()
    optimizer = optimizer_of(module)
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + 0.002
            await asyncio.sleep(0.002)
            late.append(time.perf_counter() - due)

    async with asyncdp.DataParallel(module, "cpu*2") as engine:
        for _ in range(24):
            await engine.train_step(*batch, functional.cross_entropy, optimizer)
        ticker = asyncio.create_task(tick())
        ends = time.perf_counter() + 3.0
        while time.perf_counter() < ends:
            if inline:
                plain_step(module, optimizer, batch)
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

    def __init__(self, name: str, workload: str) -> None:
        self.times: list[float] = []
        commands = [["--contender", name, "--workload", workload]]
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
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def race(workload: str, num_rounds: int, names: list[str]) -> dict[str, Any]:
    count = WORKLOADS[workload].num_steps
    contenders = {name: Contender(name, workload) for name in names}
    for each in contenders.values():
        each.ask(24)  # warm up; asyncdp learns how many lanes pay
    for turn in range(num_rounds):
        order = list(contenders.values())
        for each in order[turn % len(order) :] + order[: turn % len(order)]:
            each.times += each.ask(count)[0]
    found = {
        name: {
            "median_ms": statistics.median(each.times) * 1e3,
            "best_ms": min(each.times) * 1e3,
            "peak_mib": sum(each.ask(0)) / 2**20,
        }
        for name, each in contenders.items()
    }
    for each in contenders.values():
        each.end()
    return found


def measure_stall(workload: str) -> dict[str, Any]:
    found = {}
    for name in ("asyncdp", "inline"):
        command = [sys.executable, str(SCRIPT), "--stall", name, "--workload", workload]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


async def measure_equality() -> dict[str, float]:
    """The largest difference of a weight from the serial run after 50 steps."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)).to(dtype)
        serial = copy.deepcopy(module)
        optimizer, serial_optimizer = optimizer_of(module), optimizer_of(serial)
        async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
            for _ in range(50):
                x, y = torch.randn(33, 64, dtype=dtype), torch.randint(0, 10, (33,))
                await engine.train_step(x, y, functional.cross_entropy, optimizer)
                plain_step(serial, serial_optimizer, (x, y))
        pairs = zip(module.parameters(), serial.parameters(), strict=True)
        found[str(dtype)] = max(float((one - other).detach().abs().max()) for one, other in pairs)
    return found


async def measure_digits() -> dict[str, float]:
    """Test accuracy on scikit-learn's digits, trained alike in series and on two lanes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    serial = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    serial_optimizer = torch.optim.AdamW(serial.parameters(), 3e-3)
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
        for epoch in range(30):
            shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))]
            for rows in shuffled.split(64):
                await engine.train_step(x[rows], y[rows], functional.cross_entropy, optimizer)
                plain_step(serial, serial_optimizer, (x[rows], y[rows]))
    return {
        name: float((each(x[test]).argmax(1) == y[test]).float().mean())
        for name, each in (("asyncdp", module), ("serial", serial))
    }


def table(report: dict[str, Any]) -> str:
    names = [name for name in CONTENDERS if name in next(iter(report["workloads"].values()))["contenders"]]
    lines = [
        "# Training steps",
        "",
        f"Medians of interleaved turns on {report['machine']}; `scripts/bench_training` measures again. "
        f"The load of the machine before it began: {report['load']:.1f}.",
        "",
        "| workload | "
        + " | ".join(f"{CONTENDERS[name]}, ms" for name in names)
        + " | asyncdp / better peer |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for one in report["workloads"].values():
        cells = [f"{one['contenders'][name]['median_ms']:.2f}" for name in names]
        lines.append(f"| {one['title']} | {' | '.join(cells)} | {one['ratio']:.3f} |")
    lines += [
        "",
        "| workload | " + " | ".join(f"{CONTENDERS[name]}, MiB" for name in names) + " | asyncdp / DDP |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for one in report["workloads"].values():
        cells = [f"{one['contenders'][name]['peak_mib']:.0f}" for name in names]
        lines.append(f"| {one['title']} | {' | '.join(cells)} | {one['memory_ratio']:.2f} |")
    lines += [
        "",
        "| workload | lanes chosen | loop late by, p99 | the same inline, p99 |",
        "|---|---|---:|---:|",
    ]
    for one in report["workloads"].values():
        stall = one["stall"]
        chosen = "; ".join(f"{lanes} ({reason})" for _, lanes, reason in stall["asyncdp"]["choices"])
        lines.append(
            f"| {one['title']} | {chosen} | {stall['asyncdp']['p99'] * 1e3:.2f} ms "
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


def drive(num_rounds: int, names: list[str], out: Path) -> None:
    report: dict[str, Any] = {
        "load": os.getloadavg()[0],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "num_rounds": num_rounds,
        "workloads": {},
    }
    for name, workload in WORKLOADS.items():
        found = race(name, num_rounds, names)
        better = min(found[peer]["median_ms"] for peer in ("plain", "ddp"))
        report["workloads"][name] = {
            "title": workload.title,
            "contenders": found,
            "ratio": found["asyncdp"]["median_ms"] / better,
            "memory_ratio": found["asyncdp"]["peak_mib"] / found["ddp"]["peak_mib"],
            "stall": measure_stall(name),
        }
        print(name, json.dumps(report["workloads"][name]), file=sys.stderr, flush=True)
    report["equality"] = asyncio.run(measure_equality())
    report["digits"] = asyncio.run(measure_digits())
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench_training.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "bench_training.md").write_text(table(report))
    print(table(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--stall", choices=["asyncdp", "inline"], help=argparse.SUPPRESS)
    parser.add_argument("--workload", choices=WORKLOADS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stall:
        asyncio.run(run_stall(WORKLOADS[asked.workload], asked.stall == "inline"))
    elif asked.contender is None:
        drive(asked.rounds, list(CONTENDERS), asked.out)
    elif asked.contender == "plain":
        run_plain(WORKLOADS[asked.workload])
    elif asked.contender == "ddp":
        run_ddp(WORKLOADS[asked.workload], asked.rank, asked.port)
    else:
        num_lanes = "all" if asked.contender == "asyncdp-all" else "auto"
        asyncio.run(run_asyncdp(WORKLOADS[asked.workload], num_lanes))


if __name__ == "__main__":
    main()
