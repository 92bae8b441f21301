"""JSONL, CSV, TSV and plain text lines; a broken line is a bad record, a broken file an error."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ...errors import InputError
from ..records import Records
from .base import Contents, InputFile, Mark, Reader
from .selection import Selection, Unreadable

_MAX_FIELD = 16 << 20
_LONG_NUMBER = b"0" * 19
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")


class TextReader(Reader):
    """Rows of lines, whose places can be gone to."""

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Records]:
        """Yield all rows."""
        return self.rows_from(file, selection, Mark(0, 0))

    def rows_from(self, file: InputFile, selection: Selection, mark: Mark) -> Iterator[Records]:
        """Yield the rows from a place on that `marks` gave, numbered from there."""
        raise NotImplementedError

    def marks(self, file: InputFile, first: int, every: int) -> Generator[tuple[int, Mark], None, int]:
        """Yield number and place of row `first`, and of every so many rows after it, without parsing values.

        The last place may be the end of the file.

        Args:
            file: one that has offsets.
            first: number of a row, less than `every`.
            every: how many rows there are between two places.

        Returns:
            The number of rows.
        """
        num_rows = 0
        if first == 0:
            yield 0, Mark(0, 0)
        for end in self._ends(file):
            num_rows += 1
            if num_rows % every == first:
                yield num_rows, end
        return num_rows

    def _ends(self, file: InputFile) -> Iterator[Mark]:
        """Yield for every row the place behind it."""
        raise NotImplementedError


class LinesReader(TextReader):
    """Every line is one record; blank lines too, so that positions are line numbers."""

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return that a line has no columns."""
        _check_encoding(file)
        return Contents(column_names=())

    def _ends(self, file: InputFile) -> Iterator[Mark]:
        for _, end in _each_line(file):
            yield end

    def rows_from(self, file: InputFile, selection: Selection, mark: Mark) -> Iterator[Records]:
        """Yield the text of every line."""
        num_rows = 0
        for number, lines in file.lines(mark):
            entries = _decoded(file, lines)
            yield selection.records(entries, _where(file, range(number, number + len(lines))), num_rows)
            num_rows += len(lines)


class JsonlReader(TextReader):
    """Every line that is not blank is one JSON value."""

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return nothing: every object has its own names."""
        _check_encoding(file)
        return Contents()

    def _ends(self, file: InputFile) -> Iterator[Mark]:
        for line, end in _each_line(file):
            if not line.isspace():
                yield end

    def rows_from(self, file: InputFile, selection: Selection, mark: Mark) -> Iterator[Records]:
        """Yield the parsed values."""
        parse, num_rows = _json_parser(file), 0
        for number, lines in file.lines(mark):
            numbers: Sequence[int] = range(number, number + len(lines))
            if any(map(bytes.isspace, lines)):
                numbers = [n for n, line in zip(numbers, lines, strict=True) if not line.isspace()]
                lines = [line for line in lines if not line.isspace()]
            yield selection.records(parse(lines), _where(file, numbers), num_rows)
            num_rows += len(lines)


class CsvReader(TextReader):
    """A header line, then one record per row; quoted fields may hold line ends, which stay as they are."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return the header; an empty file has none and misses nothing."""
        with contextlib.closing(_Feed(file)) as feed:
            header = self._header(file, self._parser(file, feed))
        others = [mark for mark in ",;\t|" if len(header) == 1 and mark in header[0]]
        if others and file.dialect.delimiter is None:
            file.warnings.append(
                f"{file.name} has one column {header[0]!r}: "
                f"name what separates its columns, --delimiter {others[0]!r}"
            )
        return Contents(column_names=header or None)

    def _ends(self, file: InputFile) -> Iterator[Mark]:
        end = Mark(0, 0)

        def texts() -> Iterator[str]:
            nonlocal end
            for line, behind in _each_line(file):
                end = behind
                yield _as_text(file, line)

        reader = self._parser(file, texts())
        self._header(file, reader)
        for _, _, fields in self._entries(file, reader, 0):
            if fields:
                yield end

    def rows_from(self, file: InputFile, selection: Selection, mark: Mark) -> Iterator[Records]:
        """Yield a dict of texts per row, by the names of the header."""
        feed = _Feed(file, mark)
        reader = self._parser(file, feed)
        with contextlib.closing(_Feed(file)) as begin:
            header = self._header(file, reader if not mark.offset else self._parser(file, begin))
        some: list[_Entry] = []
        num_rows = 0
        for entry in self._entries(file, reader, mark.num_lines):
            some += [entry] if entry.fields else []
            if some and not feed.num_left:
                yield self._records(file, selection, header, some, num_rows)
                num_rows += len(some)
                some = []
        if some:
            yield self._records(file, selection, header, some, num_rows)

    def _entries(self, file: InputFile, reader: Any, before: int) -> Iterator[_Entry]:
        """Yield what was read of every row, no fields for a blank line.

        Args:
            file: what is read.
            reader: gives the fields.
            before: lines before those of the reader.

        Raises:
            DamagedInputError: a quote that is not closed.
        """
        while True:
            first = before + reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                last = before + reader.line_num
                # One quote too many or too few swallows the rows up to the next quote, or to the end.
                if last > first or "unexpected end of data" in str(error):
                    raise file.broken(
                        f"a quote that is opened in line {first} is not closed as it should ({error} in "
                        f"line {last}), so that the rows between cannot be told apart"
                    ) from error
                yield _Entry(first, last, error)
                continue
            yield _Entry(first, before + reader.line_num, fields)

    def _parser(self, file: InputFile, texts: Iterable[str]) -> Any:
        csv.field_size_limit(_MAX_FIELD)
        marks: dict[str, Any] = {"delimiter": file.dialect.delimiter or self._delimiter}
        return csv.reader(texts, **marks, quotechar=file.dialect.quote, strict=True)

    def _header(self, file: InputFile, reader: Iterator[list[str]]) -> list[str]:
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise file.broken(error) from error
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise InputError(f"{file.name} has two columns {twice[0]!r}", "Rename one: records go by names.")
        try:
            "".join(header).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"The header of {file.name} is no UTF-8", "Name its encoding, for instance --encoding cp1252."
            ) from None
        return header

    def _records(
        self, file: InputFile, selection: Selection, header: list[str], some: list[_Entry], first: int
    ) -> Records:
        where = _where(file, [entry.first for entry in some])
        try:
            columns = list(zip(*(entry.fields for entry in some), strict=True))
            "".join(map("".join, columns)).encode()
        except (TypeError, ValueError):  # an error among them; of unlike lengths; not decoded
            columns = []
        if len(columns) == len(header):
            return selection.of_columns(dict(zip(header, columns, strict=True)), where, first)
        return selection.records([entry.named(header) for entry in some], where, first)


class _Entry(NamedTuple):
    """What was read of a row of a table, and the numbers of its first and last line."""

    first: int
    last: int
    fields: list[str] | csv.Error

    def named(self, header: list[str]) -> Any:
        """Return the fields by name, or why that cannot be."""
        if isinstance(self.fields, csv.Error):
            return Unreadable(self.fields)
        if len(self.fields) != len(header):
            lines = "" if self.last == self.first else f", in the lines {self.first} to {self.last}"
            wrong = f"{len(self.fields)} fields{lines}, but the header has {len(header)}"
            return Unreadable(ValueError(wrong))
        try:
            "".join(self.fields).encode()
        except UnicodeEncodeError:
            return Unreadable(ValueError("the row cannot be decoded: see --encoding"))
        return dict(zip(header, self.fields, strict=True))


class _Feed:
    """Lines of a text, one by one, that knows how many are there without waiting for more."""

    def __init__(self, file: InputFile, mark: Mark | None = None) -> None:
        self.num_left = 0
        self._file = file
        self._blocks = file.lines(mark)
        self._texts: Iterator[str] = iter(())

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self.num_left:
            _, lines = next(self._blocks)
            self.num_left = len(lines)
            self._texts = iter([_as_text(self._file, line) for line in lines])
        self.num_left -= 1
        return next(self._texts)

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()


def _as_text(file: InputFile, line: bytes) -> str:
    # surrogateescape lets a line that cannot be decoded through, to be reported as one bad record.
    return file.decode(line, "surrogateescape")


def _decoded(file: InputFile, lines: list[bytes]) -> list[Any]:
    texts: list[Any] = []
    for line in lines:
        try:
            texts.append(file.decode(line).rstrip("\r\n"))
        except UnicodeDecodeError as error:
            texts.append(Unreadable(error))
    return texts


def _where(file: InputFile, numbers: Iterable[int]) -> list[str]:
    name = file.name
    return [f"{name}:{number}" for number in numbers]


def _each_line(file: InputFile) -> Iterator[tuple[bytes, Mark]]:
    """Yield every line, and the place behind it."""
    offset = 0
    for number, lines in file.lines():
        offset += file.num_skipped if number == 1 else 0
        for index, line in enumerate(lines):
            offset += len(line)
            yield line, Mark(offset, number + index)


def _check_encoding(file: InputFile) -> None:
    with contextlib.closing(file.lines()) as lines:
        next(lines, None)


def _json_parser(file: InputFile) -> Callable[[list[bytes]], list[Any]]:
    """Return a function that parses lines: quickly where orjson, if it is installed, gives the same."""
    decode = json.JSONDecoder(parse_constant=None if file.dialect.allow_nan else _refuse_constant).decode

    def parse_one(line: bytes) -> Any:
        try:
            return decode(file.decode(line))
        except (ValueError, RecursionError) as error:
            return Unreadable(error)

    if importlib.util.find_spec("orjson") is None:
        return lambda lines: list(map(parse_one, lines))
    quick = importlib.import_module("orjson").loads

    def parse_either(line: bytes) -> Any:
        if _holds_long_number(line):
            return parse_one(line)
        try:
            return quick(line)
        except (ValueError, RecursionError):
            return parse_one(line)  # it may still be allowed, and the error is Python's own in any case

    def parse(lines: list[bytes]) -> list[Any]:
        if file.encoding != "utf-8":
            return list(map(parse_one, lines))
        if not _holds_long_number(b"".join(lines)):
            with contextlib.suppress(ValueError, RecursionError):
                return list(map(quick, lines))
        return list(map(parse_either, lines))

    return parse


def _holds_long_number(text: bytes) -> bool:
    """Return whether there may be integers of more than 64 bits, which orjson makes floats of."""
    return _LONG_NUMBER in text.translate(_DIGITS_AS_ZEROS)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON: give --allow-nan to read it")
