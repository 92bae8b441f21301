"""What the stages of the pipeline hand to each other: batches, and blocks that fill up."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import JobError
from .records import Columns, Failure, Record, Rows

_GROWTH = 1024


@dataclasses.dataclass(frozen=True)
class Batch:
    """Records of one window that go to the model together, with their items and lengths."""

    block: int
    records: list[Record]
    items: list[Any]
    costs: list[int]

    @classmethod
    def of(
        cls, block: int, records: list[Record], items: list[Any], costs: list[int], indices: list[int]
    ) -> Batch:
        """Picks the records of a batch out of those of a window."""
        return cls(
            block, [records[i] for i in indices], [items[i] for i in indices], [costs[i] for i in indices]
        )

    def part(self, indices: slice) -> Batch:
        """Returns some of the records as a batch of their own."""
        return Batch(self.block, self.records[indices], self.items[indices], self.costs[indices])


@dataclasses.dataclass
class OpenBlock:
    """A block that is not written yet.

    Attributes:
        complete: Whether all of its records are in, so that it waits for the writer.
    """

    index: int
    rows: BlockRows
    size: int | None = None
    num_done: int = 0
    failures: list[Failure] = dataclasses.field(default_factory=list)
    complete: bool = False


class BlockRows:
    """Outputs of one block; each row goes to its place as it arrives, so that none is ever held twice.

    Args:
        first: Position of the block's first record; None puts rows down in the order they arrive.
    """

    def __init__(self, first: int | None = None) -> None:
        self.schema: dict[str, str] = {}
        self._first = first
        self._num_rows = 0
        self._ids: list[str | int | None] = []
        self._columns: Columns = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._num_rows

    def add(self, rows: Rows) -> None:
        """Takes the outputs of one batch; any thread may call it.

        Raises:
            JobError: When they have other names, types or shapes than those before.
        """
        with self._lock:
            self._check_schema(rows)
            places = self._places(rows.positions)
            self._grow(max(places) + 1)
            for column, values in [(self._ids, rows.ids), *self._paired(rows.columns)]:
                _place(column, places, values)
            self._num_rows += len(places)

    def finish(self) -> tuple[list[Any], Columns]:
        """Returns ids and columns without the places of records that were refused."""
        kept = [place for place, identity in enumerate(self._ids) if identity is not None]
        if kept and kept[-1] == len(kept) - 1:
            return self._ids[: len(kept)], {
                name: values[: len(kept)] for name, values in self._columns.items()
            }
        return _picked(self._ids, kept), {
            name: _picked(values, kept) for name, values in self._columns.items()
        }

    def _places(self, positions: list[int]) -> list[int]:
        if self._first is None:
            return list(range(self._num_rows, self._num_rows + len(positions)))
        return [position - self._first for position in positions]

    def _check_schema(self, rows: Rows) -> None:
        schema = schema_of(rows.columns)
        if not self.schema:
            self.schema = schema
            self._columns = {name: _empty(values) for name, values in rows.columns.items()}
        check_same_schema(self.schema, schema, f"the batch with record {min(rows.positions)}")

    def _paired(self, columns: Columns) -> list[tuple[Any, Any]]:
        return [(self._columns[name], values) for name, values in columns.items()]

    def _grow(self, size: int) -> None:
        if size <= len(self._ids):
            return
        size = -(-size // _GROWTH) * _GROWTH
        for values in (self._ids, *self._columns.values()):
            if isinstance(values, list):
                values.extend([None] * (size - len(values)))
            else:
                # In place, which for large arrays moves no bytes; nobody else has seen the array yet.
                values.resize((size, *values.shape[1:]), refcheck=False)


def schema_of(columns: Columns) -> dict[str, str]:
    """Returns type and shape of the entries of each column."""
    return {
        name: f"{values.dtype}{list(values.shape[1:])}" if isinstance(values, np.ndarray) else "objects"
        for name, values in columns.items()
    }


def check_same_schema(before: dict[str, str], now: dict[str, str], where: str) -> None:
    """Fails when the outputs of two batches do not go into one table.

    Args:
        before: Type and shape of each column, as `schema_of` gives them.
        now: Those of outputs that came later.
        where: What they are the outputs of, for a person to find the records.

    Raises:
        JobError: With both schemas.
    """
    if before != now:
        raise JobError(
            f"The model's outputs differ between batches: {before}, then {now} in {where}",
            "Bring every record to one shape and type with --preprocess or --postprocess.",
        )


def _empty(values: Any) -> Any:
    return np.empty((0, *values.shape[1:]), values.dtype) if isinstance(values, np.ndarray) else []


def _place(column: Any, places: Sequence[int], values: Any) -> None:
    if isinstance(column, list):
        for place, value in zip(places, values, strict=True):
            column[place] = value
    else:
        column[places] = values


def _picked(column: Any, kept: list[int]) -> Any:
    return [column[place] for place in kept] if isinstance(column, list) else column[kept]
