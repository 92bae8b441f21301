"""Trains a classifier of digits in several processes, and goes on from a checkpoint when one of them dies.

    pip install asyncdp scikit-learn
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 digits_distributed.py checkpoint

When a process dies, torchrun ends the others and starts all of them again; they load the checkpoint and end
with the very weights of a training that nothing has disturbed. Without the variable torchrun keeps its store
for all restarts, and a process may try to reach another one where it was before. Started again later, with
any number of processes, the training goes on from where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

import anyio
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

BATCH_SIZE = 120  # of all processes together
LEARNING_RATE = 1e-2


def digits() -> tuple[Tensor, Tensor]:
    """Return the images of scikit-learn's digits and their classes, in an order of their own."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def net() -> nn.Module:
    """Return a new classifier."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


def rows_of_step(step: int, num_rows: int, rank: int, world_size: int) -> Tensor:
    """Return the rows of one process's part of a step's batch: the same whenever it is asked for."""
    num_batches = num_rows // BATCH_SIZE
    epoch, place = divmod(step, num_batches)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(epoch))
    batch = order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]
    return batch[rank::world_size]


async def train(checkpoint: Path, num_steps: int, every: int) -> None:
    """Train up to a number of steps, from the checkpoint if there is one, and save one now and then."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # each process has its own dropout
    images, classes = digits()
    num_train = len(classes) * 4 // 5
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    async with asyncdp.DataParallel(module, "cpu", process_group=dist.group.WORLD) as engine:
        step = 0
        if await anyio.Path(checkpoint).exists():
            step = (await engine.load(checkpoint, optimizer, schedule)).num_steps
            say(f"goes on from step {step}")
        while step < num_steps:
            rows = rows_of_step(step, num_train, rank, world_size)
            await engine.train_step(images[rows], classes[rows], functional.cross_entropy, optimizer)
            schedule.step()
            step += 1
            if step % every == 0 or step == num_steps:
                await engine.save(checkpoint, optimizer, schedule)
                say(f"saved step {step}")
        answers = (await engine.in_mode(training=False)(images[num_train:])).argmax(1)
    say(f"accuracy {(answers == classes[num_train:]).double().mean():.4f}")


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    """Join the other processes, and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint, seen by all processes")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=12, help="steps from one checkpoint to the next")
    options = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo")
    try:
        asyncio.run(train(options.checkpoint, options.steps, options.every))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
