"""The files of one block: their names, and how they are written where nobody knows of the other blocks."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from ...errors import JobError
from ..blocks import BlockRows, check_same_schema, fixed_columns
from ..files import whole_file
from ..records import Failure
from .journal import Block, StoredFile
from .schema import conform, described, unify
from .tables import TABLE_FORMATS, write_table
from .writers import WIDENERS, make_table, naming_culprit, write_shard

PART_PREFIX = "part-"
ERRORS_PREFIX = "_errors-"

WIDENED = (*TABLE_FORMATS, *WIDENERS)
"""Formats whose shards are written again where later ones have further columns."""

OpenWhole = Callable[[Path], AbstractContextManager[IO[bytes]]]


def part_name(index: int, format_name: str) -> str:
    """Return the name of the file with a block's outputs."""
    return f"{PART_PREFIX}{index:06d}.{format_name}"


def write_errors(folder: Path, name: str, failures: Sequence[Failure], whole: OpenWhole) -> StoredFile:
    """Write a file of bad records."""
    path = folder / f"{ERRORS_PREFIX}{name}.jsonl"
    with whole(path) as file:
        for failure in sorted(failures, key=lambda failure: failure.position):
            file.write(json.dumps(dataclasses.asdict(failure)).encode() + b"\n")
    return StoredFile.of(path, file)


def write_alone(
    folder: Path,
    format_name: str,
    index: int,
    num_records: int,
    rows: BlockRows,
    failures: Sequence[Failure],
    *,
    writer: str,
) -> Block:
    """Write the files of a block under their final names, without a journal and with its own columns alone.

    Args:
        folder: where all blocks go.
        format_name: one of the output formats.
        index: number of the block.
        num_records: records in it, good and bad.
        rows: its outputs.
        failures: its bad records to store, if any.
        writer: a name that nobody else who may write this block has.

    Returns:
        What is to go into the journal.

    Raises:
        OutputError: the disk does not take it.
        JobError: the format cannot hold the outputs.
    """
    whole = functools.partial(whole_file, writer=f"{writer}-")
    files, schema = [], dict[str, str]()
    if failures:
        files.append(write_errors(folder, f"{index:06d}", failures, whole))
    if len(rows):
        path = folder / part_name(index, format_name)
        ids, columns = rows.finish()
        if format_name in TABLE_FORMATS:
            with naming_culprit(format_name, ids, columns):
                table = make_table(ids, columns)
            # The types that a first shard has: unified with nothing, they are brought to one order.
            types = unify(None, table.schema, path.name)
            schema = described(types, fixed_columns(rows.schema))
            with whole(path) as file:
                write_table(format_name, file, conform(table, types, path.name), schema)
        else:
            schema = rows.schema
            with whole(path) as file:
                write_shard(format_name, file, ids, columns)
        files.append(StoredFile.of(path, file))
    return Block(index, num_records, num_records - len(rows), tuple(files), schema)


def check_joins(format_name: str, before: dict[str, str], now: dict[str, str], where: str) -> None:
    """Fail when a shard that was written alone does not go into one table with those before.

    Args:
        format_name: one of the output formats.
        before: columns of the shards before, empty where there are none.
        now: columns of the shard, empty where it has no rows.
        where: what it holds, for a person.

    Raises:
        JobError: with what differs.
    """
    if before and now:
        check_same_schema(before, now, where)
        if format_name not in WIDENED:
            check_no_new_columns(before, now, where)
            check_no_new_columns(now, before, "other shards than " + where)


def check_no_new_columns(before: dict[str, str], now: dict[str, str], where: str) -> None:
    """Fail when a format that cannot be widened gets a column that the shards before do not have.

    Raises:
        JobError: with its name.
    """
    for name in [name for name in now if name not in before]:
        raise JobError(
            f"Column {name!r} comes first in {where}, and the shards before have no such column",
            "Return it for every record, None where there is none, or write parquet or jsonl.",
        )
