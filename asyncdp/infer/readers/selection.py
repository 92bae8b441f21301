"""From what was read to records: which columns of a row are its value, its id, and what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..records import Record, Records
from ..where import Where


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which parts of an entry are wanted.

    Attributes:
        columns: names of the wanted columns; one gives its bare value, none the whole entry.
        id_column: name of the column that holds the id, else None.
        keep: names of the columns that are copied into the output.
        where: what rows must fulfil; those that do not need not be read.
    """

    columns: tuple[str, ...] = ()
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    where: Where | None = None

    @property
    def named(self) -> list[str]:
        """All columns that were asked for by name, each once."""
        tested = self.where.columns if self.where else ()
        return list(dict.fromkeys((*self.columns, *self.keep, *filter(None, [self.id_column]), *tested)))

    @property
    def needed(self) -> list[str] | None:
        """The columns that must be read, None for all."""
        return self.named if self.columns else None

    def records(self, entries: Sequence[Any], where: Sequence[str], first: int = 0) -> Records:
        """Pick values, ids and what is kept out of entries; what is missing becomes the error of its record.

        Args:
            entries: what was read of neighbouring rows, `Unreadable` where that failed.
            where: file and line or row of each.
            first: number of the first one.
        """
        numbers = range(first, first + len(entries))
        names = [*self.columns, *self.keep, *filter(None, [self.id_column])]
        try:
            _check_readable(entries)
            columns = {name: [entry[name] for entry in entries] for name in names}
            values = self._values(columns) if self.columns else entries
            kept = {name: columns[name] for name in self.keep}
            found = Records(numbers, numbers, values, where, self._ids(columns), {}, kept)
        except _NOT_ALIKE:
            found = Records.of(list(map(self._record, numbers, entries, where)), self.keep)
        return self._fulfilling(found, entries)

    def of_columns(
        self,
        columns: Mapping[str, Sequence[Any]],
        where: Sequence[str],
        first: int = 0,
        *,
        ids: Sequence[Any] | None = None,
        kept: Mapping[str, Sequence[Any]] | None = None,
    ) -> Records:
        """Do as `records`, of rows whose columns are known.

        Args:
            columns: all of them, or those that are needed; an entry may be `Unreadable`.
            where: as for `records`.
            first: as for `records`.
            ids: where they are no texts or integers of a column; None for a row that has none.
            kept: what is kept where it is not in the columns.
        """
        numbers = range(first, first + len(where))
        nothing = [None] * len(where)
        try:
            for column in columns.values():
                _check_readable(column)
            own = self._ids(columns) if ids is None else _all_there(ids)
            copies = {name: columns[name] for name in self.keep} if kept is None else kept
            found = Records(numbers, numbers, self._values(columns, len(where)), where, own, {}, copies)
        except _NOT_ALIKE:
            entries = [_readable(entry) for entry in _dicts(columns, len(where))]
            each = nothing if kept is None else _dicts(kept, len(where))
            singly = map(self._record, numbers, entries, where, ids or nothing, each)
            found = Records.of(list(singly), self.keep)
        asked = () if self.where is None else self.where.columns
        tested = {name: columns.get(name, nothing) for name in asked}
        return self._fulfilling(found, _dicts(tested, len(where)))

    def _values(self, columns: Mapping[str, Sequence[Any]], num_rows: int = 0) -> Sequence[Any]:
        if len(self.columns) == 1:
            return columns[self.columns[0]]
        return _dicts({name: columns[name] for name in self.columns or columns}, num_rows)

    def _ids(self, columns: Mapping[str, Sequence[Any]]) -> list[str] | None:
        if self.id_column is None:
            return None
        column = columns[self.id_column]
        if not set(map(type, column)) <= {str, int}:
            raise TypeError("an id is neither text nor an integer")
        ids = list(map(str, column))
        "".join(ids).encode()
        return ids

    def _record(
        self, number: int, entry: Any, where: str, identity: Any = None, kept: Mapping[str, Any] | None = None
    ) -> Record:
        """Return the record of one entry, as `records` does where all are well."""
        if isinstance(entry, Unreadable):
            return Record(number, None, None, where, entry.error)
        try:
            if kept is None:
                kept = {name: _pick(entry, name) for name in self.keep}
            identity = self._id(entry) if identity is None else identity
            return Record(number, identity, self._value(entry), where, kept=kept)
        except _Missing as missing:
            return Record(number, None, None, where, ValueError(str(missing)))

    def _fulfilling(self, found: Records, entries: Sequence[Any]) -> Records:
        """Leave out what does not fulfil the condition; a record that cannot be tested is a bad one."""
        if self.where is None:
            return found
        readable = [index for index in range(len(found)) if index not in found.errors]
        tested = [entries[index] if isinstance(entries[index], dict) else {} for index in readable]
        answers = dict(zip(readable, self.where.of_records(tested), strict=True))
        errors = {index: answer for index, answer in answers.items() if isinstance(answer, Exception)}
        stay = [index for index in range(len(found)) if answers.get(index) is not False]
        return found.with_errors(errors).pick(stay)

    def _value(self, entry: Any) -> Any:
        if not self.columns:
            return entry
        if len(self.columns) == 1:
            return _pick(entry, self.columns[0])
        return {name: _pick(entry, name) for name in self.columns}

    def _id(self, entry: Any) -> str | None:
        if self.id_column is None:
            return None
        value = _pick(entry, self.id_column)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise _Missing(f"the id must be text or an integer, but is {value!r:.80}")
        return checked_text(str(value))


class Unreadable(NamedTuple):
    """In the place of what Python cannot hold or no reader can read, such as text that is no UTF-8."""

    error: Exception


class _Missing(Exception):
    pass


_NOT_ALIKE = (KeyError, TypeError, UnicodeEncodeError)
"""What picking from all entries at once raises where one of them is missing something."""


def _check_readable(entries: Sequence[Any]) -> None:
    if not isinstance(entries, np.ndarray) and Unreadable in set(map(type, entries)):
        raise TypeError("an entry cannot be read")


def _readable(entry: dict[str, Any]) -> Any:
    for name, value in entry.items():
        if isinstance(value, Unreadable):
            why = f"{type(value.error).__name__}: {value.error}"
            return Unreadable(ValueError(f"column {name!r} cannot be read: {why}"))
    return entry


def _all_there(ids: Sequence[Any]) -> Sequence[Any]:
    if any(identity is None for identity in ids):
        raise TypeError("a row has no id")
    return ids


def _dicts(columns: Mapping[str, Sequence[Any]], num_rows: int) -> list[dict[str, Any]]:
    """Return the rows of columns."""
    if not columns:
        return [{} for _ in range(num_rows)]
    names = list(columns)
    return [dict(zip(names, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]


def checked_text(text: str) -> str:
    """Return `text` when it can be written as UTF-8, which lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Missing(f"{text!r:.80} is not valid Unicode text") from None
    return text


def _pick(entry: Any, name: str) -> Any:
    if not isinstance(entry, dict):
        raise _Missing(f"column {name!r} was asked for, but the entry is no object: {entry!r:.80}")
    if name not in entry:
        raise _Missing(f"there is no column {name!r}, only {', '.join(map(repr, list(entry)[:20]))}")
    return entry[name]
