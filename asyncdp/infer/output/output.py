"""The output folder: its lock, its journal, and the step that makes a block final."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from ...errors import JobUsageError, OutputExistsError, ResumeRefusedError
from ..blocks import BlockRows, check_same_schema, fixed_columns, merged
from ..files import TEMPORARY_PREFIX, make_folder, whole_file
from ..places import exists, find_all, is_remote, names_in, open_place, remove, unreachable
from ..records import Failure
from .journal import (
    CONTENTS,
    JOURNAL_NAME,
    SAMPLED_TIMES,
    TIMES,
    Block,
    Journal,
    JournalState,
    StoredFile,
    load_journal,
)
from .schema import common_names, conform, described, unify
from .shards import (
    ERRORS_PREFIX,
    PART_PREFIX,
    check_joins,
    check_no_new_columns,
    part_name,
    write_errors,
)
from .tables import TABLE_FORMATS, read_schema, read_table, write_table
from .writers import WIDENERS, make_table, naming_culprit, write_shard

_LOCK_NAME = ".lock"

# What a job may leave in a folder before its journal is complete.
_NOTHING_YET = (_LOCK_NAME, TEMPORARY_PREFIX + JOURNAL_NAME)


class OutputFolder:
    """A folder that one job at a time writes shards into; a context manager that holds its lock.

    Args:
        path: the folder; made when missing.
        format_name: one of the output formats.
        fingerprint: what the outputs depend on.
        resume: whether to continue the job whose journal is there.

    Raises:
        OutputExistsError: the folder is not empty and `resume` is False.
        ResumeRefusedError: the folder belongs to a job with another fingerprint.
        JobUsageError: another process is writing into the folder.
    """

    def __init__(self, path: Path, format_name: str, fingerprint: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.warnings: list[str] = []
        self._format = format_name
        self._schema: Any = None
        self._lock = _locked(path)
        try:
            self.journal = Journal(path, self._intact(read_state(path, fingerprint, resume=resume)))
            if not is_remote(path):
                self._remove_strays()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def finished(self) -> dict[int, Block]:
        """The blocks that are done, by index."""
        return self.journal.state.blocks

    def count_files(self) -> tuple[int, int]:
        """Return the number of shards with outputs, and of files with bad records."""
        names = [file.name for block in self.finished.values() for file in block.files]
        num_errors = sum(name.startswith(ERRORS_PREFIX) for name in names)
        return len(names) - num_errors, num_errors

    def write_block(self, index: int, num_records: int, rows: BlockRows, failures: Sequence[Failure]) -> None:
        """Make a block final: its shards first, then the line in the journal.

        Args:
            index: number of the block.
            num_records: records in it, good and bad.
            rows: its outputs.
            failures: its bad records to store, if any.

        Raises:
            OutputError: the disk does not take it.
            JobError: its outputs are of other types or shapes than those of the blocks before.
        """
        files: list[StoredFile] = []
        schema: dict[str, str] = {}
        if failures:
            files.append(write_errors(self.path, f"{index:06d}", failures, self._whole))
        if len(rows):
            path = self.path / part_name(index, self._format)
            write = self._write_table if self._format in TABLE_FORMATS else self._write_rows
            schema, stored = write(path, rows, self.journal.state.place_of(index))
            files.append(stored)
        self.journal.finish_block(Block(index, num_records, num_records - len(rows), tuple(files), schema))

    def take_blocks(self, blocks: Sequence[Block]) -> None:
        """Make blocks final whose files others have written; `widen_shards` is due before the job's end.

        Raises:
            OutputError: the disk does not take the line in the journal.
            JobError: their outputs are of other types or shapes than those of the blocks before.
        """
        for block in blocks:
            where = self.journal.state.place_of(block.index)
            check_joins(self._format, self.journal.state.schema, block.schema, where)
        self.journal.finish_blocks(blocks)

    def finish(self, num_records: int, *, others_wrote: bool = False) -> None:
        """Record how many records the input has, after its last block.

        Args:
            num_records: positions of the whole input.
            others_wrote: whether processes that are gone may have left files.
        """
        self.journal.finish_input(num_records)
        if is_remote(self.path) or others_wrote:
            # Not at the begin: who lost the folder without knowing would remove the shards of another.
            self.journal.check_owner()
            self._remove_strays()

    def widen_shards(self) -> None:
        """Give all shards the same columns and types.

        Raises:
            JobError: there is no common type.
        """
        if self._format in TABLE_FORMATS and self._common_schema() is not None:
            self._rewrite(self._common_schema())
        elif self._format in WIDENERS:
            schemas = [block.schema for block in self.finished.values() if block.schema]
            self._rewrite_rows(functools.reduce(merged, schemas, {}))

    def _whole(self, path: Path) -> AbstractContextManager[IO[bytes]]:
        """Open a file of the folder; one in a store is replaced only while the folder is this job's."""
        return whole_file(path, self.journal.check_owner)

    def _write_rows(self, path: Path, rows: BlockRows, where: str) -> tuple[dict[str, str], StoredFile]:
        """Write a shard whose format knows no types; a column that only other shards have is null."""
        ids, columns = rows.finish()
        before = self.journal.state.schema or rows.schema
        check_same_schema(before, rows.schema, where)
        if self._format in WIDENERS:
            schema = merged(before, rows.schema)
            self._rewrite_rows(schema)
        else:
            check_no_new_columns(before, rows.schema, where)
            schema = before
        with self._whole(path) as file:
            missing: list[Any] = [None] * len(ids)
            write_shard(self._format, file, ids, {name: columns.get(name, missing) for name in schema})
        return schema, StoredFile.of(path, file)

    def _rewrite_rows(self, schema: dict[str, str]) -> None:
        """Write the shards again that lack a column."""
        for block in self._blocks_unlike(schema):
            path = self.path / _shard_of(block)
            with open_place(path) as old:
                data = WIDENERS[self._format](old.read(), list(schema))
            with self._whole(path) as file:
                file.write(data)
            self._finish_again(block, StoredFile.of(path, file), schema)

    def _blocks_unlike(self, schema: dict[str, str]) -> list[Block]:
        items = list(schema.items())
        return [b for b in self.finished.values() if b.schema and list(b.schema.items()) != items]

    def _finish_again(self, block: Block, stored: StoredFile, schema: dict[str, str]) -> None:
        files = [file for file in block.files if file.name != stored.name]
        files.append(stored)
        self.journal.finish_block(dataclasses.replace(block, files=tuple(files), schema=schema))

    def _write_table(self, path: Path, rows: BlockRows, where: str) -> tuple[dict[str, str], StoredFile]:
        """Write a table of Arrow; the shards before are written again if they need wider types for it."""
        ids, columns = rows.finish()
        check_same_schema(self.journal.state.schema or rows.schema, rows.schema, where)
        with naming_culprit(self._format, ids, columns):
            table = make_table(ids, columns)
        before = self._common_schema()
        schema = unify(before, table.schema, where)
        table = conform(table, schema, where)
        if before is not None:
            self._rewrite(schema)
        names = described(schema, fixed_columns(rows.schema))
        with self._whole(path) as file:
            write_table(self._format, file, table, names)
        return names, StoredFile.of(path, file)

    def _common_schema(self) -> Any:
        """Return the schema of Arrow of all shards so far, None if there are none."""
        if self._schema is None:
            written = {str(block.schema): block for block in self.finished.values() if block.schema}
            for block in written.values():
                place = self.journal.state.place_of(block.index)
                schema = common_names(read_schema(self.path / _shard_of(block)))
                self._schema = unify(self._schema, schema, place)
        return self._schema

    def _rewrite(self, schema: Any) -> None:
        """Write the shards again that are of other types; after a crash meanwhile they count as damaged."""
        fixed = fixed_columns(self.journal.state.schema)
        names = described(schema, fixed)
        for block in self._blocks_unlike(names):
            path = self.path / _shard_of(block)
            table = conform(read_table(path), schema, self.journal.state.place_of(block.index))
            with self._whole(path) as file:
                write_table(self._format, file, table, names)
            self._finish_again(block, StoredFile.of(path, file), names)
        self._schema = schema

    def write_unfinished(self, failures: Sequence[Failure], *, others_wrote: bool = False) -> None:
        """Store the bad records of blocks that will not be finished; a resume removes them as strays.

        Args:
            failures: the bad records.
            others_wrote: as for `finish`.
        """
        if others_wrote:
            self._remove_strays()
        if failures:
            write_errors(self.path, "unfinished", failures, self._whole)

    def _intact(self, state: JournalState) -> JournalState:
        """Drop the blocks whose files are no longer what the journal says."""
        found = {file.path.name: file for file in find_all(self.path)} if state.blocks else {}
        for index, block in sorted(state.blocks.items()):
            damaged = [file.name for file in block.files if not file.is_intact(found.get(file.name))]
            if damaged:
                self.warnings.append(f"{', '.join(damaged)} is missing or damaged: writing it again")
                del state.blocks[index]
        return state

    def _remove_strays(self) -> None:
        """Remove this job's files that no line of the journal names: a crash left them."""
        named = {file.name for block in self.finished.values() for file in block.files}
        for name in names_in(self.path):
            if name.startswith((TEMPORARY_PREFIX, PART_PREFIX, ERRORS_PREFIX)) and name not in named:
                remove(self.path / name)


def _shard_of(block: Block) -> str:
    return next(file.name for file in block.files if not file.name.startswith(ERRORS_PREFIX))


def read_state(path: Path, fingerprint: dict[str, Any], *, resume: bool) -> JournalState:
    """Return what is done in a folder already.

    Raises:
        OutputExistsError: the folder is not empty and `resume` is False.
        ResumeRefusedError: the folder belongs to a job with another fingerprint.
    """
    if not _holds_something(path):
        return JournalState(fingerprint)
    if not resume:
        raise OutputExistsError(path)
    state = load_journal(path)
    if changes := explain_changes(state.fingerprint, fingerprint):
        raise ResumeRefusedError(
            f"The output folder belongs to a different job: {'; '.join(changes)}",
            "Restore what changed, or write into another folder.",
        )
    return state


def check_output_free(path: Path, *, resume: bool) -> None:
    """Fail early, before anything is loaded, when the folder cannot take this job.

    Raises:
        OutputExistsError: it is not empty and `resume` is False.
        JobUsageError: it is a file, or cannot be made or written.
    """
    try:
        if exists(path) and not path.is_dir():
            raise JobUsageError(f"The output {path} is a file", "Name a folder for the shards.")
        if not resume and _holds_something(path):
            raise OutputExistsError(path)
    except OSError as error:
        raise unreachable(path, error) from error
    if is_remote(path):
        return
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(path, f"{parent} is read-only or belongs to another user")


def explain_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the parts of two fingerprints that differ."""
    changes = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if key in (CONTENTS, SAMPLED_TIMES) and (old is None or new is None):
            continue  # one of them has been merged
        if old != new:
            if key in ("input", CONTENTS, TIMES, SAMPLED_TIMES):
                # Only the files that differ: the same long list twice would not help.
                old, new = _without(old, new), _without(new, old)
            changes.append(f"{key} was {json.dumps(old):.200} and is {json.dumps(new):.200}")
    return changes


def _without(entries: list[Any] | None, others: list[Any] | None) -> list[Any]:
    return [entry for entry in entries or () if entry not in (others or ())] or (entries or [])


def _holds_something(path: Path) -> bool:
    return any(name not in _NOTHING_YET for name in names_in(path))


def _unwritable(path: Path, why: object) -> JobUsageError:
    return JobUsageError(
        f"The output folder {path} cannot be written: {why}",
        "Name a folder on a disk that you may write to.",
    )


def _locked(path: Path) -> Any:
    if is_remote(path):
        return _NoLock()  # the journal's log keeps others out
    import filelock

    # Acquired in one thread and released in another.
    lock = filelock.FileLock(path / _LOCK_NAME, thread_local=False)
    try:
        make_folder(path)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise JobUsageError(
            f"Another process is writing into {path}", "Wait for it to end, or name another folder."
        ) from None
    except OSError as error:
        raise _unwritable(path, error.strerror or error) from error
    return lock


class _NoLock:
    def release(self) -> None:
        return
