"""Rows of Arrow's record batches, whatever file they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ...errors import InputError
from ..records import Records
from ..values import as_python, holds_nanoseconds, is_id
from .base import InputFile
from .selection import Selection, Unreadable


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


def selected_rows(batch: Any, selection: Selection, name: str, number: int) -> Records:
    """Return the rows of a batch that fulfil the condition.

    Args:
        batch: of Arrow, with the columns that are needed.
        selection: which columns are wanted, and which rows.
        name: of the file.
        number: that of the batch's first row in the file.
    """
    import pyarrow

    numbers = range(number, number + batch.num_rows)
    if selection.where is None:
        return _rows_of(batch, selection, name, numbers)
    answers = selection.where.of_table(pyarrow.Table.from_batches([batch]))
    picked = [index for index, answer in enumerate(answers) if answer is not False]
    positions = [numbers[index] for index in picked]
    rows = _rows_of(batch.take(pyarrow.array(picked, "int64")), selection, name, positions)
    found = [answers[index] for index in picked]
    errors = {index: answer for index, answer in enumerate(found) if isinstance(answer, Exception)}
    return dataclasses.replace(rows.with_errors(errors), span=numbers, positions=positions)


def _rows_of(batch: Any, selection: Selection, name: str, numbers: Sequence[int]) -> Records:
    """Return the rows of a batch; columns that are only copied never become Python's."""
    wanted = [*selection.columns, selection.id_column] if selection.columns else batch.schema.names
    python = {column: _values(batch.column(column)) for column in wanted if column is not None}
    arrow = {column: list(batch.column(column)) for column in selection.keep}
    ids = None
    if selection.id_column and is_id(batch.schema.field(selection.id_column).type):
        ids = [identity if identity.is_valid else None for identity in batch.column(selection.id_column)]
    where = [f"{name} row {number}" for number in numbers]
    unconditional = dataclasses.replace(selection, where=None)
    return unconditional.of_columns(python, where, numbers[0] if numbers else 0, ids=ids, kept=arrow)


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
        return Unreadable(error)
