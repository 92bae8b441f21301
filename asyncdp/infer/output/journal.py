"""The journal: which blocks of the input are done, and for which job.

A text of one entry per line, each with its own checksum, which a line cut by a crash does not pass. The
first entry is the fingerprint of the job. A block's entry is written only after its shards are on the disk,
or in the store, under their final names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ...errors import ResumeRefusedError
from ..files import Upload, digest_file, new_digest
from ..places import Found, is_remote, names_in
from .log import JOURNAL_NAME as JOURNAL_NAME
from .log import log_in

TIMES = "times of large files"
"""The entry of a fingerprint that differs between machines even where all contents are the same."""

CONTENTS = "input contents"
"""The entry that only a job has that is not split: a part of one does not read the other parts' input."""

SAMPLED_TIMES = "times of sampled files"
"""The entry that a job that is split has instead."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a block as it was when the block was finished."""

    name: str
    num_bytes: int
    digest: str
    tag: str | None = None

    @classmethod
    def of(cls, path: Path, written: IO[bytes]) -> StoredFile:
        """Measure a file that has just been written: on a disk what is there, for a store what was sent."""
        if isinstance(written, Upload):
            data = written.getvalue()
            return cls(path.name, len(data), new_digest(data).hexdigest(), written.tag)
        return cls(path.name, path.stat().st_size, digest_file(path))

    def is_intact(self, found: Found | None) -> bool:
        """Return whether the file is what the journal says; the store's own digest spares reading it."""
        if found is None or found.num_bytes != self.num_bytes:
            return False
        if found.tag is not None and self.tag is not None:
            return found.tag == self.tag
        return digest_file(found.path) == self.digest


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A finished block: a fixed range of record positions and the files that hold its outputs.

    Attributes:
        num_records: records in it, good and bad.
        schema: type and shape of each column of its outputs; empty where all its records were bad.
    """

    index: int
    num_records: int
    num_bad: int
    files: tuple[StoredFile, ...]
    schema: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the journal entry."""
        return {"block": self.index, **{k: v for k, v in dataclasses.asdict(self).items() if k != "index"}}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Block:
        """Read a journal entry."""
        files = tuple(StoredFile(**file) for file in entry["files"])
        for file in files:
            # A name is only ever one that this job made; never follow one out of the folder.
            if Path(file.name).name != file.name:
                raise ValueError(f"{file.name!r} is no file name")
        return cls(entry["block"], entry["num_records"], entry["num_bad"], files, dict(entry["schema"]))


@dataclasses.dataclass
class JournalState:
    """What a journal says: the job, its finished blocks, and the input's length once known.

    Attributes:
        file_rows: rows of the input files that were read to their end and do not state it, by position.
    """

    fingerprint: dict[str, Any]
    blocks: dict[int, Block] = dataclasses.field(default_factory=dict)
    num_records: int | None = None
    file_rows: dict[int, int] = dataclasses.field(default_factory=dict)
    last_line: int = 0

    @property
    def schema(self) -> dict[str, str]:
        """The columns that all shards have, empty before the first one."""
        return next((block.schema for block in self.blocks.values() if block.schema), {})

    def place_of(self, index: int) -> str:
        """Describe where a block lies in the input, for a person."""
        return f"the shard that begins with record {index * self.fingerprint['shard_size']}"

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the entries that make this state."""
        yield {"fingerprint": self.fingerprint}
        if self.file_rows:
            yield {"file_rows": self.file_rows}
        for _, block in sorted(self.blocks.items()):
            yield block.to_json()
        if self.num_records is not None:
            yield {"end": self.num_records}


class Journal:
    """The journal of one output folder, open for appending.

    Attributes:
        file_rows: as in `JournalState`, filled by whoever reads; what is new goes in with the next block.
    """

    def __init__(self, folder: Path, state: JournalState) -> None:
        self._log = log_in(folder)
        self.state = state
        self.file_rows: dict[int, int] = {}
        self._schema: dict[str, str] = {}
        # Beginning anew drops half lines and blocks that did not pass their check.
        self._log.begin(b"".join(map(_line, state.entries())), state.last_line)

    def finish_block(self, block: Block) -> None:
        """Record a block whose files are on the disk."""
        self.finish_blocks([block])

    def finish_blocks(self, blocks: Sequence[Block]) -> None:
        """Record some blocks whose files are on the disk, at the price of one where a line can be long."""
        known = self.state.file_rows
        new = {file: rows for file, rows in self.file_rows.copy().items() if file not in known}
        notes = [{"file_rows": new} if new else {}, *[{}] * len(blocks)]
        entries = zip(blocks, notes, strict=False)
        self._log.append([_line({**block.to_json(), **note}) for block, note in entries])
        for block in blocks:
            self.state.blocks[block.index] = self._slim(block)
        known.update(new)

    def _slim(self, block: Block) -> Block:
        """Return a block that shares its schema with others of the same one: there may be a million."""
        if list(block.schema.items()) != list(self._schema.items()):
            self._schema = block.schema
        return dataclasses.replace(block, schema=self._schema)

    def finish_input(self, num_records: int) -> None:
        """Record how many records the input has."""
        if self.state.num_records is None:
            self._log.append([_line({"end": num_records})])
            self.state.num_records = num_records

    def check_owner(self) -> None:
        """Fail when another process has written into the journal since.

        Raises:
            JobUsageError: it has.
        """
        self._log.check_owner()


def load_journal(folder: Path) -> JournalState:
    """Read the journal of a folder; entries that do not pass their checksum are left out.

    Raises:
        ResumeRefusedError: not even the fingerprint can be read.
    """
    log = log_in(folder)
    if not (names_in(folder) if is_remote(folder) else folder.is_dir()):
        raise ResumeRefusedError(f"There is no folder {folder}", "Name the output folder of a job.")
    try:
        lines, last_line = log.read()
    except OSError as error:
        raise ResumeRefusedError(
            f"{folder} holds files but no journal of a job ({error.strerror or error})",
            "Name another folder.",
        ) from error
    entries = [_parse(line) for line in lines]
    if not entries[0] or "fingerprint" not in entries[0]:
        raise ResumeRefusedError(
            f"The first line of {log.path} is damaged, which says what job the folder belongs to",
            "Remove the folder and start again.",
        )
    state = JournalState(entries[0]["fingerprint"], last_line=last_line)
    for entry in filter(None, entries[1:]):
        # What passes its checksum but is no journal entry counts as damaged too.
        with contextlib.suppress(KeyError, TypeError, ValueError):
            rows = {int(file): int(count) for file, count in entry.get("file_rows", {}).items()}
            state.file_rows.update(rows)
            if "block" in entry:
                state.blocks[int(entry["block"])] = Block.from_json(entry)
            elif "end" in entry:
                state.num_records = int(entry["end"])
    return state


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
