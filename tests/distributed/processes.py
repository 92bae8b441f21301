"""Processes that are started once and run many checks together, each in the same order."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=20)


class Processes:
    """Some processes of one group of torch.distributed."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")  # which imports torch once for all
        context.set_forkserver_preload(["tests.distributed.checks"])
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, str(folder / "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def run(self, check: Callable[..., Any], *args: Any, lost: int | None = None) -> list[Any]:
        """Return what `check(rank, *args)` returns in each process; raise what it raises in any.

        Args:
            check: a function of `checks`.
            *args: its arguments.
            lost: the process that dies of it.
        """
        for pipe in self._pipes:
            pipe.send((check, args))
        answers = [pipe.recv() for rank, pipe in enumerate(self._pipes) if rank != lost]
        for failed, answer in answers:
            if failed:
                raise AssertionError(answer)
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End them."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def _serve(rank: int, size: int, path: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(path, size), rank=rank, world_size=size, timeout=TIMEOUT
    )
    while True:
        try:
            check, args = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            pipe.send((False, check(rank, *args)))
        except BaseException:
            pipe.send((True, f"process {rank}: {traceback.format_exc()}"))
