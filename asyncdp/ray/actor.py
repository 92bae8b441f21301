"""An actor with an engine and a batcher inside, for people's own programs with Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import anyio.to_thread
import torch

from .._devices import Devices
from .._engine.data_parallel import DataParallelStatistics
from .._runtime import LaneState
from .._serving import Batcher, BatcherStatistics
from .._serving.collate import unbind
from .._tree import map_leaves
from ..errors import JobUsageError, NoLaneWorksError
from ..infer.steps import to_columns
from .model import Model, ModelPlan, OpenModel
from .rows import run_rows


@dataclasses.dataclass(frozen=True)
class ActorStatistics:
    """An `InferenceActor` at one moment."""

    engine: DataParallelStatistics
    batcher: BatcherStatistics


class InferenceActor:
    """A model that is loaded once and runs on all lanes of its worker: `ray.remote(InferenceActor)`.

    Its methods are async, so that calls of many others meet in it. Over a model that is a module, tensors go
    in and out, as with `asyncdp.DataParallel` and `asyncdp.Batcher`; NumPy arrays become tensors, and doubles
    become what the model expects. Over a Hugging Face folder, or beside one of `preprocess`, `collate` and
    `postprocess`, values of rows go in, such as texts, and columns come out, as with `asyncdp infer`.

    Args:
        model: `package.module:factory`, a `.pt2` file or a Hugging Face folder, by path or URL, as for
            `asyncdp infer`; or a module, or a function that makes one.
        devices: one lane per entry, see `asyncdp.parse_devices`. None for every GPU that Ray has given to the
            actor (`num_gpus=`), else a CPU lane for each of its CPUs (`num_cpus=`), one if it asked for none.
        batcher: options of the `asyncdp.Batcher` that samples go through, such as `max_queue`.
        hang_timeout: seconds after which a task that still runs makes its lane suspect, see `check_health`.
        **options: as for `map_batches_class`, but those about rows.

    Raises:
        JobUsageError, ModelLoadError: an option is of no use, or the model cannot be had.
        UnknownDeviceError, NoCudaDeviceError, NoDevicesError: a device cannot be used.
    """

    def __init__(
        self,
        model: Model,
        *,
        devices: Devices = None,
        batcher: Mapping[str, Any] | None = None,
        hang_timeout: float | None = None,
        **options: Any,
    ) -> None:
        plan = ModelPlan.of(model, options, frozenset({"batch_size", "max_batch_cost", "window", "workers"}))
        self._model = plan.open(devices, hang_timeout)
        how = _of_rows(self._model) if self._model.has_steps else {"split": _split}
        self._batcher = Batcher(self._model.engine, **{**how, **(batcher or {})})
        self._is_entered = False

    async def run_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Run a whole batch, split over the lanes.

        Args:
            *args: what the module is called with; over a folder the list of values, and nothing else.
            **kwargs: likewise.

        Returns:
            What the module returns, on the CPU; over a folder columns by name, with an entry for each value.

        Raises:
            RecordError: over a folder, with the value that was refused.
            BaseException: what the module raised, and as `asyncdp.DataParallel`.
        """
        if not self._model.has_steps:
            # Off the loop: large arrays are copied.
            args = await anyio.to_thread.run_sync(self._model.tensors, args)
            kwargs = await anyio.to_thread.run_sync(self._model.tensors, kwargs)
            return await self._model.engine(*args, **kwargs)
        values: Any = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
            raise JobUsageError(
                "A batch of this model is one list of values", 'Call it with ["a text", ...] alone.'
            )
        values = list(values)
        if not values:
            raise JobUsageError("The batch has no values", "Give at least one.")
        return (await run_rows(self._model, values, lambda place: f"value {place} of the batch")).columns

    async def run_sample(self, sample: Any, *, timeout: float | None = None, priority: int = 0) -> Any:
        """Run one sample as part of some batch, together with those of other callers.

        Args:
            sample: one row of what the module is called with; over a folder one value.
            timeout: seconds that it may take in all; the batcher's own if None.
            priority: higher goes first.

        Returns:
            Its row of the output; over a folder a dict with one entry for each column.

        Raises:
            BaseException: as `asyncdp.Batcher`.
        """
        if not self._is_entered:
            self._is_entered = True
            await self._batcher.__aenter__()
        if self._model.has_steps:
            (sample,) = await anyio.to_thread.run_sync(self._model.steps.preprocess, [sample])
        else:
            sample = self._model.tensors(sample)
        return await self._batcher(sample, timeout=timeout, priority=priority)

    async def statistics(self) -> ActorStatistics:
        """Return a snapshot of lanes, batches and durations."""
        return ActorStatistics(self._model.engine.statistics(), self._batcher.statistics())

    async def check_health(self) -> dict[str, str]:
        """Return the state of each lane; Ray Serve asks by this name.

        Raises:
            NoLaneWorksError: no lane is open, so that another process is needed.
        """
        lanes = self._model.engine.lanes
        if not any(lane.state is LaneState.OPEN for lane in lanes):
            raise NoLaneWorksError({lane.name: lane.state.value for lane in lanes})
        return {lane.name: lane.state.value for lane in lanes}

    async def aclose(self, timeout: float | None = None) -> None:
        """Answer what waits, take no more and end the lanes; again does nothing.

        An actor that is killed, or goes out of scope, needs none of this.

        Args:
            timeout: seconds for each of both, as `asyncdp.Batcher.aclose`; None waits for ever.
        """
        await self._batcher.aclose(timeout)
        await self._model.aclose(timeout)


def _split(output: Any, samples: Sequence[Any]) -> list[Any]:
    """Give each sample its row as a copy: a view takes the whole batch with it to another process."""
    return [map_leaves(_copied, row) for row in unbind(output, samples)]


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _of_rows(model: OpenModel) -> dict[str, Any]:
    """Return how a batcher makes batches of items, and rows of their outputs."""
    steps = model.steps

    def collate(items: Sequence[Any]) -> Any:
        # What is drawn for a sample does not depend on its neighbours: each is the first of its own.
        batch = (
            steps.collate(list(items), [0] * len(items)) if steps.takes_positions else steps.collate(items)
        )
        return dict(batch) if isinstance(batch, Mapping) else batch

    def split(output: Any, items: Sequence[Any]) -> list[Any]:
        if steps.finish is not None:
            output = steps.finish(output, items)
        columns = to_columns(steps.postprocess(output), len(items))
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    return {"collate": collate, "split": split, "size_of": steps.cost}
