"""Shards of every output format; the id is first in every row."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from ...errors import JobError, MissingExtraError
from ..blocks import schema_of
from ..records import Columns
from ..values import as_python, as_text, is_arrow, json_text
from .sqlite import widened_sqlite, write_sqlite
from .tables import TABLE_FORMATS, write_table

Encoder = Callable[[IO[bytes], Sequence[Any], Columns], None]


def _write_as_table(format_name: str, file: IO[bytes], ids: Sequence[Any], columns: Columns) -> None:
    """Write one row per record."""
    write_table(format_name, file, make_table(ids, columns), schema_of(columns))


def make_table(ids: Sequence[Any], columns: Columns) -> Any:
    """Return a table of Arrow with one row per record; a vector per record becomes a fixed-size list."""
    import pyarrow

    arrays = {"id": _arrow_of_list(ids), **{name: _arrow(values) for name, values in columns.items()}}
    return pyarrow.table(arrays)


def _write_jsonl(file: IO[bytes], ids: Sequence[Any], columns: Columns) -> None:
    """Write one JSON object per record."""
    lists = [_listed(values) for values in columns.values()]
    for identity, *entries in zip(map(as_text, ids), *lists, strict=True):
        row = {"id": identity, **dict(zip(columns, entries, strict=True))}
        file.write(json_text(row).encode() + b"\n")


def _widened_jsonl(data: bytes, names: Sequence[str]) -> bytes:
    """Return a shard with these columns beside the ids, in this order; those that it lacks are null."""
    rows = [json.loads(line) for line in data.splitlines()]
    wide = ({"id": row["id"], **{name: row.get(name) for name in names}} for row in rows)
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in wide)


def _write_npy(file: IO[bytes], ids: Sequence[Any], columns: Columns) -> None:
    """Write a structured array with a field `id` and one per column."""
    fields = {"id": _id_array(ids), **{name: _numeric(name, values) for name, values in columns.items()}}
    dtype = [(name, values.dtype, values.shape[1:]) for name, values in fields.items()]
    rows = np.empty(len(ids), dtype=dtype)
    for name, values in fields.items():
        rows[name] = values
    np.save(file, rows, allow_pickle=False)


def _write_safetensors(file: IO[bytes], ids: Sequence[Any], columns: Columns) -> None:
    """Write a tensor per column; the ids are a tensor when numbers, else JSON under `ids`."""
    import safetensors.numpy

    tensors = {name: np.ascontiguousarray(_numeric(name, values)) for name, values in columns.items()}
    metadata = {}
    if all(isinstance(identity, int) for identity in ids):
        tensors["id"] = _id_array(ids)
    else:
        metadata["ids"] = json.dumps([as_text(identity) for identity in ids])
    file.write(safetensors.numpy.save(tensors, metadata))


WRITERS: dict[str, Encoder] = {
    **{name: functools.partial(_write_as_table, name) for name in TABLE_FORMATS},
    "jsonl": _write_jsonl,
    "npy": _write_npy,
    "safetensors": _write_safetensors,
    "sqlite": write_sqlite,
}

WIDENERS = {"jsonl": _widened_jsonl, "sqlite": widened_sqlite}
"""How a shard gets the columns that only others have, in formats without types."""


def write_shard(format_name: str, file: IO[bytes], ids: Sequence[Any], columns: Columns) -> None:
    """Write ids and columns in one of the formats.

    Raises:
        JobError: the format cannot hold what is in a column; the error names it.
    """
    with naming_culprit(format_name, ids, columns):
        WRITERS[format_name](file, ids, columns)


@contextlib.contextmanager
def naming_culprit(format_name: str, ids: Sequence[Any], columns: Columns) -> Iterator[None]:
    """Turn an error of a block of code that writes columns into one that names the column.

    Raises:
        JobError: with what to do.
    """
    encode = WRITERS[format_name]
    try:
        yield
    except (JobError, OSError, ImportError):
        raise
    except Exception as error:
        raise JobError(
            f"Column {_culprit(encode, ids, columns)!r} cannot be written as {format_name}: "
            f"{type(error).__name__}: {error}",
            "Make numbers or texts of one kind of it with --postprocess, or change --output-format.",
        ) from error


def try_writer(format_name: str) -> None:
    """Write one row to nowhere, so that the format's library is loaded before any record is run.

    Raises:
        MissingExtraError: the format's library is not installed.
    """
    try:
        write_shard(format_name, io.BytesIO(), [0], {"value": np.zeros((1, 1), np.float32)})
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"--output-format {format_name}", error.name or str(error), "cli") from error


def _culprit(encode: Encoder, ids: Sequence[Any], columns: Columns) -> str | None:
    for name, values in columns.items():
        try:
            encode(io.BytesIO(), ids, {name: values})
        except Exception:
            return name
    return None


def _arrow(values: Any) -> Any:
    import pyarrow

    if isinstance(values, list):
        return _arrow_of_list(values)
    array = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pyarrow.FixedSizeListArray.from_arrays(array, size)
    return array


def _arrow_of_list(values: Sequence[Any]) -> Any:
    import pyarrow

    first: Any = values[0] if values else None
    if is_arrow(first):
        if any(not is_arrow(value) or value.type != first.type for value in values):
            raise TypeError(f"its values are of several types, {first.type} among them")
        # Arrow itself refuses null scalars of lists.
        return pyarrow.array([value if value.is_valid else None for value in values], first.type)
    try:
        return pyarrow.array(values)
    except OverflowError:
        return pyarrow.array(values, pyarrow.uint64())


def _listed(values: Any) -> list[Any]:
    if isinstance(values, np.ndarray) and values.dtype.kind not in "mM":
        return values.tolist()  # type: ignore[no-any-return]
    return list(values)


def _id_array(ids: Sequence[Any]) -> np.ndarray[Any, Any]:
    kind = np.int64 if all(isinstance(identity, int) for identity in ids) else np.str_
    return np.array([as_text(identity) for identity in ids], dtype=kind)


def _numeric(name: str, values: Any) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(
            [as_python(v) if is_arrow(v) else v for v in values] if isinstance(values, list) else values
        )
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biufc":
        raise JobError(
            f"Column {name!r} holds no numbers of one shape, which npy and safetensors need",
            "Choose --output-format parquet or jsonl, or make arrays of it with --postprocess.",
        )
    return array
