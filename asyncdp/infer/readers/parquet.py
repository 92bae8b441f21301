"""Parquet, row group by row group, so that a file may be larger than memory."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

from ..places import is_remote, open_place
from ..records import Records
from ..where import Where
from .base import Contents, InputFile
from .columnar import check_schema, selected_rows
from .selection import Selection

_CHUNK = 1024
_TAIL = 8  # the footer's length and the mark of the format


class ParquetReader:
    """Reads the wanted columns; a list column of numbers arrives as arrays."""

    binary = True

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return the number of rows that the footer states, and the columns of the schema."""
        with _open(file) as parquet:
            _check_counts(file, parquet.metadata)
            check_schema(file, parquet.schema_arrow, selection)
            return Contents(parquet.metadata.num_rows, parquet.schema_arrow.names)

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Records]:
        """Yield a dict per row, or the bare value of a single column; other row groups are not read."""
        with _open(file) as parquet:
            stop = parquet.metadata.num_rows if stop is None else stop
            groups, number = _groups_between(parquet, start, stop)
            matching = _groups_that_may_match(file, selection.where)
            for group in groups:
                end = number + parquet.metadata.row_group(group).num_rows
                if matching is not None and group not in matching:
                    yield Records.nothing(range(max(number, start), min(end, stop)))
                    number = end
                    continue
                batches = parquet.iter_batches(_CHUNK, row_groups=[group], columns=selection.needed)
                while number < stop and (batch := _next_batch(file, batches)) is not None:
                    skipped = max(0, start - number)
                    wanted = batch.slice(skipped, stop - number - skipped)
                    yield selected_rows(wanted, selection, file.name, number + skipped)
                    number += batch.num_rows


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


def _groups_that_may_match(file: InputFile, where: Where | None) -> set[int] | None:
    """Return the row groups whose statistics leave room for rows that fulfil a condition, None for all."""
    import pyarrow
    import pyarrow.dataset

    if where is None:
        return None
    try:
        footer = pyarrow.BufferReader(_footer(file))
        fragment = pyarrow.dataset.ParquetFileFormat().make_fragment(footer)
        schema = fragment.physical_schema
        return {group.id for group in fragment.subset(where.expression, schema=schema).row_groups}
    except (pyarrow.ArrowException, OSError, ValueError):
        return None  # told by the rows


def _next_batch(file: InputFile, batches: Iterator[Any]) -> Any:
    import pyarrow

    try:
        return next(batches, None)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise file.broken(error) from error
