"""Rows of `.npy`, `.npz` and safetensors arrays: entry `i` along the first dimension."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from ...errors import InputError
from ..places import on_disk
from ..records import Records
from .base import Contents, InputFile
from .selection import Selection

_CHUNK = 256

_Arrays = Mapping[str, Any]
"""Whatever gives rows by `array[begin:end]`, by name."""

_Opener = Callable[[Path], contextlib.AbstractContextManager[_Arrays]]


class ArrayReader:
    """Reads arrays through `opener`, which gives them by name."""

    binary = True

    def __init__(self, opener: _Opener) -> None:
        self._opener = opener

    def inspect(self, file: InputFile, selection: Selection) -> Contents:
        """Return the length along the first dimension, and the names; the array of a .npy file is `value`."""
        with self._opened(file) as arrays:
            wanted = _wanted(file, arrays, selection)
            unfit = {name: str(array.dtype) for name, array in wanted.items() if not _is_fit(array)}
            return Contents(_num_rows(file, wanted) if wanted else None, list(arrays), unfit)

    def rows(self, file: InputFile, selection: Selection, start: int, stop: int | None) -> Iterator[Records]:
        """Yield an array per row, or a dict of them when the file holds several."""
        with self._opened(file) as arrays:
            wanted = _wanted(file, arrays, selection)
            stop = _num_rows(file, wanted) if stop is None else stop
            identity, chosen = selection.id_column, selection
            if not selection.columns and identity is None and len(wanted) == 1:
                chosen = dataclasses.replace(selection, columns=tuple(wanted))
            for begin in range(start, stop, _CHUNK):
                end = min(begin + _CHUNK, stop)
                parts = {name: list(part) for name, part in _read(file, wanted, begin, end).items()}
                kept = {name: parts[name] for name in selection.keep}
                if identity in parts:
                    parts[identity] = [entry if entry.ndim else entry.item() for entry in parts[identity]]
                where = [f"{file.name} row {number}" for number in range(begin, end)]
                yield chosen.of_columns(parts, where, begin, kept=kept)

    @contextlib.contextmanager
    def _opened(self, file: InputFile) -> Iterator[_Arrays]:
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(on_disk(file.path))
                opened = stack.enter_context(self._opener(path))
            except Exception as error:
                # The libraries raise anything from EOFError to BadZipFile on a damaged file, and numpy
                # takes most of them for pickles and advises to load those.
                if "Python objects" in str(error):
                    raise InputError(f"{file.name} {_OBJECTS[0]}", _OBJECTS[1]) from error
                raise file.broken("no array" if "allow_pickle" in str(error) else error) from error
            yield opened


_OBJECTS = (
    "holds Python objects, which are never loaded",
    "Save numbers or texts, of a dtype other than object.",
)


def _wanted(file: InputFile, arrays: _Arrays, selection: Selection) -> dict[str, Any]:
    """Return the arrays that are needed, which must have no objects."""
    needed = selection.needed
    wanted = {name: array for name, array in arrays.items() if needed is None or name in needed}
    for name, array in wanted.items():
        if getattr(getattr(array, "dtype", None), "hasobject", False):
            raise InputError(f"{file.name}: array {name!r} {_OBJECTS[0]}", _OBJECTS[1])
    return wanted


def _is_fit(array: Any) -> bool:
    """Return whether torch, or a list of texts, can hold the numbers of an array."""
    dtype = getattr(array, "dtype", None)
    if not isinstance(dtype, np.dtype) or dtype.kind in "US":
        return True
    try:
        torch.from_numpy(np.zeros(1, dtype.newbyteorder("=")))
    except TypeError:
        return False
    return dtype != np.uint64  # which torch can store, but not compute with


def _read(file: InputFile, arrays: _Arrays, begin: int, end: int) -> dict[str, Any]:
    try:
        parts = {name: array[begin:end] for name, array in arrays.items()}
    except Exception as error:  # the end of a compressed array may be the first to be damaged
        raise file.broken(error) from error
    # A copy, so that no record refers to a memory map.
    return {name: _native(part) for name, part in parts.items()}


def _native(part: Any) -> Any:
    """Return a copy in memory, in this machine's byte order."""
    if not isinstance(part, np.ndarray):
        return part
    part = np.array(part) if isinstance(part, np.memmap) else part
    return part if part.dtype.isnative else part.astype(part.dtype.newbyteorder("="))


def _num_rows(file: InputFile, arrays: Mapping[str, Any]) -> int:
    shapes = {name: _shape_of(array) for name, array in arrays.items()}
    for name, shape in shapes.items():
        if not len(shape):
            raise InputError(
                f"{file.name}: array {name!r} is a single value and has no dimension to take rows from",
                "Reshape it, or name others with --column.",
            )
    lengths = {name: shape[0] for name, shape in shapes.items()}
    if not lengths:
        raise file.broken("it holds no arrays")
    if len(set(lengths.values())) != 1:
        raise InputError(
            f"{file.name}: its arrays must have the same first dimension, but have {lengths}",
            "Name those that belong together with --column.",
        )
    return int(next(iter(lengths.values())))


def _shape_of(array: Any) -> Sequence[int]:
    shape: Sequence[int] = array.get_shape() if hasattr(array, "get_shape") else array.shape
    return shape


@contextlib.contextmanager
def _npy(path: Path) -> Iterator[_Arrays]:
    # Unlike np.load this closes the file on failure; it refuses arrays of objects by itself.
    array = np.lib.format.open_memmap(path, mode="r")
    _check_size("it", array.offset + array.nbytes, path.stat().st_size)
    yield {"value": array}


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[_Arrays]:
    with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise ValueError("two of its arrays have the same name")
        arrays = {name.removesuffix(".npy"): _StoredArray(archive, name, stack) for name in names}
        yield arrays


def _check_size(what: str, stated: int, found: int) -> None:
    """Fail when there is more behind the array of a header: numpy would leave it unread."""
    if found > stated:
        raise ValueError(f"{what} goes on for {found - stated} bytes behind the array that its header states")


class _StoredArray:
    """One array of an archive, compressed or not, of which only the rows being read are in memory."""

    def __init__(self, archive: zipfile.ZipFile, name: str, stack: contextlib.ExitStack) -> None:
        with archive.open(name) as stream:
            self.shape, by_columns, self.dtype = _header(stream, name)
            self._start = stream.tell()
            stated = self._start + self.dtype.itemsize * math.prod(self.shape)
            if not self.dtype.hasobject:
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
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        stream = self._stream = self._stream or self._open()
        if stream.tell() != (first := self._start + begin * row_bytes):
            stream.seek(first)
        # torch warns of arrays that it may not write to, as those on bytes.
        data = bytearray(stream.read((end - begin) * row_bytes))
        return np.ndarray((end - begin, *self.shape[1:]), self.dtype, data, order=self._order)


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in _READ_HEADER:
        raise ValueError(f"{name} is of the unknown version {version}")
    shape, by_columns, dtype = _READ_HEADER[version](stream)
    return shape, by_columns, dtype


_READ_HEADER: dict[Any, Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[_Arrays]:
    import safetensors

    # Through torch, since numpy has no bfloat16.
    with safetensors.safe_open(path, framework="pt") as archive:
        arrays = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118
        yield arrays


NPY = ArrayReader(_npy)
NPZ = ArrayReader(_npz)
SAFETENSORS = ArrayReader(_safetensors)
