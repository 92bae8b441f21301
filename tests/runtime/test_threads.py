"""The intra-op threads of the threads that make runtimes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import asyncdp
from asyncdp._devices.threads import _pause_call

pytestmark = pytest.mark.skipif(
    torch.get_num_threads() == 1 or _pause_call() is None,
    reason="an operation has threads of its own on several cores, and only GNU's OpenMP can end them",
)


def num_helpers_left() -> tuple[int, int]:
    """Return how many threads an operation of this thread brings, and how many a new runtime leaves."""

    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    before = threads()
    torch.ones(1 << 20).add_(1)
    helpers = threads() - before
    asyncdp.Runtime("cpu")
    left = helpers & threads()
    torch.ones(1 << 20).add_(1)  # works as before
    return len(helpers), len(left)


def test_helpers_of_the_thread_that_makes_a_runtime_are_ended() -> None:
    """Idle OpenMP threads would slow down the lanes: none of the maker's is left, whatever it did before."""
    with ThreadPoolExecutor(1) as pool:
        num_helpers, num_left = pool.submit(num_helpers_left).result(20)
    assert num_helpers == torch.get_num_threads() - 1
    assert num_left == 0
