"""What every reader offers, and how files are opened."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import dataclasses
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from ...errors import DamagedInputError, InputError
from ..places import Found, is_remote, open_place
from ..records import Row
from ..where import Where

STDIN = Path("-")

_MAX_LINE = 64 << 20
_CHUNK = 1 << 16
# That of UTF-16 in little endian begins that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BROKEN_STREAM = (EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which parts of an entry are wanted.

    Attributes:
        columns: names of the wanted columns; one gives its bare value, none the whole entry.
        id_column: name of the column that holds the id, else None.
        keep: names of the columns that are copied into the output.
        where: what rows must fulfil; those that do not need not be read.
    """

    columns: tuple[str, ...] = ()
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    where: Where | None = None

    @property
    def named(self) -> list[str]:
        """All columns that were asked for by name, each once."""
        tested = self.where.columns if self.where else ()
        return list(dict.fromkeys((*self.columns, *self.keep, *filter(None, [self.id_column]), *tested)))

    @property
    def needed(self) -> list[str] | None:
        """The columns that must be read, None for all."""
        return self.named if self.columns else None

    def row(self, entry: Any, where: str, identity: Any = None, kept: Mapping[str, Any] | None = None) -> Row:
        """Pick value, id and what is kept out of one entry; what is missing becomes the error of the row.

        Args:
            entry: all that was read.
            where: file and line or row.
            identity: the id where it is not in the entry.
            kept: what is kept where it is not in the entry.
        """
        try:
            if kept is None:
                kept = {name: _pick(entry, name) for name in self.keep} if self.keep else {}
            identity = self._id(entry) if identity is None else identity
            return Row(self._value(entry), identity, where, kept=kept, tested=self._tested(entry))
        except _Missing as missing:
            return Row(None, None, where, ValueError(str(missing)))

    def picker(self) -> Callable[[Any, str], Row]:
        """Return `row` as a function for many entries, quick where it picks one column of text or numbers."""
        if len(self.columns) != 1 or self.keep or self.where:
            return self.row
        (column,), id_column = self.columns, self.id_column

        def pick(entry: Any, where: str) -> Row:
            if type(entry) is dict and column in entry:
                if id_column is None:
                    return Row(entry[column], None, where)
                identity = entry.get(id_column)
                if type(identity) is str and identity.isascii():
                    return Row(entry[column], identity, where)
                if type(identity) is int:
                    return Row(entry[column], str(identity), where)
            return self.row(entry, where)  # which knows all that may be wrong

        return pick

    def _tested(self, entry: Any) -> dict[str, Any] | None:
        if self.where is None:
            return None
        return {name: entry.get(name) if isinstance(entry, dict) else None for name in self.where.columns}

    def _value(self, entry: Any) -> Any:
        if not self.columns:
            return entry
        if len(self.columns) == 1:
            return _pick(entry, self.columns[0])
        return {name: _pick(entry, name) for name in self.columns}

    def _id(self, entry: Any) -> str | None:
        if self.id_column is None:
            return None
        value = _pick(entry, self.id_column)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise _Missing(f"the id must be text or an integer, but is {value!r:.80}")
        return checked_text(str(value))


class _Missing(Exception):
    pass


def checked_text(text: str) -> str:
    """Return `text` when it can be written as UTF-8, which lone surrogates cannot."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Missing(f"{text!r:.80} is not valid Unicode text") from None
    return text


def _pick(entry: Any, name: str) -> Any:
    if not isinstance(entry, dict):
        raise _Missing(f"column {name!r} was asked for, but the entry is no object: {entry!r:.80}")
    if name not in entry:
        raise _Missing(f"there is no column {name!r}, only {', '.join(map(repr, list(entry)[:20]))}")
    return entry[name]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How text files are written.

    Attributes:
        encoding: a codec of Python; None obeys a byte order mark, and is else UTF-8.
        delimiter: between the fields of a table, None for that of the format.
        quote: around fields of a table.
        allow_nan: whether JSON may hold NaN and Infinity.
        query: of SQL, for files of databases.
    """

    encoding: str | None = None
    delimiter: str | None = None
    quote: str = '"'
    allow_nan: bool = False
    query: str | None = None


class Contents(NamedTuple):
    """What a reader knows of a file before it reads the rows; None where only the rows show it."""

    num_rows: int | None = None
    column_names: Sequence[str] | None = None
    unfit: Mapping[str, str] = {}
    """The dtypes that no model takes, by name of the column."""


class Mark(NamedTuple):
    """The place in a text where a row begins.

    Attributes:
        offset: bytes before it.
        num_lines: lines before it.
    """

    offset: int
    num_lines: int


class Reader(Protocol):
    """Turns files of one format into rows, a few at a time."""

    binary: bool = False
    """Whether the file must be seekable and uncompressed."""

    applies_where: bool = False
    """Whether it leaves out the rows that do not fulfil `Selection.where`, and gives None for each."""

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return what is cheap to know of a file; by default nothing."""
        return Contents()

    def rows(
        self, file: InputFile, selection: Selection, start: int, stop: int | None
    ) -> Iterator[Row | None] | Iterator[Row]:
        """Yield the rows from number `start` to `stop`, nothing else where the numbers are known.

        Args:
            file: where to read.
            selection: which columns are wanted.
            start: number of the first row, 0 where `inspect` does not know how many there are.
            stop: number behind the last one, None for all that the file has.
        """


class InputFile:
    """One input file, decompressed by its suffix, that knows how much of it has been read."""

    def __init__(self, found: Found, dialect: Dialect | None = None) -> None:
        self.found = found
        self.path = found.path
        self.name = "standard input" if self.path == STDIN else str(self.path)
        self.num_bytes = found.num_bytes
        self.tag = found.tag
        self.dialect = dialect or Dialect()
        self.warnings: list[str] = []
        self._raw: IO[bytes] | None = None
        self._lines: Any = None
        self._encoding = "utf-8"

    @property
    def num_bytes_read(self) -> int:
        """Bytes of the stored (compressed) file consumed so far."""
        try:
            return 0 if self._raw is None else min(self._raw.tell(), self.num_bytes)
        except ValueError:  # closed meanwhile by the reading thread: read to its end
            return self.num_bytes

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file for reading.

        Raises:
            DamagedInputError: a compressed file is cut short or damaged.
        """
        self._lines = None
        if self.path == STDIN:
            yield sys.stdin.buffer
            return
        try:
            with open_place(self.path) as raw, _decompressed(raw, self.path) as stream:
                self._raw = raw
                yield stream
        except _BROKEN_STREAM as error:
            raise self.broken(error) from error

    @property
    def offset(self) -> int:
        """Bytes of a plain text before the next line, while `lines` is being read."""
        assert self._raw is not None, "the file is open"
        return self._raw.tell()

    def has_offsets(self) -> bool:
        """Return whether lines of a text can be gone to: it is neither compressed nor converted."""
        if self.path == STDIN or self.path.suffix.lower() in COMPRESSIONS:
            return False
        with self.open() as stream:
            return stream.seekable() and self._transcoded(stream) is stream

    def lines(self, start: Mark | None = None) -> Generator[tuple[int, bytes], None, None]:
        """Yield the number (from 1) and the bytes of every line, with its end; `decode` reads them.

        Args:
            start: where to begin; None for the first line.

        Raises:
            InputError: the file is in an encoding that must be named, or a line is too long.
        """
        with self.open() as stream:
            number, readline = 0, self._transcoded(stream).readline
            if start is not None and start.offset:
                number = start.num_lines
                stream.seek(start.offset)
            # A bounded readline: a file without line ends must not fill the memory.
            while line := readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise InputError(
                        f"{self.name}: line {number} is longer than {_MAX_LINE >> 20} MiB",
                        "Split it: a record is read as a whole. Is it a text file, with line ends?",
                    )
                if number == 1:
                    line = self._without_mark(line)
                yield number, line

    @property
    def encoding(self) -> str:
        """That of the lines, known once the first has been read."""
        return self._encoding

    def decode(self, line: bytes, errors: str = "strict") -> str:
        """Decode a line."""
        return line.decode(self._encoding, errors)

    def _transcoded(self, stream: IO[bytes]) -> Any:
        """Return the stream itself, or one in UTF-8 where a line end is other bytes than in ASCII."""
        if self._lines is None:
            head = stream.peek(4)[:4]  # type: ignore[attr-defined]
            marked = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
            self._encoding = self.dialect.encoding or marked
            self._lines = stream
            if "a\n".encode(self._encoding) != b"a\n":
                self._lines = _Recoded(self, stream, self._encoding)
                self._encoding = "utf-8"
        return self._lines

    def _without_mark(self, line: bytes) -> bytes:
        if self.dialect.encoding is None and b"\0" in line[:_CHUNK]:
            raise InputError(
                f"{self.name} is no text in UTF-8: there are NULs in its first line",
                "Name its encoding, for instance --encoding utf-16-le, or its format with --input-format.",
            )
        return line.removeprefix(codecs.BOM_UTF8) if self._encoding == "utf-8" else line

    def broken(self, why: object) -> DamagedInputError:
        """Build the error for a file that cannot be read to its end."""
        cause = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else why
        lost = ", or its store does not answer" if is_remote(self.path) else ""
        return DamagedInputError(
            f"{self.name} cannot be read: {cause}",
            f"The file is damaged, half-written or of another format (see --input-format){lost}.",
        )


class _Streams(io.RawIOBase):
    """Decompresses one stream after another, to the end of the file.

    `bz2.open` and `lzma.open` take a stream whose first bytes are damaged for the end of the file.
    """

    def __init__(self, raw: IO[bytes], new_decompressor: Callable[[], Any]) -> None:
        self._raw, self._new = raw, new_decompressor
        self._stream = new_decompressor()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with at least a byte, or return 0 at the end."""
        data = b""
        while not data:
            begin = b""
            if self._stream.eof:
                begin = self._begin_of_next(self._stream.unused_data)
                if not begin:
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input and not (begin := self._raw.read(_CHUNK)):
                raise EOFError("the compressed file ended before its end-of-stream marker")
            data = self._stream.decompress(begin, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _begin_of_next(self, rest: bytes) -> bytes:
        while not (begin := rest.lstrip(b"\0")):  # zeros are padding
            rest = self._raw.read(_CHUNK)
            if not rest:
                break
        return begin


class _Recoded:
    """Lines of a text in UTF-8, whatever its encoding."""

    def __init__(self, file: InputFile, stream: IO[bytes], encoding: str) -> None:
        self._file = file
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._rest = ""
        self._is_at_end = False

    def readline(self, size: int) -> bytes:
        """Return the next line with its end, or its first characters if it is too long."""
        while "\n" not in self._rest and len(self._rest) < size and not self._is_at_end:
            data = self._stream.read(_CHUNK)
            self._is_at_end = not data
            try:
                self._rest += self._decoder.decode(data, self._is_at_end)
            except UnicodeError as error:
                raise self._file.broken(error) from error
        end = self._rest.find("\n") + 1 or len(self._rest)
        line, self._rest = self._rest[:end], self._rest[end:]
        return line.encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def _open_zstd(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd") as stream:
        # Arrow's stream has no readline; it has all that a buffered reader asks for.
        yield io.BufferedReader(stream)


COMPRESSIONS: dict[str, Callable[[Any], contextlib.AbstractContextManager[Any]]] = {
    ".gz": gzip.open,
    ".bz2": lambda raw: io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor)),
    ".xz": lambda raw: io.BufferedReader(_Streams(raw, lzma.LZMADecompressor)),
    ".zst": _open_zstd,
}
"""What opens a compressed file, by suffix."""


def _decompressed(raw: Any, path: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    decompress = COMPRESSIONS.get(path.suffix.lower())
    if decompress is None:
        return contextlib.nullcontext(raw)
    if not raw.peek(1):
        # Some of the libraries read an empty file as no rows, but it is one whose writing was cut short.
        raise EOFError("the file is empty")
    return decompress(raw)
