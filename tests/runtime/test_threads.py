"""The intra-op threads of the threads that make runtimes and engines."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import asyncdp
from asyncdp._devices.threads import _pause_call

pytestmark = pytest.mark.skipif(
    torch.get_num_threads() == 1 or _pause_call() is None,
    reason="an operation has threads of its own on several cores, and only GNU's OpenMP can end them",
)


def make_runtime() -> None:
    asyncdp.Runtime("cpu")


def make_engine(runtime: asyncdp.Runtime) -> None:
    asyncdp.DataParallel(nn.Linear(2, 2), runtime=runtime)


def num_helpers_left(make: Callable[[], object]) -> tuple[int, int]:
    """How many threads an operation of this thread brings, and how many of them are left after `make`."""

    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    before = threads()
    torch.ones(1 << 20).add_(1)
    helpers = threads() - before
    make()
    left = helpers & threads()
    torch.ones(1 << 20).add_(1)  # works as ever
    return len(helpers), len(left)


@pytest.mark.parametrize("what", ["runtime", "engine"])
def test_helpers_of_the_thread_that_makes_it_are_ended(what: str) -> None:
    """Idle OpenMP threads would slow down the lanes: none of the maker's is left, whatever it did before."""
    runtime = asyncdp.Runtime("cpu")
    make = make_runtime if what == "runtime" else lambda: make_engine(runtime)
    with ThreadPoolExecutor(1) as pool:
        num_helpers, num_left = pool.submit(num_helpers_left, make).result(20)
    assert num_helpers == torch.get_num_threads() - 1
    assert num_left == 0
