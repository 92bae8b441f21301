"""Arrow IPC: files (also Feather) and streams, as Hugging Face's `datasets` saves them."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

from ..places import is_remote, open_place
from ..records import Records
from .base import Contents, InputFile
from .columnar import check_schema, selected_rows
from .selection import Selection

_CHUNK = 1024
_MAGIC = b"ARROW1"
_END = b"\xff\xff\xff\xff\0\0\0\0"


class ArrowReader:
    """Reads record batch by record batch; on a disk only what is needed is in memory."""

    binary = True

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return the columns of the schema, and the number of rows where it costs no reading of them."""
        with _opened(file) as (schema, batches):
            check_schema(file, schema, selection)
            count = None if is_remote(file.path) else sum(batch.num_rows for batch in batches)
            return Contents(count, schema.names)

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Records]:
        """Yield a dict per row, or the bare value of a single column."""
        number = 0
        with _opened(file) as (_, batches):
            for batch in batches:
                begin, end = max(start - number, 0), batch.num_rows
                end = end if stop is None else min(end, stop - number)
                for first in range(begin, end, _CHUNK):
                    part = batch.slice(first, min(_CHUNK, end - first))
                    part = part if selection.needed is None else part.select(selection.needed)
                    _check(file, part)
                    yield selected_rows(part, selection, file.name, number + first)
                number += batch.num_rows
                if stop is not None and number >= stop:
                    return


def _check(file: InputFile, batch: Any) -> None:
    """Fail where the offsets in a batch point outside of it, which Arrow would follow."""
    import pyarrow

    try:
        for column in batch.columns:
            column.validate()
    except pyarrow.ArrowException as error:
        raise file.broken(error) from error


@contextlib.contextmanager
def _opened(file: InputFile) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Give the schema and the batches of a file."""
    import pyarrow

    with contextlib.ExitStack() as stack:
        try:
            stream: Any = open_place(file.path, in_order=False)
            with stream:
                head = stream.read(len(_MAGIC))
                stream.seek(-min(len(_END), file.num_bytes), os.SEEK_END)
                end = stream.read(len(_END))
                # Until version 0.15 the mark was zeros alone, after messages of a multiple of 8 bytes.
                is_old = head[:4] != _END[:4] and file.num_bytes % 8 == 4
                has_end = end == _END or (is_old and end[4:] == _END[4:])
            if is_remote(file.path):
                source = stack.enter_context(open_place(file.path, in_order=False))
            else:
                source = stack.enter_context(pyarrow.memory_map(str(file.path)))
            is_stream = head != _MAGIC
            reader = stack.enter_context(
                (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(source)
            )
            if is_stream and not has_end:
                # Arrow takes a stream that is cut between two batches for a whole one.
                raise EOFError("the stream has no end mark")
        except (pyarrow.ArrowException, OSError, ValueError, EOFError) as error:
            raise file.broken(error) from error
        yield reader.schema, _batches(file, reader, is_stream=is_stream)


def _batches(file: InputFile, reader: Any, *, is_stream: bool) -> Iterator[Any]:
    import pyarrow

    for index in itertools.count():
        if not is_stream and index == reader.num_record_batches:
            return
        try:
            batch = reader.read_next_batch() if is_stream else reader.get_batch(index)
        except StopIteration:
            return
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise file.broken(error) from error
        yield batch
