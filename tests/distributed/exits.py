"""Run as a script: two processes of one group, the first of which exits while it waits for the other."""

from __future__ import annotations

import os
import sys
import time

import anyio
import torch
import torch.distributed as dist
from torch import nn

import asyncdp

READER, WRITER = os.pipe()


class AtTheEnd:
    """Lets the other process die while the interpreter of this one shuts down."""

    def __init__(self, other: int) -> None:
        self._other = other

    def __del__(self, close=os.close, wait=os.waitpid, sleep=time.sleep, writer=WRITER) -> None:
        close(writer)
        wait(self._other, 0)
        sleep(0.5)  # for what must not happen: a thread that comes back from its wait aborts the process


async def give_up_a_step(engine: asyncdp.DataParallel) -> None:
    """Begin a step that the other process never joins."""
    optimizer = torch.optim.SGD(engine.module.parameters(), 0.1)
    with anyio.move_on_after(0.2) as scope:
        await engine.train_step(torch.zeros(4, 2), torch.zeros(4, 1), nn.functional.mse_loss, optimizer)
    assert scope.cancelled_caught


def main() -> None:
    """Make both processes, and end this one."""
    other = os.fork()
    rank = 0 if other else 1
    os.close(READER if other else WRITER)
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
    engine = asyncdp.DataParallel(nn.Linear(2, 1), "cpu", process_group=dist.group.WORLD)
    if rank:
        os.read(READER, 1)  # until the first one ends
        os._exit(0)
    anyio.run(give_up_a_step, engine)
    sys.at_the_end = AtTheEnd(other)  # type: ignore[attr-defined]  one of the last things to go


if __name__ == "__main__":
    main()
