"""WebDataset: tar files whose neighbouring members of one name, up to its first dot, are one record."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from ..records import Records
from .base import Contents, InputFile, Reader
from .selection import Selection, Unreadable

_BLOCK = 512


class TarReader(Reader):
    """Every record is a dict: `__key__`, and the contents of its members by what follows the first dot."""

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return nothing: every record has its own members."""
        return Contents()

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Records]:
        """Yield the records; text, numbers, JSON and arrays decoded, all else as bytes."""
        numbers = itertools.count()
        with file.open() as stream:
            members = _members(file, _Ending(stream))
            for key, group in itertools.groupby(members, lambda member: member[0]):
                try:
                    entry: Any = _record(key, [(kind, data) for _, kind, data in group])
                except (ValueError, UnicodeDecodeError) as error:
                    entry = Unreadable(error)
                yield selection.records([entry], [f"{file.name} {key}"], next(numbers))


def _record(key: str, members: list[tuple[str, bytes]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"__key__": key}
    for kind, data in members:
        if kind in entry:
            raise ValueError(f"two of its members are named .{kind}")
        try:
            entry[kind] = _DECODERS.get(kind.rpartition(".")[2].lower(), bytes)(data)
        except (ValueError, RecursionError, EOFError) as error:
            raise ValueError(f"its member .{kind} cannot be decoded: {error}") from error
    return entry


def _members(file: InputFile, stream: Any) -> Iterator[tuple[str, str, bytes]]:
    """Yield the key, the suffixes and the contents of every file in an archive.

    Raises:
        DamagedInputError: the archive is cut or damaged.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                stem, _, kind = path.name.partition(".")
                if not member.isfile() or not stem or not kind:
                    continue
                data = archive.extractfile(member)
                contents = b"" if data is None else data.read()
                if len(contents) != member.size:
                    raise tarfile.ReadError(f"{member.name} is cut short")
                yield str(path.parent / stem), kind, contents
        stream.drain()
    except tarfile.TarError as error:
        raise file.broken(error) from error
    if stream.last_block.strip(b"\0") or len(stream.last_block) < _BLOCK:
        # The library takes an archive that is cut between two members for a whole one.
        raise file.broken("the archive has no end mark")


class _Ending:
    """A stream that knows the last block that was read of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last_block = b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.last_block = (self.last_block + data)[-_BLOCK:]
        return data

    def drain(self) -> None:
        while self.read(1 << 16):
            pass


def _array(data: bytes) -> Any:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "txt": bytes.decode,
    "text": bytes.decode,
    "cls": int,
    "json": lambda data: json.loads(data, parse_constant=_no_constant),
    "npy": _array,
}
