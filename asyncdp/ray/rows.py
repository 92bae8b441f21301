"""Rows through a model: the pipeline of `asyncdp infer` over one batch that Ray hands in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RecordError
from ..infer.batching import cut_windows
from ..infer.blocks import BlockRows
from ..infer.pipeline import Pipeline
from ..infer.records import Columns, Failure, Records
from ..infer.report.monitor import Monitor
from .model import OpenModel


@dataclasses.dataclass(frozen=True)
class RowOutputs:
    """What became of the rows of a batch.

    Attributes:
        good: places of the rows that have an output, in order.
        columns: outputs of these rows by name.
        errors: why the others were refused, by place.
    """

    good: list[int]
    columns: Columns
    errors: dict[int, str]


async def run_rows(model: OpenModel, values: Sequence[Any], describe: Callable[[int], str]) -> RowOutputs:
    """Run a model over the values of some rows, on all its lanes.

    Args:
        model: an open model.
        values: what preprocessing gets, one for each row; at least one.
        describe: place of a row -> what to call it in an error.

    Raises:
        RecordError: a row was refused and the options say to stop.
        JobError: the outputs are no rows, or differ from batch to batch.
    """
    outputs: list[RowOutputs] = []

    def take(index: int, num_rows: int, rows: BlockRows, failures: list[Failure]) -> None:
        good, columns = rows.finish()
        outputs.append(RowOutputs(good, columns, {each.position: each.error for each in failures}))

    size = len(values)
    records = Records(range(size), range(size), values, [""] * size)
    windows = cut_windows(
        [records], block_size=size, window=min(model.options.window, size), wanted=lambda block: True
    )
    try:
        await Pipeline(model.engine, model.steps, model.options, take, Monitor()).run(windows)
    except RecordError as error:
        cause = error.__cause__ or error
        raise RecordError(error.position, describe(error.position), cause) from cause
    return outputs[0]
