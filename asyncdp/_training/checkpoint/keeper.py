"""Saving and loading of checkpoints, in turn with the steps of the module."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ... import _loops
from ..._replicas.order import Use, in_turn, passes, wait_turn
from ..._replicas.replica_set import ReplicaSet
from ..._runtime import Lane, Scheduler, Task
from ..state import unchanging
from ..trainer import Trainer
from . import folder, generators
from .content import Content
from .entries import Entries, Path_, Stop, on_thread

T = TypeVar("T")

_POSITION: Path_ = ("position",)
_GENERATORS: Path_ = ("generators",)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was saved or loaded."""

    path: Path
    """Its folder."""
    num_steps: int
    """Optimizer steps that had been taken; see `DataParallelStatistics`."""
    extra: Any
    """What was given to be saved with it."""


class CheckpointKeeper:
    """Saves and loads the checkpoints of one engine.

    Args:
        modules: replicas of the engine's module.
        trainer: takes the engine's steps.
        scheduler: whose lanes these are.
        lanes: where to copy.
    """

    def __init__(
        self, modules: ReplicaSet, trainer: Trainer, scheduler: Scheduler, lanes: Sequence[Lane]
    ) -> None:
        self._modules = modules
        self._trainer = trainer
        self._scheduler = scheduler
        self._lanes = lanes
        self._devices = [lane.device for lane in lanes]

    async def save(self, path: str | os.PathLike[str], content: Content, extra: Any) -> Checkpoint:
        """Save a checkpoint; see `DataParallel.save`."""
        place, frozen = _place(path), _pickled(extra)
        place = await on_thread(_resolved_target, place)
        parts = self._modules.snapshots.parts(content.module)
        lane = self._scheduler.least_busy(self._lanes)[0]
        use = Use(parts, optimizer=content.optimizer)
        entries = await self._between_steps(use, lane, "save", partial(self._collect, content))
        entries[_POSITION]["extra"] = pickle.loads(frozen)
        num_steps = entries[_POSITION]["num_steps"]
        about = {"num_steps": num_steps, "classes": content.class_names()}
        await on_thread(folder.write, place, entries, about)
        return Checkpoint(place, num_steps, extra)

    async def load(
        self, path: str | os.PathLike[str], content: Content, *, restores_generators: bool
    ) -> Checkpoint:
        """Load a checkpoint; see `DataParallel.load`."""
        opened = await on_thread(folder.open_whole, _place(path))
        place = opened.path
        lane = self._lanes[0]  # no other may write to the module's buffers
        choose = partial(content.choose, place, opened.kinds, opened.about)
        parts = self._modules.snapshots.parts(content.module)
        paths = await self._run(lane, "load", partial(self._unchanging, content, choose))
        entries = await on_thread(opened.read, [*paths, _POSITION, _GENERATORS])
        use = Use(parts, changes=True, changes_frozen=True, optimizer=content.optimizer)
        apply = partial(self._apply, place, content, entries, restores_generators=restores_generators)
        await self._between_steps(use, lane, "load", apply)
        return Checkpoint(place, **entries[_POSITION])

    async def _between_steps(self, use: Use, lane: Lane, label: str, function: Callable[[], T]) -> T:
        """Run a function on a lane while no step is under way."""
        use.loop = _loops.current()
        try:
            if not passes.arrive(use):
                self._scheduler.check_open()
                await wait_turn(use)
            return await self._run(lane, label, function)
        finally:
            passes.leave(use)

    async def _run(self, lane: Lane, label: str, function: Callable[[], T]) -> T:
        return (await self._scheduler.run([Task(lane, function, label)]))[0]  # type: ignore[no-any-return]

    def _unchanging(self, content: Content, function: Callable[[], T]) -> T:
        with unchanging(self._modules.snapshots.parts(content.module), content.optimizer):
            return function()

    def _collect(self, content: Content) -> Entries:
        def collect() -> Entries:
            position = {"num_steps": self._trainer.num_steps}
            states = [generators.capture(self._devices)]
            return {**content.collect(), _POSITION: position, _GENERATORS: states}

        return self._unchanging(content, collect)

    def _apply(self, path: Path, content: Content, entries: Entries, *, restores_generators: bool) -> None:
        parts = self._modules.snapshots.parts(content.module)
        use = Use(parts, changes=True, changes_frozen=True, optimizer=content.optimizer)
        with in_turn(use), torch.inference_mode(False), torch.no_grad():
            content.prepare(path, entries).run()
            content.clear_gradients()
            self._trainer.discard_accumulated()
            self._trainer.num_steps = entries[_POSITION]["num_steps"]
            if restores_generators:
                generators.restore(entries[_GENERATORS][0], self._devices)


def _place(path: str | os.PathLike[str]) -> Path:
    try:
        place = os.fsdecode(path)
    except TypeError:
        raise TypeError(
            f"path must be a str or a path, but got {type(path).__qualname__}. "
            "Name the folder of the checkpoint."
        ) from None
    if not place or "://" in place:
        raise ValueError(
            f"path must name a folder of a file system, but got {place!r}. Save to a local or shared folder, "
            "and copy it to a store from there."
        )
    return Path(place)


def _pickled(extra: Any) -> bytes:
    try:
        return pickle.dumps(extra)
    except Exception as error:
        raise TypeError(
            f"extra cannot be pickled: {type(error).__name__}: {error}. Give numbers, texts, tensors, and "
            "lists and dictionaries of these."
        ) from error


def _resolved_target(path: Path, stop: Stop) -> Path:
    """Return where a link leads, if nothing stands in the way there."""
    target = path.resolve()
    folder.check_target(target)
    return target
