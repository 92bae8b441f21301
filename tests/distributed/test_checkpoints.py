"""Checkpoints over processes: of the same step everywhere, by one or none, for any number of processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ..training.helpers import engine
from . import checkpoint_checks as checks
from .checks import state_of
from .processes import Processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two processes, for all tests of this file."""
    processes = Processes(2, tmp_path_factory.mktemp("pair"))
    yield processes
    processes.close()


def test_a_training_goes_on_with_any_number_of_processes(pair: Processes, tmp_path: Path) -> None:
    """To the last bit with as many, each with random numbers of its own; and with one, and back again."""
    first, other = pair.run(checks.go_on_from_a_checkpoint, tmp_path / "two")
    assert first[:4] == other[:4] == (True, 3, 3, "of process 0")
    module = checks.Net()
    optimizer, schedule = checks.parts(module)

    async def load_and_save() -> None:
        async with engine(module) as one:
            assert (await one.load(tmp_path / "two", optimizer, schedule)).num_steps == 3
            await one.save(tmp_path / "one", optimizer, schedule, extra="alone")

    asyncio.run(load_and_save())
    torch.testing.assert_close(state_of(module, optimizer), first[4], rtol=0, atol=0)
    for extra, state in pair.run(checks.load, tmp_path / "one"):
        assert extra == "alone"
        torch.testing.assert_close(state, first[4], rtol=0, atol=0)


FAILURES = {
    "step": (("PeerStepError", 1), ("PeerStepError", 1), "takes a step"),
    "load": (("PeerStepError", 1), ("PeerStepError", 1), "loads a checkpoint"),
    "nothing": (("PeerStepError", 1), ("NotACheckpointError", None), "there is nothing"),
    "another": (("PeerStepError", 1), ("PeerStepError", 1), "it has the checkpoint"),
    "argument": (("PeerStepError", 1), ("TypeError", None), "path must be a str"),
    "cancelled": (("PeerStepError", 1), ("TimeoutError", None), "its caller was cancelled"),
    "picky": (("PeerStepError", 1), ("ValueError", None), "picky"),
    "occupied": (("CheckpointError", None), ("PeerStepError", 0), "exists and is no checkpoint"),
    "unpicklable": (("CheckpointError", None), ("PeerStepError", 0), "has to be picklable"),
    "cancelled while it writes": (("ValueError", None), ("PeerStepError", 0), "its caller was cancelled"),
}


def test_what_fails_on_one_process_fails_on_all(pair: Processes, tmp_path: Path) -> None:
    """Each says why, nothing has changed anywhere, nothing is left behind, and the next step just works."""
    (first, state), (other, other_state) = pair.run(checks.fail_in_every_way, tmp_path)
    for name, (mine, theirs, text) in FAILURES.items():
        assert first[name][:2] == mine, first[name]
        assert other[name][:2] == theirs, other[name]
        assert text in (first, other)[mine[0] != "PeerStepError"][name][2]
        assert first[name][3], name
        assert other[name][3], name
    torch.testing.assert_close(state, other_state, rtol=0, atol=0)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "d"]
