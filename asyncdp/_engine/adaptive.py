"""The engine's side of `num_lanes="auto"`: as many lanes as pay, without ever changing what a call means."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._replicas.lane_module import ModuleState
from .._replicas.snapshot import ModuleSnapshot
from .._runtime import Task
from .._runtime.schedule import split_sizes
from .._tree import PerRow
from .._verbs.batch import Batch
from ..errors import GatherError
from .results import growth, have_like_values, layout
from .route import Route
from .tuner import LaneChoice, Tuner, Workload

# A forward may make a table once. All of the first `TURN` calls of a kind take all lanes.
_MIN_CHANGING = 2

NOT_ROWS = "outputs are not made of rows of the batch"
ROWS_MEET = "what a row gives depends on the other rows of its shard, or on chance"
WRITES = "forwards write into their input"


class Adaptive:
    """Chooses the number of lanes of every call of one module.

    Args:
        route: the lanes there are.
    """

    def __init__(self, route: Route) -> None:
        self._route = route
        self._num_lanes = len(route.lanes)
        self._tuner = Tuner(self._num_lanes)

    def choices(self) -> tuple[LaneChoice, ...]:
        """Return what was chosen so far, and why."""
        return self._tuner.choices()

    async def call(self, batch: Batch) -> Any:
        """Run one batch."""
        if batch.rows_over(self._num_lanes) is None:
            return await self._route.run_whole_with_all_threads(batch)
        state = self._route.capture()
        workload = self._workload("call", batch, self._route.in_own_mode(state.snapshot))
        is_trial = workload.is_learning
        num_lanes = workload.choose()
        is_all = num_lanes == self._num_lanes
        versions = _versions(batch) if is_trial else None
        random = None if is_all or workload.is_compared(num_lanes) else self._random_states()
        started = time.perf_counter()
        try:
            result = await self._run(batch, state, num_lanes)
        except GatherError:
            if is_all:
                raise
            return await self._stay_on_all(workload, batch, state, NOT_ROWS)
        seconds = time.perf_counter() - started
        workload.record(num_lanes, seconds, batch.num_elements)
        if is_trial and _versions(batch) != versions:
            workload.fix(WRITES)  # which no second run would find as it was
        elif is_all:
            if is_trial and not self._keeps_its_meaning(workload, result, batch):
                workload.fix(NOT_ROWS)
        elif is_trial and not self._keeps_its_meaning(workload, result, batch):
            return await self._stay_on_all(workload, batch, state, NOT_ROWS)
        elif random is not None and self._splits_differ(batch, num_lanes):
            return await self._compare(workload, batch, state, result, num_lanes, random)
        return result

    def choose_for_step(
        self, batches: Sequence[Batch], snapshot: ModuleSnapshot
    ) -> tuple[int, Callable[[float], None]]:
        """Return the number of lanes for one training step, and a function that records its seconds."""
        workload = self._workload("train_step", batches[0], snapshot)
        num_lanes = workload.choose()
        size = sum(batch.num_elements for batch in batches)
        return num_lanes, partial(workload.record, num_lanes, size=size)

    def _run(self, batch: Batch, state: ModuleState, num_lanes: int) -> Awaitable[Any]:
        if num_lanes == 1:
            return self._route.run_whole_with_all_threads(batch, state)
        return self._route.run_split(batch, num_lanes, state)

    async def _stay_on_all(self, workload: Workload, batch: Batch, state: ModuleState, reason: str) -> Any:
        """Take all lanes from now on, and return what they give."""
        workload.fix(reason)
        return await self._run(batch, state, self._num_lanes)

    async def _compare(
        self,
        workload: Workload,
        batch: Batch,
        state: ModuleState,
        result: Any,
        num_lanes: int,
        random: list[Tensor],
    ) -> Any:
        """Run a batch on all lanes too; return what they give if it is something else, else `result`.

        Values are not compared if the forward draws random numbers.
        """
        expected = await self._run(batch, state, self._num_lanes)
        if layout(result) != layout(expected):
            workload.fix(NOT_ROWS)
            return expected
        if all(map(torch.equal, random, self._random_states())):
            is_coarse = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
            compare = partial(have_like_values, result, expected, is_coarse=is_coarse)
            if not (await self._route.scheduler.run([Task(self._route.lanes[0], compare, "compare")]))[0]:
                workload.fix(ROWS_MEET)
                return expected
        workload.num_compared[num_lanes] += 1
        return result

    def _random_states(self) -> list[Tensor]:
        """Return the states of torch's generators on the host and on the lanes' devices."""
        devices = {lane.device for lane in self._route.lanes if lane.device.type == "cuda"}
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, sorted(devices, key=str))]

    def _splits_differ(self, batch: Batch, num_lanes: int) -> bool:
        num_rows = batch.num_rows
        assert num_rows is not None, "a batch without rows is not split"
        return split_sizes(num_rows, num_lanes) != split_sizes(num_rows, self._num_lanes)

    def _workload(self, kind: str, batch: Batch, snapshot: ModuleSnapshot) -> Workload:
        """Return the workload of a call; one that may not be tuned is fixed here."""
        mode = "train" if snapshot.training[0] else "eval"
        reason = why_fixed(snapshot) or self._why_stateful(snapshot)
        shapes = tuple(ShapeBucket.of(leaf) for leaf in batch.shaped)
        workload = self._tuner.workload(WorkloadKey(kind, mode, _torch_mode(), shapes, reason))
        if reason is not None:
            workload.fix(reason)
        return workload

    def _why_stateful(self, snapshot: ModuleSnapshot) -> str | None:
        """Return why what is left in the module depends on how a batch is split, or None."""
        replicas = self._route.replicas
        num_changing = replicas.carried.num_changing[snapshot.training[0]]
        if replicas.written.known or num_changing >= _MIN_CHANGING:
            return "forwards change the state of the module, of which lane 0's rows survive"
        return None

    def _keeps_its_meaning(self, workload: Workload, result: Any, batch: Batch) -> bool:
        num_rows = batch.num_rows
        found = None if num_rows is None else growth(result, num_rows, self._route.dim)
        return found is not None and workload.agrees(found)


class ShapeBucket(NamedTuple):
    """The dtype of a tensor, or "PerRow", and of each length its number of bits.

    Lengths count in powers of two, lest batches of new lengths all the time never end learning.
    """

    kind: torch.dtype | str
    bits: tuple[int, ...]

    @classmethod
    def of(cls, leaf: Tensor | PerRow) -> ShapeBucket:
        """Return the bucket of a tensor or of a list with one entry per row."""
        if isinstance(leaf, Tensor):
            return cls(leaf.dtype, tuple(map(int.bit_length, leaf.shape)))
        return cls("PerRow", (len(leaf).bit_length(),))

    def __str__(self) -> str:
        lengths = "x".join(f"~{2 ** (bits - 1)}" if bits else "0" for bits in self.bits)
        return f"{str(self.kind).removeprefix('torch.')}[{lengths}]"


class WorkloadKey(NamedTuple):
    """Names a workload; calls of about the same sizes share one."""

    kind: str
    mode: str
    torch_mode: str
    shapes: tuple[ShapeBucket, ...]
    reason: str | None

    def __str__(self) -> str:
        reason = () if self.reason is None else (f"({self.reason})",)
        return " ".join(map(str, (self.kind, self.mode, self.torch_mode, *self.shapes, *reason)))


def _versions(batch: Batch) -> list[int]:
    """Return the versions of the tensors of a batch: a write into one changes its own."""
    return [leaf._version for leaf in batch.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _torch_mode() -> str:
    """Return what of torch's state in this thread makes calls quicker or slower."""
    records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    mode = "grad" if records else "no_grad"
    is_mixed = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return f"{mode} autocast" if is_mixed else mode


def why_fixed(snapshot: ModuleSnapshot) -> str | None:
    """Return why the results of a module may depend on how a batch is split, or None."""
    if torch.are_deterministic_algorithms_enabled():
        return "torch's deterministic mode is on"
    modules = snapshot.modules if snapshot.buffer_owners else []
    for position in snapshot.buffer_owners:
        each, is_training = modules[position], snapshot.training[position]
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            if is_training or each.running_mean is None:
                return "batch statistics are computed per shard"
        elif is_training:
            return "a module in train mode has buffers, which may hold statistics of batches"
    return None
