"""Training steps over processes: asyncdp beside DDP, and what becomes of steps that fail.

Two processes with one thread each, over gloo. Both ways have a module of their own in the same processes
and take turns, a few steps each, so that whatever else the machine does hits both alike; reported is the
median of the ratios within each round. Weights are compared in float64, and the delay of the event loop is
measured while the other process comes late to every step.

With `--faults N`, N jobs of two or three processes take steps; at a random moment one process raises, is
cancelled, or is killed. Afterwards those that are left must have the same state bit by bit, after they
rejoined if one was killed, and none may hang.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import hashlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_training import WORKLOADS, mlp, plain_step
from machine import RESULTS, load, origin, save
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

TIMEOUT = timedelta(seconds=30)


def start(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(rank, ...)` in processes of one group; return what each returned, None if it died."""
    # Imports everything once for all of them, for which it must find this file's neighbours.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench_distributed"])
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(theirs, rank, size, folder, function, args))
            process.start()
            theirs.close()
            started.append((process, ours))
        answers = []
        for process, pipe in started:
            try:
                answers.append(pipe.recv() if pipe.poll(90) else "hangs")
            except EOFError:
                answers.append(None)
            process.join(10)
            process.kill()
    return answers


def _run(pipe: Any, rank: int, size: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    join_group(rank, size, f"{folder}/store")
    pipe.send(function(rank, *args))
    pipe.close()
    os._exit(0)


def join_group(rank: int, size: int, path: str) -> None:
    """Make the default group, over a file."""
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)


# --- speed ----------------------------------------------------------------------------------------


def race(rank: int, name: str, num_rounds: int) -> list[tuple[float, float]]:
    """Return the seconds per step of DDP and of asyncdp in each round."""
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    batch = tuple(each.chunk(2)[rank].clone() for each in workload.batch())
    peer = nn.parallel.DistributedDataParallel(workload.make())
    peer_optimizer = sgd(peer)

    async def main() -> list[tuple[float, float]]:
        module = workload.make()
        optimizer = sgd(module)
        found = []
        async with asyncdp.DataParallel(module, "cpu", process_group=dist.group.WORLD) as engine:
            for _ in range(num_rounds + 1):
                dist.barrier()
                started = time.perf_counter()
                for _ in range(workload.num_steps):
                    plain_step(peer, peer_optimizer, batch)
                theirs = (time.perf_counter() - started) / workload.num_steps
                dist.barrier()
                started = time.perf_counter()
                for _ in range(workload.num_steps):
                    await engine.train_step(*batch, functional.cross_entropy, optimizer)
                ours = (time.perf_counter() - started) / workload.num_steps
                found.append((theirs, ours))
        return found[1:]  # the first ones make threads, buckets and replicas

    return asyncio.run(main())


def measure_speed(name: str, num_rounds: int) -> dict[str, Any]:
    first, second = start(2, race, name, num_rounds)
    theirs, ours = zip(*first, *second, strict=True)
    return {
        "title": WORKLOADS[name].title,
        "num_rounds": num_rounds,
        "ddp_ms": 1e3 * statistics.median(theirs),
        "asyncdp_ms": 1e3 * statistics.median(ours),
        "ratio": statistics.median(own / peer for peer, own in zip(theirs, ours, strict=True)),
    }


def compare(rank: int, num_steps: int) -> float:
    """Return the largest difference of a weight from DDP's after some steps in float64."""
    torch.manual_seed(0)
    module = mlp(4, 64).double()
    own = copy.deepcopy(module)
    peer = nn.parallel.DistributedDataParallel(module)
    peer_optimizer, optimizer = sgd(peer), sgd(own)

    async def main() -> float:
        async with asyncdp.DataParallel(own, "cpu", process_group=dist.group.WORLD) as engine:
            for step in range(num_steps):
                generator = torch.Generator().manual_seed(1000 * step + rank)
                inputs = torch.randn(16, 64, generator=generator, dtype=torch.float64)
                batch = inputs, torch.randint(0, 10, (16,), generator=generator)
                plain_step(peer, peer_optimizer, batch)
                await engine.train_step(*batch, functional.cross_entropy, optimizer)
        pairs = zip(own.parameters(), module.parameters(), strict=True)
        return max((first - second).abs().max().item() for first, second in pairs)

    return asyncio.run(main())


def stall(rank: int, num_steps: int) -> float:
    """Return by how much the loop of process 0 is late, in seconds (p99), while process 1 comes late."""
    module = mlp(4, 256)
    optimizer = sgd(module)
    batch = torch.randn(32, 256), torch.randint(0, 10, (32,))

    async def main() -> float:
        late: list[float] = []

        async def tick() -> None:
            while True:
                due = time.perf_counter() + 0.001
                await asyncio.sleep(0.001)
                late.append(time.perf_counter() - due)

        async with asyncdp.DataParallel(module, "cpu", process_group=dist.group.WORLD) as engine:
            ticking = asyncio.create_task(tick())
            for _ in range(num_steps):
                if rank:
                    await asyncio.sleep(0.1)
                await engine.train_step(*batch, functional.cross_entropy, optimizer)
            ticking.cancel()
        return statistics.quantiles(late, n=100)[98]

    return asyncio.run(main())


# --- faults ---------------------------------------------------------------------------------------

NUM_STEPS = 12
FAULTS = ("raise", "cancel", "kill")


def suffer(rank: int, size: int, folder: str, fault: str, victim: int, seed: int) -> tuple[int, str, str]:
    """Take steps, in one of which something happens to the victim.

    Returns:
        How many steps are known to have been taken, a digest of all state, and what was raised.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    chance = random.Random(seed)
    moment = chance.uniform(0, 0.1)
    place = chance.choice(["forward", "loss", "before_step"])
    is_due = threading.Event()
    raised: list[str] = []

    def fail_at(here: str) -> None:
        if is_due.is_set() and place == here and fault == "raise":
            is_due.clear()
            raise ValueError(f"in {here}")

    module.register_forward_pre_hook(lambda *_: fail_at("forward"))

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        fail_at("loss")
        return functional.cross_entropy(outputs, targets)

    def die() -> None:
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        is_due.set()

    async def step(engine: asyncdp.DataParallel, number: int) -> None:
        generator = torch.Generator().manual_seed(number * 10 + rank)
        inputs = torch.randn(8 + rank, 32, generator=generator)
        targets = torch.randint(0, 10, (8 + rank,), generator=generator)
        options: Any = {"before_step": lambda: fail_at("before_step")}
        if fault == "cancel" and is_due.is_set():
            is_due.clear()
            async with asyncio.timeout(chance.uniform(0, 0.01)):
                await engine.train_step(inputs, targets, loss_fn, optimizer, **options)
        else:
            await engine.train_step(inputs, targets, loss_fn, optimizer, **options)

    async def main() -> tuple[int, str, str]:
        num_done = 0
        async with asyncdp.DataParallel(module, "cpu*2", process_group=dist.group.WORLD) as engine:
            await step(engine, 0)
            if rank == victim:
                timer = threading.Timer(moment, die)
                timer.daemon = True
                timer.start()
            for number in range(1, NUM_STEPS + 1):
                try:
                    await step(engine, number)
                    num_done += 1
                except (ValueError, TimeoutError, asyncdp.PeerStepError) as error:
                    raised.append(type(error).__name__)
                    if "connection is lost" in str(error):
                        break
            if fault == "kill":
                if rank == victim:
                    os.kill(os.getpid(), signal.SIGKILL)
                dist.destroy_process_group()
                ranks = [each for each in range(size) if each != victim]
                join_group(ranks.index(rank), size - 1, f"{folder}/survivors")
                num_done = await engine.rejoin(dist.group.WORLD, optimizer)
                for number in range(NUM_STEPS, NUM_STEPS + 3):
                    await step(engine, number)
        return num_done, digest(module, optimizer), " ".join(raised)

    return asyncio.run(main())


def digest(module: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return a digest of all bits of weights, buffers, gradients and the optimizer's state."""
    values: list[Any] = [*module.state_dict().values(), *(each.grad for each in module.parameters())]
    values += [value for own in optimizer.state.values() for value in own.values()]
    found = hashlib.sha256()
    for value in values:
        found.update(b"none" if value is None else value.detach().numpy().tobytes())
    return found.hexdigest()


def measure_faults(num_trials: int) -> dict[str, Any]:
    counts: dict[str, Any] = {"trials": 0, "hung": 0, "differ": 0, "undisturbed": 0}
    for trial in range(num_trials):
        size, fault = 2 + trial % 2, FAULTS[trial // 2 % 3]
        victim = random.Random(trial).randrange(size)
        with tempfile.TemporaryDirectory() as folder:
            answers = start(size, suffer, size, folder, fault, victim, trial)
        left = [each for rank, each in enumerate(answers) if fault != "kill" or rank != victim]
        counts["trials"] += 1
        counts["hung"] += any(each == "hangs" for each in answers)
        # A caller that was cancelled too late does not know that its step was taken.
        num_told = 2 if fault == "kill" else 1
        is_alike = None not in left and len({each[2 - num_told : 2] for each in left}) == 1
        counts["differ"] += not is_alike
        counts["undisturbed"] += fault != "kill" and not any(each and each[2] for each in left)
        if not is_alike:
            print(f"trial {trial}: {fault} on {victim} of {size}: {answers}", file=sys.stderr, flush=True)
    return counts


# --- reports --------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    source = report["origin"]
    lines = [
        "# Training steps over processes",
        "",
        f"Two processes with one thread each over gloo on {source['machine']}, commit {source['commit']}, "
        f"Python {source['python']}, torch {source['torch']}; `scripts/bench_distributed` measures again. "
        "Medians of interleaved turns; the ratio is the median of those within each round. The load of the "
        f"machine before it began: {report['load']:.1f}.",
        "",
        "| workload | rounds | DDP, ms | asyncdp, ms | asyncdp / DDP |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['title']} | {row['num_rounds']} | {row['ddp_ms']:.2f} | {row['asyncdp_ms']:.2f} | "
        f"{row['ratio']:.3f} |"
        for row in report["workloads"].values()
    ]
    lines += [
        "",
        f"Largest difference of a weight from DDP's after 50 steps in float64: {report['difference']:.1e}. "
        "The event loop, while the other process comes 100 ms late to every step, is late by "
        f"{1e3 * report['stall_p99']:.2f} ms (p99).",
        "",
    ]
    if "faults" in report:
        found = report["faults"]
        lines += [
            f"Of {found['trials']} jobs of 2 or 3 processes, in each of which one raised, was cancelled "
            f"or killed at a random moment, {found['hung']} hung, and after {found['differ']} the processes "
            f"differed in a bit. In {found['undisturbed']} the moment came too late to disturb a step.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, help="turns of each workload; its own number if not given")
    parser.add_argument("--faults", type=int, default=0, metavar="N", help="jobs in which a process fails")
    parser.add_argument("--only-faults", action="store_true", help="measure nothing else, and write no file")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    asked = parser.parse_args()
    if asked.only_faults:
        print(json.dumps(measure_faults(asked.faults)))
        return
    report: dict[str, Any] = {"load": load(), "origin": origin(), "workloads": {}}
    for name in asked.workloads:
        row = measure_speed(name, asked.rounds or WORKLOADS[name].num_rounds)
        report["workloads"][name] = row
        print(name, json.dumps(row), file=sys.stderr, flush=True)
    report["difference"] = max(start(2, compare, 50))
    report["stall_p99"] = start(2, stall, 30)[0]
    if asked.faults:
        report["faults"] = measure_faults(asked.faults)
    save("bench_distributed", report, table(report), asked.out)


if __name__ == "__main__":
    main()
