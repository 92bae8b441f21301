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
from ..records import Records
from .selection import Selection

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

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return what is cheap to know of a file; by default nothing."""
        return Contents()

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Records]:
        """Yield the rows from number `start` to `stop`, nothing else where the numbers are known.

        As many at a time as are there; their spans follow each other, and leave out no row.

        Args:
            file: where to read.
            selection: which columns are wanted, and which rows.
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
        self.num_skipped = 0  # bytes of the mark before the first line

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

    def has_offsets(self) -> bool:
        """Return whether lines of a text can be gone to: it is neither compressed nor converted."""
        if self.path == STDIN or self.path.suffix.lower() in COMPRESSIONS:
            return False
        with self.open() as stream:
            return stream.seekable() and self._transcoded(stream) is stream

    def lines(self, start: Mark | None = None) -> Generator[tuple[int, list[bytes]], None, None]:
        """Yield lines, with their ends, as many as are there, and the number of the first of them, from 1.

        Args:
            start: where to begin; None for the first line.

        Raises:
            InputError: the file is in an encoding that must be named, or a line is too long.
        """
        with self.open() as stream:
            number, source = 1, self._transcoded(stream)
            if start is not None and start.offset:
                number += start.num_lines
                stream.seek(start.offset)
            begin: list[bytes] = []  # of a line whose end has not come
            while True:
                # What is there, not all of a chunk: whoever writes into a pipe may write no more for long.
                data = source.read1(_CHUNK)
                end = data.rfind(b"\n") + 1
                lines = io.BytesIO(b"".join([*begin, data[:end]])).readlines() if end or not data else []
                begin = [data[end:]] if end else [*begin, data]
                # A file without line ends must not fill the memory.
                if max(len(lines[0]) if lines else 0, sum(map(len, begin))) > _MAX_LINE:
                    raise InputError(
                        f"{self.name}: line {number} is longer than {_MAX_LINE >> 20} MiB",
                        "Split it: a record is read as a whole. Is it a text file, with line ends?",
                    )
                if lines:
                    if number == 1:
                        lines[0] = self._without_mark(lines[0])
                    yield number, lines
                    number += len(lines)
                if not data:
                    return

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
        text = line.removeprefix(codecs.BOM_UTF8) if self._encoding == "utf-8" else line
        self.num_skipped = len(line) - len(text)
        return text

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
    """A text in UTF-8, whatever its encoding."""

    def __init__(self, file: InputFile, stream: Any, encoding: str) -> None:
        self._file = file
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def read1(self, size: int) -> bytes:
        """Return some bytes, none at the end."""
        while True:
            data = self._stream.read1(size)
            try:
                text = self._decoder.decode(data, not data)
            except UnicodeError as error:
                raise self._file.broken(error) from error
            if text or not data:
                return text.encode("utf-8", "surrogatepass")


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
