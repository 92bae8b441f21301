"""JSONL, CSV, TSV and plain text lines; a broken line is a bad record, a broken file an error."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
from collections.abc import Callable, Generator, Iterator
from typing import Any

from ...errors import InputError
from ..records import Row
from .base import Contents, InputFile, Mark, Reader, Selection

_MAX_FIELD = 16 << 20
_LONG_NUMBER = b"0" * 19
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")


class TextReader(Reader):
    """Rows of lines, whose places can be gone to."""

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Row]:
        """Yield all rows."""
        return self.rows_from(file, selection, Mark(0, 0))

    def rows_from(self, file: InputFile, selection: Selection, mark: Mark) -> Iterator[Row]:
        """Yield the rows from a place on that `marks` gave."""
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
        for num_lines in self._ends(file):
            num_rows += 1
            if num_rows % every == first:
                yield num_rows, Mark(file.offset, num_lines)
        return num_rows

    def _ends(self, file: InputFile) -> Iterator[int]:
        """Yield for every row the number of its last line."""
        raise NotImplementedError


class LinesReader(TextReader):
    """Every line is one record; blank lines too, so that positions are line numbers."""

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return that a line has no columns."""
        _check_encoding(file)
        return Contents(column_names=())

    def _ends(self, file: InputFile) -> Iterator[int]:
        for number, _ in file.lines():
            yield number

    def rows_from(self, file: InputFile, selection: Selection, mark: Mark) -> Iterator[Row]:
        """Yield the text of every line."""
        for number, line in file.lines(mark):
            where = f"{file.name}:{number}"
            try:
                yield Row(file.decode(line).rstrip("\r\n"), None, where)
            except UnicodeDecodeError as error:
                yield Row(None, None, where, error)


class JsonlReader(TextReader):
    """Every line that is not blank is one JSON value."""

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return nothing: every object has its own names."""
        _check_encoding(file)
        return Contents()

    def _ends(self, file: InputFile) -> Iterator[int]:
        for number, line in file.lines():
            if not line.isspace():
                yield number

    def rows_from(self, file: InputFile, selection: Selection, mark: Mark) -> Iterator[Row]:
        """Yield the parsed values."""
        parse, pick, name = _json_parser(file), selection.picker(), file.name
        for number, line in file.lines(mark):
            if line.isspace():
                continue
            where = f"{name}:{number}"
            try:
                entry = parse(line)
            except (ValueError, RecursionError) as error:
                yield Row(None, None, where, error)
            else:
                yield pick(entry, where)


class CsvReader(TextReader):
    """A header line, then one record per row; quoted fields may hold line ends, which stay as they are."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return the header; an empty file has none and misses nothing."""
        with contextlib.closing(file.lines()) as lines:
            header = self._header(file, self._parser(file, lines))
        others = [mark for mark in ",;\t|" if len(header) == 1 and mark in header[0]]
        if others and file.dialect.delimiter is None:
            file.warnings.append(
                f"{file.name} has one column {header[0]!r}: "
                f"name what separates its columns, --delimiter {others[0]!r}"
            )
        return Contents(column_names=header or None)

    def _ends(self, file: InputFile) -> Iterator[int]:
        reader = self._parser(file, file.lines())
        self._header(file, reader)
        for _, last, _ in self._entries(file, reader, 0):
            yield last

    def rows_from(self, file: InputFile, selection: Selection, mark: Mark) -> Iterator[Row]:
        """Yield a dict of texts per row, by the names of the header."""
        if mark.offset:
            with contextlib.closing(file.lines()) as lines:
                header = self._header(file, self._parser(file, lines))
            reader = self._parser(file, file.lines(mark))
        else:
            reader = self._parser(file, file.lines())
            header = self._header(file, reader)
        for first, last, fields in self._entries(file, reader, mark.num_lines):
            where = f"{file.name}:{first}"
            if isinstance(fields, csv.Error):
                yield Row(None, None, where, fields)
            else:
                span = "" if last == first else f", in the lines {first} to {last}"
                yield self._row(fields, header, selection, where, span)

    def _entries(
        self, file: InputFile, reader: Any, before: int
    ) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
        """Yield the numbers of first and last line, and the fields, of every row.

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
                yield first, last, error
                continue
            if fields:
                yield first, before + reader.line_num, fields

    def _parser(self, file: InputFile, lines: Iterator[tuple[int, bytes]]) -> Any:
        csv.field_size_limit(_MAX_FIELD)
        # surrogateescape lets a line that cannot be decoded through, to be reported as one bad record.
        texts = (file.decode(line, "surrogateescape") for _, line in lines)
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

    def _row(self, fields: list[str], header: list[str], selection: Selection, where: str, lines: str) -> Row:
        if len(fields) != len(header):
            wrong = ValueError(f"{len(fields)} fields{lines}, but the header has {len(header)}")
            return Row(None, None, where, wrong)
        try:
            "".join(fields).encode()
        except UnicodeEncodeError:
            return Row(None, None, where, ValueError("the row cannot be decoded: see --encoding"))
        return selection.row(dict(zip(header, fields, strict=True)), where)


def _check_encoding(file: InputFile) -> None:
    with contextlib.closing(file.lines()) as lines:
        next(lines, None)


def _json_parser(file: InputFile) -> Callable[[bytes], Any]:
    """Return a function that parses a line: quickly where orjson, if it is installed, gives the same."""
    decode = json.JSONDecoder(parse_constant=None if file.dialect.allow_nan else _refuse_constant).decode
    if importlib.util.find_spec("orjson") is None:
        return lambda line: decode(file.decode(line))
    quick = importlib.import_module("orjson").loads

    def parse(line: bytes) -> Any:
        # Integers of more than 64 bits would become floats.
        if file.encoding == "utf-8" and _LONG_NUMBER not in line.translate(_DIGITS_AS_ZEROS):
            try:
                return quick(line)
            except (ValueError, RecursionError):
                pass  # it may still be allowed, and the error is Python's own whatever is installed
        return decode(file.decode(line))

    return parse


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON: give --allow-nan to read it")
