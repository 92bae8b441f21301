"""Parquet, row group by row group, so that a file may be larger than memory."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...errors import InputError
from ..places import is_remote, open_place
from ..records import Row
from ..values import as_python, holds_nanoseconds, is_id
from .base import Contents, InputFile, Selection

_CHUNK = 1024
_TAIL = 8  # the footer's length and the mark of the format


class ParquetReader:
    """Reads the wanted columns; a list column of numbers arrives as arrays."""

    binary = True

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return the number of rows that the footer states, and the columns of the schema."""
        with _open(file) as parquet:
            _check_counts(file, parquet.metadata)
            names = parquet.schema_arrow.names
            if len(set(names)) != len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise InputError(f"{file.name} has two columns {twice!r}", "Rename one: records go by names.")
            return Contents(parquet.metadata.num_rows, parquet.schema_arrow.names)

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Row]:
        """Yield a dict per row, or the bare value of a single column; other row groups are not read."""
        with _open(file) as parquet:
            stop = parquet.metadata.num_rows if stop is None else stop
            groups, number = _groups_between(parquet, start, stop)
            batches = parquet.iter_batches(_CHUNK, row_groups=groups, columns=selection.needed)
            while number < stop and (batch := _next_batch(file, batches)) is not None:
                skipped = max(0, start - number)
                wanted = batch.slice(skipped, stop - number - skipped)
                yield from _rows_of(wanted, selection, file.name, number + skipped)
                number += batch.num_rows


def _rows_of(batch: Any, selection: Selection, name: str, number: int) -> Iterator[Row]:
    """Yield the rows of a batch; columns that are only copied never become Python's."""
    wanted = [*selection.columns, selection.id_column] if selection.columns else batch.schema.names
    python = {column: _values(batch.column(column)) for column in wanted if column is not None}
    arrow = {column: list(batch.column(column)) for column in selection.keep}
    identity = selection.id_column
    ids = list(batch.column(identity)) if identity and is_id(batch.schema.field(identity).type) else None
    if python and ids is None and not arrow and not any(map(_has_unreadable, python.values())):
        pick, names = selection.picker(), list(python)
        for index, values in enumerate(zip(*python.values(), strict=True), number):
            yield pick(dict(zip(names, values, strict=True)), f"{name} row {index}")
        return
    for index in range(batch.num_rows):
        entry = {column: values[index] for column, values in python.items()}
        kept = {column: values[index] for column, values in arrow.items()}
        own = ids[index] if ids is not None and ids[index].is_valid else None
        yield _row(selection, entry, f"{name} row {number + index}", own, kept)


@contextlib.contextmanager
def _open(file: InputFile) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        try:
            footer = pyarrow.parquet.read_metadata(pyarrow.BufferReader(_footer(file)))
            source: Any = file.path
            if is_remote(file.path):
                source = stack.enter_context(open_place(file.path, in_order=False))
            # Without pre-buffering only the pages being read are in memory.
            opened = pyarrow.parquet.ParquetFile(source, metadata=footer, pre_buffer=False)
            parquet = stack.enter_context(opened)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise file.broken(error) from error
        yield parquet


def _footer(file: InputFile) -> bytes:
    """Read the footer alone; Arrow would read 64 KiB with it, which of a small file is all."""
    with open_place(file.path, in_order=False) as stream:
        stream.seek(-min(_TAIL, file.num_bytes), os.SEEK_END)
        size = _TAIL + int.from_bytes(stream.read(_TAIL)[:4], "little")
        stream.seek(-min(size, file.num_bytes), os.SEEK_END)
        return stream.read()


def _check_counts(file: InputFile, metadata: Any) -> None:
    """Fail when the numbers of rows in a footer contradict each other: Arrow goes by one of them.

    Raises:
        DamagedInputError: with both numbers.
    """
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    total = sum(group.num_rows for group in groups)
    if total != metadata.num_rows:
        raise file.broken(f"its footer states {metadata.num_rows} rows, its row groups {total}")
    flat = [metadata.schema.column(index).max_repetition_level == 0 for index in range(metadata.num_columns)]
    for number, group in enumerate(groups):
        for index, is_flat in enumerate(flat):
            found = group.column(index).num_values
            if found != group.num_rows if is_flat else found < group.num_rows:
                name = metadata.schema.column(index).path
                raise file.broken(
                    f"row group {number} states {group.num_rows} rows, but {found} values of column {name!r}"
                )


def _groups_between(parquet: Any, start: int, stop: int) -> tuple[list[int], int]:
    """Return the row groups with rows from `start` to `stop`, and the number of their first row."""
    counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    ends = list(itertools.accumulate(counts))
    groups = [group for group, end in enumerate(ends) if end > start and end - counts[group] < stop]
    return groups, ends[groups[0]] - counts[groups[0]] if groups else stop


def _next_batch(file: InputFile, batches: Iterator[Any]) -> Any:
    import pyarrow

    try:
        return next(batches, None)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise file.broken(error) from error


class _Unreadable(NamedTuple):
    """In the place of a value that Python cannot hold, such as text that is no UTF-8."""

    error: Exception


def _has_unreadable(values: Any) -> bool:
    return isinstance(values, list) and _Unreadable in set(map(type, values))


def _row(selection: Selection, entry: dict[str, Any], where: str, identity: Any, kept: Any) -> Row:
    for name, value in entry.items():
        if isinstance(value, _Unreadable):
            why = f"{type(value.error).__name__}: {value.error}"
            return Row(None, None, where, ValueError(f"column {name!r} cannot be read: {why}"))
    return selection.row(entry, where, identity, kept)


def _values(column: Any) -> Any:
    import pyarrow

    kind = column.type
    if not pyarrow.types.is_fixed_size_list(kind) or column.null_count:
        return _as_python(column)
    numbers = column.flatten()
    if numbers.null_count or not pyarrow.types.is_primitive(numbers.type):
        return _as_python(column)
    return numbers.to_numpy(zero_copy_only=False).reshape(len(column), kind.list_size)


def _as_python(column: Any) -> list[Any]:
    if holds_nanoseconds(column.type):
        return [_value(scalar) for scalar in column]
    try:
        values: list[Any] = column.to_pylist()
        return values
    except Exception:  # of any type: dates out of range, unknown time zones, text that is no UTF-8
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return as_python(scalar)
    except Exception as error:
        return _Unreadable(error)
