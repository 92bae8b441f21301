"""Trains a classifier of digits in groups of processes that may die and come back, by torchft's manager.

    pip install 'asyncdp[torchft]' scikit-learn
    python digits_torchft.py                                               # a lighthouse and two groups
    python digits_torchft.py --die-at 30                                   # group 1 is killed in that step
    python digits_torchft.py --die-at 30 --restarts 1 --min-groups 2       # and is waited for, and heals

When a group dies, the others lose the step that they are in, take it again with all of its rows, and go on.
A group that comes back gets weights, optimizer and scheduler from one that is there. On several machines, the
lighthouse and each group are started by themselves:

    torchft_lighthouse --min_replicas 1 --bind '[::]:29510'
    python digits_torchft.py --group 0 --lighthouse http://HOST:29510
    python digits_torchft.py --group 1 --lighthouse http://HOST:29510

With RUST_LOG=error torchft's log is short.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import signal
import socket
import sys
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import torch
from anyio import to_thread
from digits_distributed import LEARNING_RATE, digits, net, rows_of_step
from torch.nn import functional
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer

import asyncdp

NUM_GROUPS = 2
TIMEOUT = timedelta(seconds=30)  # of a group that hangs; a connection that breaks is noticed at once
HEARTBEAT_TIMEOUT = 2000  # milliseconds for which the others wait for a silent group before they go on


class StepLostError(Exception):
    """The groups could not agree on a step: one of them has died, say."""


class Group:
    """What one replica group trains.

    Args:
        number: its place among the groups.
        lighthouse: URL of the lighthouse.
        num_steps: how many steps all groups train together.
        min_groups: with fewer groups no step is taken.
        first_groups: with fewer groups the first step is not taken.
        die_at: the step in which this process kills itself.
    """

    def __init__(
        self,
        number: int,
        lighthouse: str,
        *,
        num_steps: int,
        min_groups: int,
        first_groups: int,
        die_at: int | None,
    ) -> None:
        torch.manual_seed(number)  # its own weights, until the first quorum, and its own dropout
        self.number, self.num_steps = number, num_steps
        self.first_groups, self.die_at = first_groups, die_at
        self.module = net()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)
        # In it the processes of one group find each other; this group has only one.
        host = socket.gethostname()  # by this name other groups must find it, for torchft's servers as well
        self.store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=TIMEOUT),
            load_state_dict=self.load_state_dict,
            state_dict=self.state_dict,
            min_replica_size=min_groups,
            use_async_quorum=False,  # so that a group heals before its forward, and not within a step
            timeout=TIMEOUT,
            quorum_timeout=TIMEOUT * 2,
            rank=0,
            world_size=1,
            store_addr=host,
            store_port=self.store.port,
            lighthouse_addr=lighthouse,
            replica_id=f"group{number}",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a group that comes back needs; called on a thread of the manager's, within a quorum.

        The tensors need no copy: from here until `should_commit` has waited for who reads them, nothing
        writes to them. A step of asyncdp changes parameters, buffers and optimizer after `before_step` alone.
        """
        parts = {"module": self.module, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a group that is ahead; called within `begin_step`, while no step runs."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.say(f"heals at step {self.manager.current_step()}")

    def begin_step(self) -> tuple[int, int, int]:
        """Wait for the quorum; return the step, this group's place in it and the number of its groups."""
        self.manager.start_quorum()
        place = self.manager.participating_rank()
        assert place is not None, "a quorum that is waited for has no spares, so every group takes part"
        return self.manager.current_step(), place, self.manager.num_participants()

    def agree(self) -> None:
        """Average the gradients over the groups, and raise unless the step counts; runs on a lane."""
        if self.manager.current_step() == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        # An average of groups is one of rows, since all groups have equally many.
        works = [self.manager.allreduce(parameter.grad) for parameter in self.module.parameters()]
        for work in works:
            work.wait()
        if not self.manager.should_commit():
            raise StepLostError(f"step {self.manager.current_step()} is lost")

    async def train(self) -> None:
        """Train until all steps are taken; other threads than the loop's wait for other groups."""
        images, classes = digits()
        num_train = len(classes) * 4 // 5
        taken = lost = 0
        async with asyncdp.DataParallel(self.module, "cpu") as engine:
            while self.manager.current_step() < self.num_steps:
                step, place, num_groups = await to_thread.run_sync(self.begin_step)
                if step == 0 and num_groups < self.first_groups:
                    await anyio.sleep(0.1)  # the lighthouse calls nobody when a group comes
                    continue
                rows = rows_of_step(step, num_train, place, num_groups)
                batch = images[rows], classes[rows]
                try:
                    await engine.train_step(
                        *batch, functional.cross_entropy, self.optimizer, before_step=self.agree
                    )
                except StepLostError:
                    lost += 1
                    self.say(f"loses step {step}")
                else:
                    self.schedule.step()
                    taken += 1
                    self.say(f"has taken step {step} with {len(rows)} rows")
            answers = (await engine.in_mode(training=False)(images[num_train:])).argmax(1)
        accuracy = (answers == classes[num_train:]).double().mean()
        digest = hashlib.sha256()
        for value in self.module.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.say(
            f"ends: {taken} taken, {lost} lost, accuracy {accuracy:.4f}, weights {digest.hexdigest()[:16]}"
        )

    def say(self, text: str) -> None:
        """Print a line that tells whose it is."""
        print(f"group {self.number} {text}\n", end="", flush=True)  # in one piece, beside other processes


async def keep(number: int, arguments: list[str], die_at: int | None, restarts: int) -> None:
    """Run a group in a process of its own, and start it again when it dies."""
    command = [sys.executable, __file__, f"--group={number}", *arguments]
    dying = [] if die_at is None else [f"--die-at={die_at}"]
    code = (await anyio.run_process([*command, *dying], stdout=None, stderr=None, check=False)).returncode
    while code and restarts:
        restarts -= 1
        print(f"group {number} ended with {code} and is started again", flush=True)
        code = (await anyio.run_process(command, stdout=None, stderr=None, check=False)).returncode
    if code:
        print(f"group {number} ended with {code}", flush=True)


async def launch(options: argparse.Namespace) -> None:
    """Run a lighthouse and all groups on this machine; the last group is the one that may die."""
    server = await to_thread.run_sync(
        partial(
            LighthouseServer,
            bind="[::]:0",
            min_replicas=options.min_groups,
            heartbeat_timeout_ms=HEARTBEAT_TIMEOUT,
        )
    )
    arguments = [
        f"--lighthouse={server.address()}",
        f"--steps={options.steps}",
        f"--min-groups={options.min_groups}",
        f"--first-groups={options.first_groups}",
    ]
    try:
        async with anyio.create_task_group() as groups:
            for number in range(NUM_GROUPS):
                die_at = options.die_at if number == NUM_GROUPS - 1 else None
                groups.start_soon(keep, number, arguments, die_at, options.restarts)
    finally:
        server.shutdown()


def main() -> None:
    """Run one group, or a lighthouse and all groups."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--min-groups", type=int, default=1, help="with fewer groups the others wait")
    parser.add_argument("--first-groups", type=int, default=NUM_GROUPS, help="that the first step waits for")
    parser.add_argument("--die-at", type=int, help="the step in which a group kills itself")
    parser.add_argument("--restarts", type=int, default=0, help="how often a group is started again")
    parser.add_argument("--group", type=int, help="run this group alone")
    parser.add_argument("--lighthouse", help="with --group: the URL of a lighthouse")
    options = parser.parse_args()
    if options.group is None:
        asyncio.run(launch(options))
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // NUM_GROUPS))
    group = Group(
        options.group,
        options.lighthouse,
        num_steps=options.steps,
        min_groups=options.min_groups,
        first_groups=options.first_groups,
        die_at=options.die_at,
    )
    try:
        asyncio.run(group.train())
    finally:
        group.manager.shutdown(wait=False)


if __name__ == "__main__":
    main()
