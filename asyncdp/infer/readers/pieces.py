"""Pieces of the input, one per block, that another machine can read without what lies before them."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import operator
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..places import Found
from ..records import Records, in_blocks
from ..where import Sample
from . import FORMATS, Inputs
from .base import Dialect, InputFile, Mark
from .selection import Selection
from .text import TextReader

_BEGIN = Mark(0, 0)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How all pieces of one input are read."""

    format_name: str
    selection: Selection
    dialect: Dialect
    sample: Sample | None


class Segment(NamedTuple):
    """Neighbouring rows of one file.

    Attributes:
        begin: number of the first row.
        mark: where that is in a text whose rows are found by reading; None where they can be gone to.
    """

    file: Found
    begin: int
    num_rows: int
    mark: Mark | None


class Piece(NamedTuple):
    """The records of one block.

    Attributes:
        first: position of the first one.
        segments: where they lie, in order.
        records: all of them, where the files' rows cannot be gone to.
    """

    first: int
    segments: tuple[Segment, ...] = ()
    records: Records | None = None

    @property
    def num_records(self) -> int:
        """Positions in it."""
        if self.records is not None:
            return len(self.records.span)
        return sum(segment.num_rows for segment in self.segments)

    def read(self, reading: Reading) -> Iterator[Records]:
        """Yield the records, some at a time.

        Raises:
            DamagedInputError: a file is damaged, cannot be read here, or has changed.
        """
        if self.records is not None:
            yield self.records
            return
        reader: Any = FORMATS[reading.format_name]
        selection, first = reading.selection, self.first
        for found, begin, num_rows, mark in self.segments:
            file = InputFile(found, reading.dialect)
            if mark is None:
                parts, offset = reader.rows(file, selection, begin, begin + num_rows), first - begin
            else:
                parts, offset = reader.rows_from(file, selection, mark), first
            num_read = 0
            for rows in parts:
                records = rows.moved(offset).between(first, first + num_rows)
                if records.span:
                    yield records if reading.sample is None else reading.sample.of(records)
                    num_read += len(records.span)
                if num_read == num_rows:
                    break
            if num_read != num_rows:
                raise file.broken(f"it had {begin + num_rows} rows, and now has {begin + num_read}")
            first += num_rows


class Planner:
    """Cuts an input into pieces, as late as they are asked for.

    Files that state their rows are not read; the rows of plain texts are found by reading their lines once;
    of all other files the records themselves are read, and travel with the piece.

    Args:
        inputs: what is cut; learns the rows of files that were read.
        block_size: records per piece.
        wanted: returns whether a block is to be done.

    Attributes:
        num_records: records of the input, known once all pieces were given.
    """

    def __init__(self, inputs: Inputs, block_size: int, wanted: Callable[[int], bool]) -> None:
        self.num_records = inputs.count_records()
        self._inputs = inputs
        self._size = block_size
        self._wanted = wanted

    @property
    def first_input(self) -> Path:
        """The first of the files, by which a machine can tell whether it sees them."""
        return self._inputs.files[0].path

    def pieces(self) -> Generator[tuple[int, Piece], None, None]:
        """Yield index and piece of every wanted block, in order.

        Raises:
            DamagedInputError: a file turns out to be damaged.
        """
        if self.num_records is not None:
            yield from self._counted(self.num_records)
            return
        reader = FORMATS[self._inputs.format_name]
        if isinstance(reader, TextReader) and all(file.has_offsets() for file in self._inputs.files):
            cut = self._limited(self._marked(reader))
        else:
            cut = self._shipped()
        for index, piece in cut:
            if self._wanted(index):
                yield index, piece
        self.num_records = self._inputs.num_records_read

    def _counted(self, total: int) -> Iterator[tuple[int, Piece]]:
        counts = [count or 0 for count in self._inputs.counts]
        starts = [0, *itertools.accumulate(counts)]
        for index in range(-(-total // self._size)):
            if not self._wanted(index):
                continue
            first, stop = index * self._size, min((index + 1) * self._size, total)
            position, segments = first, []
            file = bisect.bisect_right(starts, first) - 1
            while position < stop:
                num_rows = min(stop, starts[file + 1]) - position
                if num_rows:
                    found = self._inputs.files[file].found
                    segments.append(Segment(found, position - starts[file], num_rows, None))
                position += num_rows
                file += 1
            yield index, Piece(first, tuple(segments))

    def _marked(self, reader: TextReader) -> Iterator[tuple[int, Piece]]:
        position, segments = 0, list[Segment]()
        for number, file in enumerate(self._inputs.files):
            known = self._inputs.file_rows.get(number)
            if known is not None and not self._has_wanted(position, known):
                position += known
                self._inputs.num_records_read = position
                segments = []
                continue
            begin, mark = 0, _BEGIN
            for row, place in self._edges(reader, number, position):
                if row > begin:
                    segments.append(Segment(file.found, begin, row - begin, mark))
                if segments:
                    yield self._piece(position + row, segments)
                    segments = []
                begin, mark = row, place
                self._inputs.num_records_read = position + row
            num_rows = self._inputs.file_rows[number]
            if num_rows > begin:
                segments.append(Segment(file.found, begin, num_rows - begin, mark))
            position += num_rows
            self._inputs.num_records_read = position
        if segments:
            yield self._piece(position, segments)

    def _edges(self, reader: TextReader, number: int, position: int) -> Iterator[tuple[int, Mark]]:
        """Yield number and place of the rows of a file with which blocks begin."""
        marks = reader.marks(self._inputs.files[number], -position % self._size, self._size)
        self._inputs.file_rows[number] = yield from marks

    def _piece(self, stop: int, segments: list[Segment]) -> tuple[int, Piece]:
        first = stop - sum(segment.num_rows for segment in segments)
        return first // self._size, Piece(first, tuple(segments))

    def _has_wanted(self, position: int, num_rows: int) -> bool:
        first, last = position // self._size, max(position + num_rows - 1, position) // self._size
        return any(self._wanted(index) for index in range(first, last + 1))

    def _limited(self, cut: Iterator[tuple[int, Piece]]) -> Iterator[tuple[int, Piece]]:
        limit = self._inputs.subset.limit
        for index, piece in cut:
            if limit is not None and piece.first + piece.num_records >= limit:
                if piece.first < limit:
                    yield index, _shortened(piece, limit - piece.first)
                self._inputs.num_records_read = limit
                return
            yield index, piece

    def _shipped(self) -> Iterator[tuple[int, Piece]]:
        first = next(index for index in itertools.count() if self._wanted(index))
        parts = in_blocks(self._inputs.read_together(first * self._size), self._size)
        for index, some in itertools.groupby(parts, operator.itemgetter(0)):
            yield index, Piece(index * self._size, records=Records.joined([records for _, records in some]))


def _shortened(piece: Piece, num_records: int) -> Piece:
    """Return the first records of a piece."""
    segments = []
    for segment in piece.segments:
        num_rows = min(segment.num_rows, num_records)
        num_records -= num_rows
        if num_rows:
            segments.append(segment._replace(num_rows=num_rows))
    return piece._replace(segments=tuple(segments))
