"""JSONL, CSV, TSV and plain text lines; a broken line is a bad record, a broken file an error."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..records import Row
from .base import Contents, InputFile, Reader, Selection

_MAX_FIELD = 16 << 20


class LinesReader(Reader):
    """Every line is one record; blank lines too, so that positions are line numbers."""

    def inspect(self, path: Path) -> Contents:
        """Return that a line has no columns."""
        return Contents(column_names=())

    def rows(self, file: InputFile, selection: Selection, start: int) -> Iterator[Row]:
        """Yield the text of every line."""
        for number, line in file.lines():
            where = f"{file.name}:{number}"
            try:
                yield Row(line.rstrip(b"\r\n").decode(), None, where)
            except UnicodeDecodeError as error:
                yield Row(None, None, where, error)


class JsonlReader(Reader):
    """Every line that is not blank is one JSON value."""

    def rows(self, file: InputFile, selection: Selection, start: int) -> Iterator[Row]:
        """Yield the parsed values."""
        for number, line in file.lines():
            if not line.strip():
                continue
            where = f"{file.name}:{number}"
            try:
                entry = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                yield Row(None, None, where, error)
            else:
                yield selection.row(entry, where)


class CsvReader(Reader):
    """A header line, then one record per row; quoted fields may hold line ends, which stay as they are."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def inspect(self, path: Path) -> Contents:
        """Return the header; an empty file has none and misses nothing."""
        file = InputFile(path)
        with contextlib.closing(file.lines()) as lines:
            return Contents(column_names=self._header(file, self._parser(lines)) or None)

    def rows(self, file: InputFile, selection: Selection, start: int) -> Iterator[Row]:
        """Yield a dict of texts per row."""
        reader = self._parser(file.lines())
        header = self._header(file, reader)
        while True:
            first = reader.line_num + 1
            where = f"{file.name}:{first}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # One quote too many or too few swallows the rows up to the next quote, or to the end.
                if reader.line_num > first or "unexpected end of data" in str(error):
                    raise file.broken(
                        f"a quote that is opened in line {first} is not closed as it should ({error} in "
                        f"line {reader.line_num}), so that the rows between cannot be told apart"
                    ) from error
                yield Row(None, None, where, error)
                continue
            if fields:
                lines = "" if reader.line_num == first else f", in the lines {first} to {reader.line_num}"
                yield self._row(fields, header, selection, where, lines)

    def _parser(self, lines: Iterator[tuple[int, bytes]]) -> Any:
        csv.field_size_limit(_MAX_FIELD)
        # surrogateescape lets a line that is no UTF-8 through, to be reported as one bad record.
        texts = (line.decode(errors="surrogateescape") for _, line in lines)
        return csv.reader(texts, delimiter=self._delimiter, strict=True)

    def _header(self, file: InputFile, reader: Iterator[list[str]]) -> list[str]:
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise file.broken(error) from error
        if len(set(header)) != len(header):
            raise file.broken("two columns of the header have the same name")
        return header

    def _row(self, fields: list[str], header: list[str], selection: Selection, where: str, lines: str) -> Row:
        if len(fields) != len(header):
            wrong = ValueError(f"{len(fields)} fields{lines}, but the header has {len(header)}")
            return Row(None, None, where, wrong)
        try:
            "".join(fields).encode()
        except UnicodeEncodeError:
            return Row(None, None, where, ValueError("the row is not valid UTF-8"))
        return selection.row(dict(zip(header, fields, strict=True)), where)
