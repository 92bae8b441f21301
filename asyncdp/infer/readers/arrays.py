"""Rows of `.npy`, `.npz` and safetensors arrays: entry `i` along the first dimension."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from ..records import Row
from .base import Contents, InputFile, Selection

_CHUNK = 256

_Arrays = Mapping[str, Any]
"""Whatever gives rows by `array[begin:end]`, by name."""

_Opener = Callable[[Path], contextlib.AbstractContextManager[tuple[_Arrays, int]]]


class ArrayReader:
    """Reads arrays through `opener`, which gives the arrays and the length that they all have."""

    binary = True

    def __init__(self, opener: _Opener) -> None:
        self._opener = opener

    def inspect(self, file: InputFile) -> Contents:
        """Return the length along the first dimension, and the names; the array of a .npy file is `value`."""
        with self._opened(file) as (arrays, length):
            return Contents(length, list(arrays))

    def rows(self, file: InputFile, selection: Selection, start: int) -> Iterator[Row]:
        """Yield an array per row, or a dict of them when the file holds several."""
        needed = selection.needed
        with self._opened(file) as (arrays, length):
            wanted = {name: array for name, array in arrays.items() if needed is None or name in needed}
            for begin in range(start, length, _CHUNK):
                end = min(begin + _CHUNK, length)
                parts = _read(file, wanted, begin, end)
                for index in range(end - begin):
                    entry: Any = {name: part[index] for name, part in parts.items()}
                    kept = {name: entry[name] for name in selection.keep}
                    if not selection.columns and selection.id_column is None and len(entry) == 1:
                        (entry,) = entry.values()
                    yield _row(selection, entry, f"{file.name} row {begin + index}", kept)

    @contextlib.contextmanager
    def _opened(self, file: InputFile) -> Iterator[tuple[_Arrays, int]]:
        with contextlib.ExitStack() as stack:
            try:
                opened = stack.enter_context(self._opener(file.path))
            except Exception as error:
                # The libraries raise anything from EOFError to BadZipFile on a damaged file, and numpy
                # takes most of them for pickles and advises to load those.
                why = "no array, or pickled objects" if "allow_pickle" in str(error) else error
                raise file.broken(why) from error
            yield opened


def _read(file: InputFile, arrays: _Arrays, begin: int, end: int) -> dict[str, Any]:
    try:
        parts = {name: array[begin:end] for name, array in arrays.items()}
    except Exception as error:  # the end of a compressed array may be the first to be damaged
        raise file.broken(error) from error
    # A copy, so that no record refers to a memory map.
    return {name: np.array(part) if isinstance(part, np.memmap) else part for name, part in parts.items()}


def _row(selection: Selection, entry: Any, where: str, kept: Mapping[str, Any]) -> Row:
    if isinstance(entry, dict) and selection.id_column in entry:
        identity = entry[selection.id_column]
        entry[selection.id_column] = identity if identity.ndim else identity.item()
    return selection.row(entry, where, kept=kept)


def _num_rows(shapes: dict[str, Sequence[int]]) -> int:
    for name, shape in shapes.items():
        if not len(shape):
            raise ValueError(f"array {name!r} has no dimension to take rows from")
    lengths = {name: shape[0] for name, shape in shapes.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"its arrays must have the same first dimension, but have {lengths or 'none'}")
    return next(iter(lengths.values()))


@contextlib.contextmanager
def _npy(path: Path) -> Iterator[tuple[_Arrays, int]]:
    # Unlike np.load this closes the file on failure; it refuses arrays of objects by itself.
    array = np.lib.format.open_memmap(path, mode="r")
    _check_size("it", array.offset + array.nbytes, path.stat().st_size)
    yield {"value": array}, _num_rows({"value": array.shape})


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[tuple[_Arrays, int]]:
    with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise ValueError("two of its arrays have the same name")
        arrays = {name.removesuffix(".npy"): _StoredArray(archive, name, stack) for name in names}
        yield arrays, _num_rows({name: array.shape for name, array in arrays.items()})


def _check_size(what: str, stated: int, found: int) -> None:
    """Fail when there is more behind the array of a header: numpy would leave it unread."""
    if found > stated:
        raise ValueError(f"{what} goes on for {found - stated} bytes behind the array that its header states")


class _StoredArray:
    """One array of an archive, compressed or not, of which only the rows being read are in memory."""

    def __init__(self, archive: zipfile.ZipFile, name: str, stack: contextlib.ExitStack) -> None:
        with archive.open(name) as stream:
            self.shape, by_columns, self._dtype = _header(stream, name)
            self._start = stream.tell()
            stated = self._start + self._dtype.itemsize * math.prod(self.shape)
            _check_size(name, stated, archive.getinfo(name).file_size)
        self._order: Literal["C", "F"] = "F" if by_columns else "C"
        self._open = lambda: stack.enter_context(archive.open(name))
        self._stream: IO[bytes] | None = None
        self._whole: np.ndarray[Any, Any] | None = None

    def __getitem__(self, rows: slice) -> np.ndarray[Any, Any]:
        """Return rows; those before them are read again only when they are asked for out of order."""
        if self._order == "C":
            return self._read(rows.start, rows.stop)
        if self._whole is None:
            self._whole = self._read(0, self.shape[0])  # its rows are scattered over all of it
        return np.array(self._whole[rows])

    def _read(self, begin: int, end: int) -> np.ndarray[Any, Any]:
        row_bytes = self._dtype.itemsize * math.prod(self.shape[1:])
        stream = self._stream = self._stream or self._open()
        if stream.tell() != (first := self._start + begin * row_bytes):
            stream.seek(first)
        # torch warns of arrays that it may not write to, as those on bytes.
        data = bytearray(stream.read((end - begin) * row_bytes))
        return np.ndarray((end - begin, *self.shape[1:]), self._dtype, data, order=self._order)


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in _READ_HEADER:
        raise ValueError(f"{name} is of the unknown version {version}")
    shape, by_columns, dtype = _READ_HEADER[version](stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects")
    return shape, by_columns, dtype


_READ_HEADER: dict[Any, Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[tuple[_Arrays, int]]:
    import safetensors

    # Through torch, since numpy has no bfloat16.
    with safetensors.safe_open(path, framework="pt") as archive:
        arrays = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118
        yield arrays, _num_rows({name: array.get_shape() for name, array in arrays.items()})


NPY = ArrayReader(_npy)
NPZ = ArrayReader(_npz)
SAFETENSORS = ArrayReader(_safetensors)
