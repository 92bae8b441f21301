"""Shards of SQLite: databases of one table, whose columns have no declared type and so change no value."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Sequence
from typing import IO, Any

import numpy as np

from ...errors import JobError
from ..records import Columns
from ..values import as_json, as_python, as_text, is_arrow, json_text

_TABLE = "records"


def write_sqlite(file: IO[bytes], ids: Sequence[Any], columns: Columns) -> None:
    """Write one row per record."""
    cells = [_cells(values) for values in columns.values()]
    file.write(_database(["id", *columns], zip(map(as_text, ids), *cells, strict=True)))


def widened_sqlite(data: bytes, names: Sequence[str]) -> bytes:
    """Return a shard with these columns beside the ids, in this order; those that it lacks are null."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(data)
        answer = connection.execute(f"SELECT * FROM {_TABLE} ORDER BY rowid")
        places = {name: place for place, (name, *_) in enumerate(answer.description)}
        wanted = [places.get(name) for name in ("id", *names)]
        rows = ([None if place is None else row[place] for place in wanted] for row in answer)
        return _database(["id", *names], rows)


def _database(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        quoted = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
        try:
            connection.execute(f"CREATE TABLE {_TABLE} ({quoted})")
        except sqlite3.Error as error:
            raise JobError(
                f"SQLite has no table of the columns {', '.join(map(repr, names[:20]))}: {error}",
                "Capitals do not tell its columns apart: use --rename, or change --output-format.",
            ) from error
        with connection:
            marks = ", ".join("?" * len(names))
            connection.executemany(f"INSERT INTO {_TABLE} VALUES ({marks})", rows)
        return connection.serialize()


def _cells(values: Any) -> list[Any]:
    is_plain = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "biuf"
    return values.tolist() if is_plain else [_cell(value) for value in values]


def _cell(value: Any) -> Any:
    """Return what SQLite holds of a value: bytes for an array of numbers, else text for what is no number."""
    if is_arrow(value):
        value = as_python(value)
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, np.ndarray | dict | list | tuple):
        return json_text(value)
    return as_json(value)
