"""The example that trains in several processes ends as if nobody had died."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional

import asyncdp

pytest.importorskip("sklearn")

import digits_distributed as example

NUM_STEPS = 40
WORLD_SIZE = 2


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The module and the optimizer of the example."""
    module = example.net()
    return module, torch.optim.AdamW(module.parameters(), example.LEARNING_RATE)


def trained_by_plain_torch() -> nn.Module:
    """The example's training as one process does it, with each process's own rows and random numbers."""
    images, classes = example.digits()
    generators = []
    for rank in reversed(range(WORLD_SIZE)):
        torch.manual_seed(rank)
        module, optimizer = net()  # in the end that of process 0, whose weights all have
        generators.insert(0, torch.get_rng_state())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    for step in range(NUM_STEPS):
        for rank in range(WORLD_SIZE):
            torch.set_rng_state(generators[rank])
            rows = example.rows_of_step(step, len(classes) * 4 // 5, rank, WORLD_SIZE)
            (functional.cross_entropy(module(images[rows]), classes[rows]) / WORLD_SIZE).backward()
            generators[rank] = torch.get_rng_state()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return module


async def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint."""
    async with asyncdp.DataParallel(module, "cpu") as engine:
        await engine.load(path, optimizer)


def kill_rank(agent: int, rank: int) -> None:
    """Kill one of the processes that torchrun has started."""
    for child in psutil.Process(agent).children():
        if child.environ().get("RANK") == str(rank):
            child.kill()


@pytest.mark.timeout(120)
def test_a_training_survives_the_death_of_a_process(tmp_path: Path) -> None:
    """Killed in the middle, it goes on from its checkpoint, to the weights of a training left in peace."""
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}", "--max-restarts=3"]
    script = [example.__file__, str(tmp_path / "checkpoint"), f"--steps={NUM_STEPS}", "--every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", *command, *script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as agent:
        assert agent.stdout is not None
        for line in agent.stdout:
            lines.append(line.strip())
            if lines == [f"saved step {step}" for step in range(1, 6)]:
                kill_rank(agent.pid, 1)
    assert agent.returncode == 0
    went_on = [int(line.split()[-1]) for line in lines if line.startswith("goes on from step")]
    assert len(went_on) == 1
    assert 5 <= went_on[0] < NUM_STEPS
    module, optimizer = net()
    asyncio.run(load(tmp_path / "checkpoint", module, optimizer))
    expected = trained_by_plain_torch()
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-3)
    assert float(lines[-1].removeprefix("accuracy ")) > 0.85
