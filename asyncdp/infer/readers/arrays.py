"""Rows of `.npy`, `.npz` and safetensors arrays: entry ``i`` along the first dimension."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..records import Row
from .base import InputFile, Selection

_CHUNK = 256

_Arrays = dict[str, Callable[[int, int], Any]]
_Opener = Callable[[Path], contextlib.AbstractContextManager[tuple[_Arrays, int]]]


class ArrayReader:
    """Reads arrays through ``opener``, which gives a slicing function and a length per array."""

    binary = True

    def __init__(
        self, opener: Callable[[Path], contextlib.AbstractContextManager[tuple[_Arrays, int]]]
    ) -> None:
        self._opener = opener

    def count(self, path: Path) -> int | None:
        """Returns the length along the first dimension."""
        with self._opened(InputFile(path)) as (_, length):
            return length

    def column_names(self, path: Path) -> Sequence[str] | None:
        """Returns the names of the arrays; the one of a .npy file is ``value``."""
        with self._opened(InputFile(path)) as (arrays, _):
            return list(arrays)

    def rows(self, file: InputFile, selection: Selection, start: int) -> Iterator[Row]:
        """Yields an array per row, or a dict of them when the file holds several."""
        with self._opened(file) as (arrays, length):
            for begin in range(start, length, _CHUNK):
                end = min(begin + _CHUNK, length)
                parts = {name: take(begin, end) for name, take in arrays.items()}
                for index in range(end - begin):
                    entry: Any = {name: part[index] for name, part in parts.items()}
                    if not selection.columns and selection.id_column is None and len(entry) == 1:
                        (entry,) = entry.values()
                    yield _row(selection, entry, f"{file.name} row {begin + index}")

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


def _row(selection: Selection, entry: Any, where: str) -> Row:
    if isinstance(entry, dict) and selection.id_column in entry:
        identity = entry[selection.id_column]
        entry[selection.id_column] = identity if identity.ndim else identity.item()
    return selection.row(entry, where)


def _same_length(lengths: dict[str, int]) -> int:
    if len(set(lengths.values())) != 1:
        raise ValueError(f"its arrays must have one same first dimension, but have {lengths or 'none'}")
    return next(iter(lengths.values()))


def _slices(arrays: dict[str, Any]) -> tuple[_Arrays, int]:
    for name, array in arrays.items():
        if array.ndim == 0:
            raise ValueError(f"array {name!r} has no dimension to take rows from")
    length = _same_length({name: len(array) for name, array in arrays.items()})
    return {name: functools.partial(_copy, array) for name, array in arrays.items()}, length


def _copy(array: Any, begin: int, end: int) -> Any:
    # A copy, so that no record keeps a memory map alive.
    return np.array(array[begin:end])


@contextlib.contextmanager
def _npy(path: Path) -> Iterator[tuple[_Arrays, int]]:
    # Unlike np.load this closes the file on failure; it refuses arrays of objects by itself.
    yield _slices({"value": np.lib.format.open_memmap(path, mode="r")})


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[tuple[_Arrays, int]]:
    # numpy leaves a file that it opened itself open when the archive is damaged.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        if not hasattr(archive, "files"):
            raise ValueError("it is no .npz archive")
        yield _slices({name: archive[name] for name in archive.files})


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[tuple[_Arrays, int]]:
    import safetensors

    # Through torch, since numpy has no bfloat16.
    with safetensors.safe_open(path, framework="pt") as archive:
        slices = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118
        shapes = {name: part.get_shape() for name, part in slices.items()}
        if not all(shapes.values()):
            raise ValueError("an array without dimensions has no rows")
        takes: _Arrays = {name: functools.partial(_slice, part) for name, part in slices.items()}
        yield takes, _same_length({name: shape[0] for name, shape in shapes.items()})


def _slice(part: Any, begin: int, end: int) -> Any:
    return part[begin:end]


NPY = ArrayReader(_npy)
NPZ = ArrayReader(_npz)
SAFETENSORS = ArrayReader(_safetensors)
