"""Files of the formats that hold a table of Arrow with its types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..blocks import OBJECTS
from ..places import open_place


class _TableFormat(NamedTuple):
    """How a shard is written and read.

    Attributes:
        write: writes a table; also gets the names of the columns whose values may repeat.
        read: returns the table of an open file.
        read_schema: returns its schema alone.
    """

    write: Callable[[IO[bytes], Any, Sequence[str]], None]
    read: Callable[[IO[bytes]], Any]
    read_schema: Callable[[IO[bytes]], Any]


def write_table(format_name: str, file: IO[bytes], table: Any, schema: dict[str, str]) -> None:
    """Write a shard.

    Args:
        format_name: one of `TABLE_FORMATS`.
        file: where it goes.
        table: ids and columns.
        schema: type and shape of the columns, as `blocks.schema_of` gives them.
    """
    repeating = [name for name, kind in schema.items() if kind.startswith(OBJECTS)]
    TABLE_FORMATS[format_name].write(file, table, repeating)


def read_table(path: Path) -> Any:
    """Return a shard on disk or in a store; its suffix is the format's name."""
    with open_place(path, in_order=False) as file:
        return TABLE_FORMATS[path.suffix[1:]].read(file)


def read_schema(path: Path) -> Any:
    """Return the schema of a shard, as the file states it."""
    with open_place(path, in_order=False) as file:
        return TABLE_FORMATS[path.suffix[1:]].read_schema(file)


def _write_parquet(file: IO[bytes], table: Any, repeating: Sequence[str]) -> None:
    import pyarrow.parquet

    # A dictionary of floats that hardly repeat costs time and memory, and is thrown away.
    pyarrow.parquet.write_table(table, file, use_dictionary=list(repeating) or False)


def _read_parquet(file: IO[bytes]) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file, partitioning=None)


def _read_parquet_schema(file: IO[bytes]) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_schema(file)


def _write_arrow(file: IO[bytes], table: Any, _: Sequence[str]) -> None:
    import pyarrow

    # The chunks of a column of categories may have a dictionary each; a file has room for one.
    options = pyarrow.ipc.IpcWriteOptions(unify_dictionaries=True)
    with pyarrow.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table)


def _read_arrow(file: IO[bytes]) -> Any:
    import pyarrow

    with pyarrow.ipc.open_file(file) as reader:
        return reader.read_all()


def _read_arrow_schema(file: IO[bytes]) -> Any:
    import pyarrow

    with pyarrow.ipc.open_file(file) as reader:
        return reader.schema


TABLE_FORMATS = {
    "parquet": _TableFormat(_write_parquet, _read_parquet, _read_parquet_schema),
    "arrow": _TableFormat(_write_arrow, _read_arrow, _read_arrow_schema),
}
