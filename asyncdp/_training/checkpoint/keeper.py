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
from ..._checks import shown
from ..._replicas.order import Use, in_turn, passes, wait_turn
from ..._replicas.replica_set import ReplicaSet
from ..._runtime import Lane, Scheduler, Task
from ..state import unchanging
from ..trainer import Trainer
from . import folder, generators
from .content import Content
from .entries import Entries, Path_, Stop, on_thread
from .others import Others, others_of

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

    async def save(
        self, path: str | os.PathLike[str], make_content: Callable[[], Content], extra: Any
    ) -> Checkpoint:
        """Save a checkpoint; see `DataParallel.save`."""
        with others_of(self._trainer.shared, is_load=False) as others:
            content, frozen = make_content(), _pickled(extra)
            place = await on_thread(_target if others.is_first else _resolved, _place(path))
            parts = self._modules.snapshots.parts(content.module)
            lane = self._scheduler.least_busy(self._lanes)[0]
            use = Use(parts, optimizer=content.optimizer)
            entries = await self._between_steps(use, lane, "save", partial(self._collect, content, others))
        entries[_POSITION]["extra"] = pickle.loads(frozen)
        num_steps = entries[_POSITION]["num_steps"]
        about = {"num_steps": num_steps, "classes": content.class_names()}
        await on_thread(partial(others.write, partial(folder.write, place, entries, about)))
        return Checkpoint(place, num_steps, extra)

    async def load(
        self, path: str | os.PathLike[str], make_content: Callable[[], Content], *, restores_generators: bool
    ) -> Checkpoint:
        """Load a checkpoint; see `DataParallel.load`."""
        lane = self._lanes[0]  # no other may write to the module's buffers
        with others_of(self._trainer.shared, is_load=True) as others:
            content = make_content()
            opened = await on_thread(folder.open_whole, _place(path))
            choose = partial(content.choose, opened.path, opened.kinds, opened.about)
            parts = self._modules.snapshots.parts(content.module)
            paths = await self._run(lane, "load", partial(self._unchanging, content, choose))
            entries = await on_thread(opened.read, [*paths, _POSITION, _GENERATORS])
            use = Use(parts, changes=True, changes_frozen=True, optimizer=content.optimizer)
            restored = entries.pop(_GENERATORS) if restores_generators else []
            apply = partial(self._apply, opened, content, entries, others, restored)
            await self._between_steps(use, lane, "load", apply)
        return Checkpoint(opened.path, **entries[_POSITION])

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

    def _collect(self, content: Content, others: Others) -> Entries:
        """Copy what is saved: the states of the generators of all processes, and all else of the first."""
        entries = self._unchanging(content, content.collect) if others.is_first else {}
        entries[_POSITION] = {"num_steps": self._trainer.num_steps}
        own = generators.capture(self._devices)
        entries[_GENERATORS] = others.gather(own, f"{self._trainer.num_steps} steps taken")
        return entries

    def _apply(
        self, opened: folder.Opened, content: Content, entries: Entries, others: Others, restored: list[Any]
    ) -> None:
        others.gather(None, f"the checkpoint {opened.identity}")
        parts = self._modules.snapshots.parts(content.module)
        use = Use(parts, changes=True, changes_frozen=True, optimizer=content.optimizer)
        with in_turn(use), torch.inference_mode(False), torch.no_grad():
            put_back = content.prepare(opened.path, entries).run()
            try:
                others.agree()
            except BaseException as error:
                put_back(error)
                raise
            content.clear_gradients()
            self._trainer.discard_accumulated()
            self._trainer.num_steps = entries[_POSITION]["num_steps"]
            if others.rank < len(restored):  # those of more processes than there were go on as they are
                generators.restore(restored[others.rank], self._devices)


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
            f"path must name a folder of a file system, but got {shown(place)}. "
            "Save to a local or shared folder, and copy it to a store from there."
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


def _resolved(path: Path, stop: Stop) -> Path:
    """Return where a link leads."""
    return path.resolve()


def _target(path: Path, stop: Stop) -> Path:
    """Return where a link leads, if nothing stands in the way there."""
    target = path.resolve()
    folder.check_target(target)
    return target
