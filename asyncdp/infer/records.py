"""What travels from the readers to the writers: records, many at a time."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .values import as_text

Columns = dict[str, "np.ndarray[Any, Any] | list[Any]"]
"""Named outputs; every value has one entry per record along its first dimension."""

_S = TypeVar("_S", bound="Sequence[Any] | None")


class Record(NamedTuple):
    """One row of the input.

    Attributes:
        position: row index over all inputs, from 0.
        id: the entry of the id column, as text or a scalar of Arrow, or the position.
        value: what preprocessing gets.
        where: file and line or row, for a person to find it.
        error: why the reader could not read it, else None.
        kept: entries for the output, by column of the input; from Arrow they are its scalars.
    """

    position: int
    id: Any
    value: Any
    where: str
    error: Exception | None = None
    kept: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Records:
    """Records in order of position, column by column, so that none costs anything by itself.

    Attributes:
        span: the positions that they were looked for in; the job is not about those that have no record.
        positions, values, where: as those of a `Record`, of all.
        ids: None stands for the positions, as it does for that of a record that could not be read.
        errors: why some could not be read, by index.
        kept: entries of all, by column.
    """

    span: range
    positions: Sequence[int]
    values: Sequence[Any]
    where: Sequence[str]
    ids: Sequence[Any] | None = None
    errors: Mapping[int, Exception] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[Record], keep: Sequence[str] = ()) -> Records:
        """Put single records together; `keep` are the columns that at least one of them has."""
        positions = [record.position for record in records]
        ids = [record.id for record in records]
        return cls(
            range(positions[0], positions[-1] + 1) if positions else range(0),
            positions,
            [record.value for record in records],
            [record.where for record in records],
            ids if any(identity is not None for identity in ids) else None,
            {index: record.error for index, record in enumerate(records) if record.error is not None},
            {name: [record.kept.get(name) for record in records] for name in keep},
        )

    @classmethod
    def nothing(cls, span: range) -> Records:
        """Return that none of some positions has a record."""
        return cls(span, (), (), ())

    @classmethod
    def joined(cls, parts: Sequence[Records]) -> Records:
        """Return the records of neighbouring spans, of which there is at least one."""
        span = range(parts[0].span.start, parts[-1].span.stop)
        parts = [part for part in parts if len(part)] or parts[:1]
        if len(parts) == 1:
            return dataclasses.replace(parts[0], span=span)
        chain = itertools.chain.from_iterable
        starts = list(itertools.accumulate(map(len, parts), initial=0))
        has_ids = any(part.ids is not None for part in parts)
        return cls(
            span,
            _chained([part.positions for part in parts]),
            list(chain(part.values for part in parts)),
            list(chain(part.where for part in parts)),
            list(chain(part.ids or [None] * len(part) for part in parts)) if has_ids else None,
            {starts[n] + index: part.errors[index] for n, part in enumerate(parts) for index in part.errors},
            {name: list(chain(part.kept[name] for part in parts)) for name in parts[0].kept},
        )

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Record:
        position = self.positions[index]
        identity = None if self.ids is None else self.ids[index]
        return Record(
            position,
            position if identity is None else identity,
            self.values[index],
            self.where[index],
            self.errors.get(index),
            {name: entries[index] for name, entries in self.kept.items()},
        )

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(len(self)))

    def pick(self, indices: Sequence[int], span: range | None = None) -> Records:
        """Return the records at some indices, in that order.

        Args:
            indices: quick where they are a range.
            span: the positions that they are looked for in, None for the same.
        """
        if self.errors:
            errors = {new: self.errors[old] for new, old in enumerate(indices) if old in self.errors}
        else:
            errors = {}
        return Records(
            self.span if span is None else span,
            picked(self.positions, indices),
            picked(self.values, indices),
            picked(self.where, indices),
            picked(self.ids, indices),
            errors,
            {name: picked(entries, indices) for name, entries in self.kept.items()},
        )

    def between(self, start: int, stop: int | None) -> Records:
        """Return the records of the positions from `start` to `stop`, None for no end."""
        begin = max(start, self.span.start)
        end = self.span.stop if stop is None else min(stop, self.span.stop)
        if begin == self.span.start and end == self.span.stop:
            return self
        first, last = (bisect.bisect_left(self.positions, position) for position in (begin, end))
        return self.pick(range(first, last), range(begin, end))

    def moved(self, by: int) -> Records:
        """Return the records that many positions further on."""
        if not by:
            return self
        span, positions = range(self.span.start + by, self.span.stop + by), self.positions
        if isinstance(positions, range):
            positions = range(positions.start + by, positions.stop + by)
        else:
            positions = [position + by for position in positions]
        return dataclasses.replace(self, span=span, positions=positions)

    def with_errors(self, errors: Mapping[int, Exception]) -> Records:
        """Return the records, some of them, by index, as ones that could not be read."""
        return dataclasses.replace(self, errors={**self.errors, **errors}) if errors else self


def picked(column: _S, indices: Sequence[int]) -> _S:
    """Return the entries of a column at some indices, by a slice where that is the same."""
    if column is None:
        return column
    if isinstance(indices, range) and indices.step == 1:
        is_all = indices.start == 0 and indices.stop == len(column)
        return column if is_all else column[indices.start : indices.stop]  # type: ignore[return-value]
    return list(map(column.__getitem__, indices))  # type: ignore[return-value]


def in_blocks(records: Iterable[Records], size: int) -> Iterator[tuple[int, Records]]:
    """Yield neighbouring records with the numbers of their blocks, cut where one block of positions ends."""
    for some in records:
        for block in range(some.span.start // size, -(-some.span.stop // size)):
            yield block, some.between(block * size, (block + 1) * size)


def _chained(parts: Sequence[Sequence[int]]) -> Sequence[int]:
    whole = range(parts[0][0], parts[-1][-1] + 1)
    return whole if len(whole) == sum(map(len, parts)) else list(itertools.chain.from_iterable(parts))


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A record that was refused, as text: a traceback would keep its batch in memory."""

    position: int
    id: str | int
    where: str
    error: str
    traceback: str

    @classmethod
    def of(cls, record: Record, error: BaseException) -> Failure:
        """Describe why a record was refused."""
        text = "".join(traceback.format_exception(error))
        return cls(
            record.position, as_text(record.id), record.where, f"{type(error).__name__}: {error}", text
        )
