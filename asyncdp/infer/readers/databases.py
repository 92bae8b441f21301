"""Rows of a query: of SQLite by Python's own library, of DuckDB over its files and all that it reads."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError, MissingExtraError
from ..places import on_disk
from ..records import Records
from .base import Contents, InputFile
from .columnar import check_schema, selected_rows
from .selection import Selection, Unreadable

_CHUNK = 1024


class SqliteReader:
    """Every row of a query, or of the only table, is a record, in the order in which SQLite gives them."""

    binary = True

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return the columns."""
        with _sqlite(file) as connection:
            cursor = _executed(file, connection)
            names = [column[0] for column in cursor.description or ()]
            _check_names(file, names)
            return Contents(None, names)

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Records]:
        """Yield a dict per row; a text that is no UTF-8 makes a bad record."""
        with _sqlite(file) as connection:
            cursor = _executed(file, connection)
            names = [column[0] for column in cursor.description]
            number = 0
            while some := _fetched(file, cursor):
                where = [f"{file.name} row {number + index}" for index in range(len(some))]
                columns = dict(zip(names, zip(*some, strict=True), strict=True))
                yield selection.of_columns(columns, where, number)
                number += len(some)


class DuckDBReader:
    """Every row of a query is a record; in the query the file is `input`, or its tables go by their names."""

    binary = True

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return the columns."""
        with _duckdb(file) as connection:
            schema = _answer(file, connection).schema
            check_schema(file, schema, selection)
            return Contents(None, schema.names)

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Records]:
        """Yield a dict per row, or the bare value of a single column."""
        number = 0
        with _duckdb(file) as connection:
            answer = _answer(file, connection)
            while True:
                try:
                    batch = answer.read_next_batch()
                except StopIteration:
                    return
                except Exception as error:  # of DuckDB's own classes, or Arrow's around them
                    raise file.broken(error) from error
                yield selected_rows(batch, selection, file.name, number)
                number += batch.num_rows


def _text(data: bytes) -> Any:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return Unreadable(error)


@contextlib.contextmanager
def _sqlite(file: InputFile) -> Iterator[sqlite3.Connection]:
    with on_disk(file.path) as path:
        try:
            # Read by one thread after another.
            uri = f"{path.absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        except sqlite3.Error as error:
            raise file.broken(error) from error
        connection.text_factory = _text
        with contextlib.closing(connection):
            yield connection


def _executed(file: InputFile, connection: sqlite3.Connection) -> sqlite3.Cursor:
    try:
        tables = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'"
        names = [name for (name,) in connection.execute(tables)]
    except sqlite3.Error as error:
        raise file.broken(error) from error
    query = file.dialect.query or _of_only_table(file, names)
    try:
        return connection.execute(query)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError | sqlite3.ProgrammingError):
            raise _bad_query(file, query, error) from error
        raise file.broken(error) from error


def _fetched(file: InputFile, cursor: sqlite3.Cursor) -> list[Any]:
    try:
        return cursor.fetchmany(_CHUNK)
    except sqlite3.Error as error:
        raise file.broken(error) from error


@contextlib.contextmanager
def _duckdb(file: InputFile) -> Iterator[Any]:
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise MissingExtraError("--input-format duckdb", "duckdb", "duckdb") from error
    with on_disk(file.path) as path, contextlib.ExitStack() as stack:
        try:
            connection = stack.enter_context(_connected(duckdb, path))
        except duckdb.Error as error:
            raise file.broken(error) from error
        yield connection


def _connected(duckdb: Any, path: Path) -> Any:
    with open(path, "rb") as stream:
        is_database = stream.read(12)[8:] == b"DUCK"
    if is_database:
        return duckdb.connect(str(path), read_only=True)
    connection = duckdb.connect()
    name = str(path).replace("'", "''")
    connection.execute(f"CREATE VIEW input AS SELECT * FROM '{name}'")
    return connection


def _answer(file: InputFile, connection: Any) -> Any:
    import duckdb

    query = file.dialect.query
    if query is None:
        tables = [name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()]
        views = connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
        query = _of_only_table(file, [*tables, *(name for (name,) in views)])
    try:
        answer = connection.sql(query)
        if answer is None:
            raise duckdb.Error("it gives no rows")
        return answer.to_arrow_reader(_CHUNK)
    except duckdb.Error as error:
        raise _bad_query(file, query, error) from error


def _of_only_table(file: InputFile, names: list[str]) -> str:
    if len(names) != 1:
        listed = ", ".join(map(repr, names[:20])) or "none"
        raise InputError(
            f"{file.name} holds {len(names)} tables, not one", f"Give a --query over them: {listed}."
        )
    quoted = names[0].replace('"', '""')
    return f'SELECT * FROM "{quoted}"'


def _bad_query(file: InputFile, query: str, error: Exception) -> InputError:
    return InputError(f"{file.name}: the query {query!r:.200} fails: {error}", "Correct --query.")


def _check_names(file: InputFile, names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(
            f"{file.name} gives two columns {twice[0]!r}", "Give one another name in --query: a AS b."
        )
