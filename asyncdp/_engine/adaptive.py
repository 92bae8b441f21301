"""Calls and training steps on as many lanes as pay, without ever changing what they mean."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _tree
from .._replicas.replica_set import ReplicaSet
from .._replicas.snapshot import ModuleSnapshot
from .._training.trainer import count_rows
from .route import Route
from .tuner import LaneChoice, Tuner, Workload

_KIND = attrgetter("dtype", "shape")


class Adaptive:
    """Chooses the number of lanes of every call of one module.

    Args:
        module: whose calls these are.
        route: the lanes there are.
    """

    def __init__(self, module: nn.Module, route: Route) -> None:
        self._module = module
        self._route = route
        self._all = len(route.lanes)
        self._tuner = Tuner(self._all)
        self._latest: tuple[Any, Workload] | None = None  # what was asked for last, and its workload

    def choices(self) -> tuple[LaneChoice, ...]:
        """What was chosen so far, and why."""
        return self._tuner.choices()

    async def call(self, replicas: ReplicaSet, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one batch."""
        batch = args if not kwargs else (args, dict(kwargs))
        tensors = tensors_of(batch)
        workload = self._workload("call", tensors, replicas.snapshots.parts(self._module))
        is_trial = workload.is_learning
        num_lanes = workload.choose()
        num_elements = sum(map(Tensor.numel, tensors))
        started = time.perf_counter()
        result = await self._run(num_lanes, replicas, args, kwargs)
        workload.record(num_lanes, time.perf_counter() - started, num_elements)
        if is_trial and not self._keeps_its_meaning(workload, result, batch):
            workload.fix("outputs are not made of rows of the batch")
            if num_lanes != self._all:
                return await self._run(self._all, replicas, args, kwargs)
        return result

    def choose_for_step(self, batch: Any, snapshot: ModuleSnapshot) -> tuple[int, Callable[[float], None]]:
        """The number of lanes for one training step, and what to tell the seconds it took."""
        tensors = tensors_of(batch)
        workload = self._workload("train_step", tensors, snapshot)
        num_lanes = workload.choose()
        size = sum(map(Tensor.numel, tensors))
        return num_lanes, partial(workload.record, num_lanes, size=size)

    async def _run(
        self, num_lanes: int, replicas: ReplicaSet, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if num_lanes == 1:
            return await self._route.run_whole(self._module, replicas, args, kwargs)
        return await self._route.run(self._module, replicas, args, kwargs, num_lanes)

    def _workload(self, kind: str, tensors: Sequence[Tensor], snapshot: ModuleSnapshot) -> Workload:
        """The workload of a call; one that may not be tuned is fixed here."""
        mode = "train" if self._module.training else "eval"
        reason = why_fixed(snapshot)
        asked = (kind, mode, _torch_mode(), reason, [*map(_KIND, tensors)])
        if self._latest is not None and asked == self._latest[0]:
            return self._latest[1]  # most calls are as the one before, and spared the making of a key
        key = Key((*asked[:3], *map(roughly, tensors), None if reason is None else f"({reason})"))
        workload = self._tuner.workload(key)
        if reason is not None:
            workload.fix(reason)
        self._latest = asked, workload
        return workload

    def _keeps_its_meaning(self, workload: Workload, result: Any, batch: Any) -> bool:
        num_rows = count_rows(batch, self._route.dim)
        found = None if num_rows is None else growth(result, num_rows, self._route.dim)
        return found is not None and workload.agrees(found)


class Key(tuple[Any, ...]):
    """Names a workload; calls of about the same sizes share one."""

    __slots__ = ()

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part is not None)


class Rough(NamedTuple):
    """The dtype of a tensor, and of each length its number of bits.

    So lengths count in powers of two: batches of ever new lengths would otherwise never be done learning.
    """

    dtype: torch.dtype
    bits: tuple[int, ...]

    def __str__(self) -> str:
        lengths = "x".join(f"~{2 ** (bits - 1)}" if bits else "0" for bits in self.bits)
        return f"{str(self.dtype).removeprefix('torch.')}[{lengths}]"


def tensors_of(batch: Any) -> Sequence[Tensor]:
    """All tensors of a batch."""
    if type(batch) is tuple:  # of tensors alone, as most calls are: spared the detour over trees
        for each in batch:
            if not isinstance(each, Tensor):
                break
        else:
            return batch
    return [leaf for leaf in _tree.flatten(batch)[0] if isinstance(leaf, Tensor)]


def roughly(tensor: Tensor) -> Rough:
    """The dtype and rough shape of a tensor."""
    return Rough(tensor.dtype, tuple(map(int.bit_length, tensor.shape)))


def _torch_mode() -> str:
    """What of torch's state in this thread makes calls quicker or slower."""
    records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    mode = "grad" if records else "no_grad"
    is_mixed = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return f"{mode} autocast" if is_mixed else mode


def why_fixed(snapshot: ModuleSnapshot) -> str | None:
    """Return why the results of a module may depend on how a batch is split, or None."""
    if torch.are_deterministic_algorithms_enabled():
        return "torch's deterministic mode is on"
    modules = snapshot.modules
    for each in (modules[position] for position in snapshot.buffer_owners):
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            if each.training or each.running_mean is None:
                return "batch statistics are computed per shard"
        elif each.training:
            return "a module in train mode has buffers, which may hold statistics of batches"
    return None


def growth(result: Any, num_rows: int, dim: int) -> tuple[int | None, ...] | None:
    """How many rows of each output there are to a row of input; None if an output has no such ratio.

    A result that has one, and the same on any number of lanes, does not depend on how many there were.
    """
    ratios: list[int | None] = []
    for leaf in _tree.flatten(result)[0]:
        if isinstance(leaf, Tensor):
            if not -leaf.dim() <= dim < leaf.dim() or num_rows == 0 or leaf.shape[dim] % num_rows:
                return None
            ratios.append(leaf.shape[dim] // num_rows)
        elif leaf is None or isinstance(leaf, (str, bool)):
            ratios.append(None)
        else:
            return None
    return tuple(ratios)
