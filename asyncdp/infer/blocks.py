"""What the stages of the pipeline hand to each other: batches, and blocks that fill up."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import JobError
from .records import Columns, Failure, Records, picked

OBJECTS = "objects"
"""In a schema: values of any kind, whose type the output format finds."""

_GROWTH = 1024


@dataclasses.dataclass(frozen=True)
class Batch:
    """Records of one window that go to the model together, with their items and lengths."""

    block: int
    records: Records
    items: Sequence[Any]
    costs: Sequence[int]

    def pick(self, indices: Sequence[int]) -> Batch:
        """Return some of the records as a batch of their own."""
        items, costs = picked(self.items, indices), picked(self.costs, indices)
        return Batch(self.block, self.records.pick(indices), items, costs)


class BlockRows:
    """Outputs of one block; each row goes to its place as it arrives, so that no row is stored twice.

    Args:
        first: position of the block's first record; None stores rows in the order they arrive.
    """

    def __init__(self, first: int | None = None) -> None:
        self.schema: dict[str, str] = {}
        self._first = first
        self._num_rows = 0
        self._end = 0  # of the places that are taken, refused ones between them
        self._columns: Columns = {"id": []}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._num_rows

    def add(self, records: Records, columns: Columns) -> None:
        """Take the outputs of one batch; any thread may call it.

        Args:
            records: the records of the batch.
            columns: one entry per record each.

        Raises:
            JobError: the columns have other names, types or shapes than those before.
        """
        with self._lock:
            self._check_schema(columns, f"the batch with record {min(records.positions)}")
            places = self._places(records.positions)
            self._end = max(self._end, max(places) + 1)
            self._grow(self._end)
            ids = records.positions if records.ids is None else records.ids
            for name, values in {"id": ids, **columns}.items():
                _put(self._columns[name], places, values)
            self._num_rows += len(places)

    def finish(self) -> tuple[list[Any], Columns]:
        """Return ids and columns without the places of records that were refused."""
        places: Sequence[int] = range(self._end)  # of views, where indices would copy
        if self._num_rows < self._end:
            places = [place for place, identity in enumerate(self._columns["id"]) if identity is not None]
        rows = {name: _pick(values, places) for name, values in self._columns.items()}
        return rows["id"], {name: rows[name] for name in self.schema}

    def _places(self, positions: Sequence[int]) -> Sequence[int]:
        first = self._first
        if first is None:
            return range(self._num_rows, self._num_rows + len(positions))
        if isinstance(positions, range):
            return range(positions.start - first, positions.stop - first)
        return [position - first for position in positions]

    def _check_schema(self, columns: Columns, where: str) -> None:
        schema = schema_of(columns)
        check_same_schema(self.schema or schema, schema, where)
        for name in [name for name in schema if name not in self.schema]:
            values = columns[name]
            # Records before a column of a dict's entries have none there.
            missing: list[Any] = [None] * len(self._columns["id"])
            self._columns[name] = values[:0].copy() if isinstance(values, np.ndarray) else missing
        self.schema = merged(self.schema, schema)

    def _grow(self, size: int) -> None:
        if size <= len(self._columns["id"]):
            return
        size = -(-size // _GROWTH) * _GROWTH
        for values in self._columns.values():
            if isinstance(values, list):
                values.extend([None] * (size - len(values)))
            else:
                # In place, which for large arrays moves no bytes; no other code refers to the array yet.
                values.resize((size, *values.shape[1:]), refcheck=False)


@dataclasses.dataclass
class OpenBlock:
    """A block that is not written yet.

    Attributes:
        complete: whether all of its records are in, so that it waits for the writer.
    """

    index: int
    rows: BlockRows
    size: int | None = None
    num_done: int = 0
    failures: list[Failure] = dataclasses.field(default_factory=list)
    complete: bool = False


def schema_of(columns: Columns) -> dict[str, str]:
    """Return type and shape of the entries of each column."""
    return {
        name: f"{values.dtype}{list(values.shape[1:])}" if isinstance(values, np.ndarray) else OBJECTS
        for name, values in columns.items()
    }


def check_same_schema(before: dict[str, str], now: dict[str, str], where: str) -> None:
    """Fail when the outputs of two batches do not go into one table.

    Columns of objects, such as texts and the entries of dicts, may be missing, and may be of several types.

    Args:
        before: type and shape of each column, as `schema_of` gives them.
        now: those of outputs that came later.
        where: what they are the outputs of, for a person to find the records.

    Raises:
        JobError: with both schemas.
    """
    if fixed_columns(before) != fixed_columns(now):
        raise JobError(
            f"The model's outputs differ between batches: {before}, then {now} in {where}",
            "Bring every record to one shape and type with --preprocess or --postprocess.",
        )


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of both, in an order that does not depend on which of them came first."""
    both = {**before, **now}
    return both if not before or list(before) == list(now) else dict(sorted(both.items()))


def fixed_columns(schema: dict[str, str]) -> dict[str, str]:
    """Return the columns that are arrays, whose type and shape never change."""
    return {name: kind for name, kind in schema.items() if not kind.startswith(OBJECTS)}


def _put(column: Any, places: Sequence[int], values: Any) -> None:
    if isinstance(places, range):
        column[places.start : places.stop] = values
    elif isinstance(column, list):
        for place, value in zip(places, values, strict=True):
            column[place] = value
    else:
        column[places] = values


def _pick(column: Any, places: Sequence[int]) -> Any:
    by_index = isinstance(column, np.ndarray) and isinstance(places, list)
    return column[places] if by_index else picked(column, places)
