"""The folder of a checkpoint: whole or not there, whatever happens, and checked before it is loaded."""

from __future__ import annotations

import asyncio
import copy
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
import torch
from torch import nn

import asyncdp
from asyncdp.errors import (
    CheckpointError,
    DamagedCheckpointError,
    NotACheckpointError,
    NotAnOptimizerError,
    NotASchedulerError,
)

from ..runtime.helpers import Latch
from .helpers import Gated, engine, gates, mlp, same

T = TypeVar("T")


def run(use: Callable[[asyncdp.DataParallel], Awaitable[T]], module: nn.Module | None = None) -> T:
    """Use an engine on an event loop that is there for that alone: tests here touch files themselves."""

    async def main() -> T:
        async with engine(mlp() if module is None else module, 1) as one:
            return await use(one)

    return asyncio.run(main())


def save(path: Path, extra: str) -> None:
    """Save a checkpoint with a mark."""
    run(lambda one: one.save(path, extra=extra))


def mark(path: Path) -> object:
    """Load a checkpoint, and return its mark."""
    return run(lambda one: one.load(path)).extra


def test_a_cancelled_save_leaves_nothing(tmp_path: Path) -> None:
    """Given up in the middle, it leaves no file behind, and an earlier checkpoint stays as it was."""
    save(tmp_path / "a", "first")

    async def cancel(one: asyncdp.DataParallel, name: str) -> bool:
        gates["write"] = latch = Latch()
        optimizer = torch.optim.SGD(one.module.parameters(), 0.1)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(one.save, tmp_path / name, optimizer, Gated(optimizer, 1))
                await latch.wait_entered()
                scope.cancel()
                latch.open()
        return scope.cancelled_caught

    for name in ("a", "b"):
        assert run(lambda one, name=name: cancel(one, name))  # type: ignore[misc]
    assert os.listdir(tmp_path) == ["a"]
    assert len(os.listdir(tmp_path / "a")) == 3
    assert mark(tmp_path / "a") == "first"


def test_a_new_checkpoint_replaces_an_earlier_one(tmp_path: Path) -> None:
    """Also by way of a link and a relative path; of the earlier one only what others put there is left."""
    save(tmp_path / "a", "first")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "latest").symlink_to("a")
    save(Path(os.path.relpath(tmp_path / "latest")), "second")
    assert mark(tmp_path / "a") == "second"
    assert (tmp_path / "latest").is_symlink()
    assert len(os.listdir(tmp_path / "a")) == 4


CHILD = """
import asyncio, sys, torch, asyncdp

class Slow:
    def state_dict(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):  # on the thread that writes
        print("writing", flush=True)
        sys.stdin.read()

Slow.load_state_dict = Slow.state_dict

async def main():
    async with asyncdp.DataParallel(torch.nn.Linear(2, 2), "cpu") as engine:
        await engine.save(sys.argv[1], scheduler=Slow())

asyncio.run(main())
"""


def test_a_killed_save_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    """After a SIGKILL amid a save the checkpoint before it loads, and the next save clears the rest away."""
    save(tmp_path / "a", "first")
    argv = [sys.executable, "-c", CHILD, str(tmp_path / "a")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        child.send_signal(signal.SIGKILL)
    assert len(os.listdir(tmp_path)) == 2
    assert mark(tmp_path / "a") == "first"
    save(tmp_path / "a", "second")
    assert mark(tmp_path / "a") == "second"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the file system is said with its cause, and the earlier checkpoint stays."""
    save(tmp_path / "a", "first")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(tmp_path / "a", "second")
    assert os.listdir(tmp_path) == ["a"]
    assert mark(tmp_path / "a") == "first"


def test_what_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    """State of a scheduler that no file can hold is an error, and leaves nothing."""

    async def use(one: asyncdp.DataParallel) -> None:
        optimizer = torch.optim.SGD(one.module.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        scheduler.note = lambda: None  # type: ignore[attr-defined]
        await one.save(tmp_path / "a", optimizer, scheduler)

    with pytest.raises(CheckpointError, match="has to be picklable"):
        run(use)
    assert os.listdir(tmp_path) == []


def cut(file: Path) -> None:
    """Cut a file off in the middle, as a full disk would."""
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


def test_damage_is_found(tmp_path: Path) -> None:
    """A checkpoint with a file missing, cut off or changed in one bit loads nothing: it is an error."""
    module = mlp()
    save(tmp_path / "a", "first")
    before = copy.deepcopy(module.state_dict())
    for file in (tmp_path / "a").iterdir():
        data = file.read_bytes()
        for damage in (cut, flip, Path.unlink):
            damage(file)
            with pytest.raises((DamagedCheckpointError, NotACheckpointError), match=str(tmp_path)):
                run(lambda one: one.load(tmp_path / "a"), module)
            file.write_bytes(data)
    assert same(dict(before), dict(module.state_dict()))
    assert mark(tmp_path / "a") == "first"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """Neither is anything loaded from other files, nor are they written over."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.json").write_text(json.dumps([1]))
    (tmp_path / "empty").mkdir()
    for name in ("file", "folder", "empty", "nothing"):
        with pytest.raises(NotACheckpointError, match="Name a folder that"):
            mark(tmp_path / name)
    for name in ("file", "folder"):
        with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
            save(tmp_path / name, "")
    save(tmp_path / "empty", "filled")
    assert mark(tmp_path / "empty") == "filled"
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "folder") == ["file.json"]


def test_arguments_are_checked_first(tmp_path: Path) -> None:
    """Each wrong argument has an error of its own, before anything is copied or written."""
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    place: Any = tmp_path / "a"
    wrong: list[tuple[type[Exception], Callable[[asyncdp.DataParallel], Awaitable[object]]]] = [
        (TypeError, lambda one: one.save(3)),  # type: ignore[arg-type]
        (ValueError, lambda one: one.save("")),
        (ValueError, lambda one: one.save("s3://bucket/a")),
        (NotAnOptimizerError, lambda one: one.save(place, module.parameters())),
        (NotASchedulerError, lambda one: one.save(place, optimizer, optimizer)),
        (NotASchedulerError, lambda one: one.load(place, optimizer, 3)),
        (TypeError, lambda one: one.save(place, optimizer, scaler=optimizer)),
        (TypeError, lambda one: one.save(place, extra=lambda: None)),
    ]
    for error, call in wrong:
        with pytest.raises(error):
            run(call, module)
    assert os.listdir(tmp_path) == []
