"""Rows of Arrow's record batches, whatever file they come from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ...errors import InputError
from ..records import Row
from ..values import as_python, holds_nanoseconds, is_id
from .base import InputFile, Selection


def check_schema(file: InputFile, schema: Any, selection: Selection) -> None:
    """Fail where columns share a name, one has a type that Python lacks, or the condition does not fit.

    Raises:
        InputError: with what is wrong.
    """
    names = schema.names
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{file.name} has two columns {twice!r}", "Rename one: records go by names.")
    for field in schema:
        if (selection.needed is None or field.name in selection.needed) and not _exists_in_python(field.type):
            raise InputError(
                f"{file.name}: column {field.name!r} is of type {field.type}, which Python cannot get",
                "Choose others with --column, or convert it.",
            )
    if selection.where is not None:
        selection.where.check_fit(schema, file.name)


def _exists_in_python(kind: Any) -> bool:
    import pyarrow

    try:
        pyarrow.nulls(0, kind)
    except KeyError:  # intervals of months, or of days and milliseconds
        return False
    return all(_exists_in_python(kind.field(index).type) for index in range(kind.num_fields))


def selected_rows(batch: Any, selection: Selection, name: str, number: int) -> Iterator[Row | None]:
    """Yield the rows of a batch that fulfil the condition, and None in the place of others.

    Args:
        batch: of Arrow, with the columns that are needed.
        selection: which columns are wanted, and which rows.
        name: of the file.
        number: that of the batch's first row in the file.
    """
    import pyarrow

    if selection.where is None:
        yield from _rows_of(batch, selection, name, range(number, number + batch.num_rows))
        return
    answers = selection.where.of_table(pyarrow.Table.from_batches([batch]))
    picked = [index for index, answer in enumerate(answers) if answer is not False]
    rows = _rows_of(batch.take(pyarrow.array(picked, "int64")), selection, name, [number + i for i in picked])
    last = -1
    for index, row in zip(picked, rows, strict=True):
        yield from itertools.repeat(None, index - last - 1)
        answer = answers[index]
        yield row._replace(value=None, error=answer) if isinstance(answer, Exception) else row
        last = index
    yield from itertools.repeat(None, batch.num_rows - last - 1)


def _rows_of(batch: Any, selection: Selection, name: str, numbers: Sequence[int]) -> Iterator[Row]:
    """Yield the rows of a batch; columns that are only copied never become Python's."""
    wanted = [*selection.columns, selection.id_column] if selection.columns else batch.schema.names
    selection = dataclasses.replace(selection, where=None)
    python = {column: _values(batch.column(column)) for column in wanted if column is not None}
    arrow = {column: list(batch.column(column)) for column in selection.keep}
    identity = selection.id_column
    ids = list(batch.column(identity)) if identity and is_id(batch.schema.field(identity).type) else None
    if python and ids is None and not arrow and not any(map(_has_unreadable, python.values())):
        pick, names = selection.picker(), list(python)
        for row_number, values in zip(numbers, zip(*python.values(), strict=True), strict=True):
            yield pick(dict(zip(names, values, strict=True)), f"{name} row {row_number}")
        return
    for index in range(batch.num_rows):
        entry = {column: values[index] for column, values in python.items()}
        kept = {column: values[index] for column, values in arrow.items()}
        own = ids[index] if ids is not None and ids[index].is_valid else None
        yield _row(selection, entry, f"{name} row {numbers[index]}", own, kept)


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
