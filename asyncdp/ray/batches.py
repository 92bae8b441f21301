"""A class for `ray.data.Dataset.map_batches` that runs a model with all of its worker's lanes."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas
import pyarrow
from ray.data.block import BlockAccessor

from .._devices import Devices
from ..errors import InputError, JobUsageError
from .model import OF_ROWS, Model, ModelPlan
from .rows import RowOutputs, run_rows

ERROR = "error"
"""The column of `on_error="record"`."""

_logger = logging.getLogger("asyncdp")


def map_batches_class(
    model: Model,
    *,
    columns: str | Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    devices: Devices = None,
    on_error: str = "stop",
    rename: Mapping[str, str] | None = None,
    **options: Any,
) -> type:
    """Make a class for `Dataset.map_batches`: columns in, the same columns and the model's outputs out.

    Each worker of Ray's that runs it loads the model once, when it starts, and opens an engine over the
    GPUs that Ray gave to it (`num_gpus=`), else over a CPU lane for each of its CPUs (`num_cpus=`). Several
    batches are in flight at a time. All batch formats will do.

    Args:
        model: `package.module:factory`, a `.pt2` file or a Hugging Face folder, by path or URL, as for
            `asyncdp infer`; or a module, or a function that makes one, which Ray sends to its workers.
        columns: what the model gets of a row: one column alone, of several a dict. None: the only column,
            or a dict of all.
        keep: columns of the input that stay; None for all of them.
        devices: one lane per entry, see `asyncdp.parse_devices`; None for what Ray gave.
        on_error: what becomes of a row that the model or a function refuses: "stop" raises an error that
            names it, "skip" leaves it out and logs that, "record" keeps it and puts the reason into the
            column `error`, which is empty for all others; its outputs are NaN, 0 or None.
        rename: new names of the model's outputs, by the old ones.
        **options: of `asyncdp infer`, by the same names: `batch_size`, `max_batch_cost`, `window`, `workers`;
            `preprocess`, `collate`, `postprocess` and `input_dtype`; of models that are named `weights`,
            `dtype`, `autocast`, `compile`, `task` and the task's own.

    Returns:
        A class whose objects are called with a batch. Outputs have the names that they would have in the
        files of `asyncdp infer`: `output` for a tensor, else the keys of what the model returns.

    Raises:
        JobUsageError: an option is unknown or of no use, or the model cannot be sent to workers.
    """
    chosen = None if columns is None else (columns,) if isinstance(columns, str) else tuple(columns)
    kept = None if keep is None else (keep,) if isinstance(keep, str) else tuple(keep)
    renamed = [f"{old}={new}" for old, new in (rename or {}).items()]
    policy = "record" if on_error == "skip" else on_error  # the reasons are logged
    plan = ModelPlan.of(model, {"on_error": policy, "rename": renamed, **options}, OF_ROWS)
    plan.check_can_be_sent()
    attributes = {"plan": plan, "devices": devices, "columns": chosen, "keep": kept, "on_error": on_error}
    return type("ModelBatches", (_ModelBatches,), attributes)


class _ModelBatches:
    """What `map_batches_class` makes; each object lives in a worker of Ray's and is called on its loop."""

    plan: ClassVar[ModelPlan]
    devices: ClassVar[Devices]
    columns: ClassVar[tuple[str, ...] | None]
    keep: ClassVar[tuple[str, ...] | None]
    on_error: ClassVar[str]

    def __init__(self) -> None:
        self._model = self.plan.open(self.devices)
        self._last: dict[
            str, Any
        ] = {}  # an empty array or list for each output, for batches without a good row

    async def __call__(self, batch: Any) -> Any:
        """Run the model over the rows of a batch.

        Raises:
            RecordError: a row was refused, with `on_error="stop"`.
            InputError: the batch lacks a column.
            JobError: the outputs are no rows of the batch, or have the names of columns that stay.
        """
        names = batch.column_names if isinstance(batch, pyarrow.Table) else list(batch)
        if not names or not len(batch[names[0]]):
            return batch
        values = self._values(batch, names)
        kept = names if self.keep is None else _found(self.keep, names, "keep")
        outputs = await run_rows(self._model, values, lambda place: _describe(batch, names, place))
        self._check_names(outputs, kept)
        rows, columns = self._rows(outputs, len(values))
        return _put_together(batch, kept, rows, columns)

    def _values(self, batch: Any, names: Sequence[str]) -> list[Any]:
        """Return what the model gets of each row."""
        chosen = names if self.columns is None else _found(self.columns, names, "columns")
        arrays = {name: _array(batch, name) for name in chosen}
        if len(chosen) == 1:
            return list(arrays[chosen[0]])
        return [dict(zip(chosen, row, strict=True)) for row in zip(*arrays.values(), strict=True)]

    def _check_names(self, outputs: RowOutputs, kept: Sequence[str]) -> None:
        own = [*outputs.columns, *([ERROR] if self.on_error == "record" else [])]
        for name in own:
            if name in kept or own.count(name) > 1:
                raise JobUsageError(
                    f"The output would have two columns {name!r}",
                    "Give the model's another name with rename=, or choose the others with keep=.",
                )

    def _rows(self, outputs: RowOutputs, num_rows: int) -> tuple[list[int] | None, dict[str, Any]]:
        """Return which rows stay, None for all, and the columns that they get."""
        columns: dict[str, Any] = dict(outputs.columns) or {
            name: each[:0] for name, each in self._last.items()
        }
        self._last = {name: values[:0] for name, values in columns.items()}
        if not outputs.errors:
            errors: list[str] = [""] * num_rows
            return None, {**columns, ERROR: errors} if self.on_error == "record" else columns
        if self.on_error == "skip":
            place, reason = next(iter(outputs.errors.items()))
            _logger.warning(
                "%d of %d rows are left out, row %d with %s", len(outputs.errors), num_rows, place, reason
            )
            return outputs.good, columns
        spread = {name: _spread(values, outputs.good, num_rows) for name, values in columns.items()}
        return None, {**spread, ERROR: [outputs.errors.get(place, "") for place in range(num_rows)]}


def _found(wanted: Sequence[str], names: Sequence[str], argument: str) -> Sequence[str]:
    for name in wanted:
        if name not in names:
            listed = ", ".join(map(repr, names))
            raise InputError(f"The rows have no column {name!r}", f"They have {listed}: see {argument}=.")
    return wanted


def _array(batch: Any, name: str) -> Any:
    """Return a column as an array of NumPy, whatever the format of the batch."""
    if isinstance(batch, Mapping):
        return batch[name]
    return BlockAccessor.for_block(batch).to_numpy(name)


def _describe(batch: Any, names: Sequence[str], place: int) -> str:
    row = {name: _array(batch, name)[place] for name in names}
    plain = {name: each.item() if isinstance(each, np.generic) else each for name, each in row.items()}
    return f"row {place} of its batch, {reprlib.repr(plain)}"


def _spread(values: Any, places: Sequence[int], num_rows: int) -> Any:
    """Return a column with gaps: NaN, 0 or None where a row has no output."""
    if isinstance(values, list):
        found = dict(zip(places, values, strict=True))
        return [found.get(place) for place in range(num_rows)]
    filled = np.full((num_rows, *values.shape[1:]), np.nan if values.dtype.kind in "fc" else 0, values.dtype)
    filled[places] = values
    return filled


def _put_together(batch: Any, kept: Sequence[str], rows: list[int] | None, columns: dict[str, Any]) -> Any:
    """Return a batch of the format of another one: some of its columns and rows, and further columns."""
    if isinstance(batch, Mapping):
        stay = {name: batch[name] for name in kept}
        if rows is not None:
            stay = {name: np.asarray(values)[rows] for name, values in stay.items()}
        return {**stay, **columns}
    stay = BlockAccessor.for_block(batch).select(list(kept))
    if rows is not None:
        stay = BlockAccessor.for_block(stay).take(rows)
    if isinstance(batch, pyarrow.Table):
        further = BlockAccessor.batch_to_arrow_block(columns)
        for name in further.column_names:
            stay = stay.append_column(further.schema.field(name), further[name])
        return stay
    further = BlockAccessor.batch_to_pandas_block(columns)
    return pandas.concat([stay.reset_index(drop=True), further], axis=1)
