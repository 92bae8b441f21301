"""The host's side of a launch: the table that a kernel reads, and the number of its blocks.

Pure arithmetic on addresses and sizes, all in bytes unless said otherwise; no torch, no CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bodies import COPY_FIELDS, COPY_TILE_BYTES, RECIPROCAL_BITS, TILE, VECTOR_BYTES

Integers = NDArray[np.int64]

# Rows are not cut into narrower parts: each part ends within a line of memory, which is then read twice.
_LEAST_COLUMNS = 128


@dataclass(frozen=True)
class Table:
    """Rows of 64-bit integers, each headed by its first tile.

    Attributes:
        rows: all rows, of shape (rows, fields). Each has a tile: the search would find an empty row instead
            of its neighbour.
        num_tiles: how many blocks a launch over the table takes.
    """

    rows: Integers
    num_tiles: int


class Copy(NamedTuple):
    """A rectangle of bytes: `num_rows` rows of `width`; a pitch is the distance from row to row."""

    target: int
    source: int
    width: int
    num_rows: int
    target_pitch: int
    source_pitch: int


def sum_table(numels: Sequence[int], addresses: Sequence[Sequence[int]], itemsize: int) -> Table:
    """Plan sums of dense runs of elements.

    Args:
        numels: elements in each run.
        addresses: for each sum its target, then its inputs, as many for each.
        itemsize: of an element.
    """
    numel, address = np.array(numels, np.int64), np.array(addresses, np.int64)
    target = address[:, 0]
    # Vectors can be loaded from every tensor only if all addresses reach a 16-byte boundary together.
    in_step = ((address - target[:, None]) % VECTOR_BYTES == 0).all(axis=1)
    head = np.where(in_step, np.minimum(numel, -target % VECTOR_BYTES // itemsize), numel)
    width = VECTOR_BYTES // itemsize
    num_vectors = (numel - head) // width
    num_scalars = numel - num_vectors * width
    num_tiles = -(-num_vectors // TILE) - (-num_scalars // TILE)
    return _table(num_tiles, np.column_stack((num_vectors, num_scalars, head, address)))


def copy_table(copies: Iterable[Copy]) -> Table:
    """Plan copies of rectangles."""
    tiled = [each for copy in copies for piece in _aligned_pieces(copy) for each in _in_tiles(piece)]
    rows = np.array(tiled, np.int64).reshape(len(tiled), COPY_FIELDS)
    return _table(rows[:, 0], rows[:, 1:])


def reciprocal(divisor: int) -> int:
    """Return `r` such that `(i * r) >> RECIPROCAL_BITS` is `i // divisor`, for numbers up to a tile's."""
    return (1 << RECIPROCAL_BITS) // divisor + 1


def _table(num_tiles: Integers, fields: Integers) -> Table:
    rows = np.column_stack((np.cumsum(num_tiles) - num_tiles, fields))[num_tiles > 0]
    return Table(np.ascontiguousarray(rows), int(num_tiles.sum()))


def _aligned_pieces(copy: Copy) -> list[Copy]:
    """Join rows that are adjacent in memory, and cut that row so that its middle lies between boundaries."""
    target, source, width, num_rows, target_pitch, source_pitch = copy
    if num_rows > 1 and target_pitch == source_pitch == width:
        width, num_rows = width * num_rows, 1
    if num_rows != 1:
        return [copy]
    # Addresses whose distance is a multiple of the unit reach its boundaries together.
    unit = _unit(target - source)
    head = min(width, -target % unit)
    body = head + (width - head) // unit * unit
    cuts = ((0, head), (head, body), (body, width))
    return [Copy(target + start, source + start, stop - start, 1, 0, 0) for start, stop in cuts]


def _in_tiles(copy: Copy) -> list[tuple[int, ...]]:
    """Return the copy's row of the table headed by its number of tiles, or nothing for an empty copy."""
    target, source, width, num_rows, target_pitch, source_pitch = copy
    if not width or not num_rows:
        return []
    unit = _unit(target | source | width | target_pitch | source_pitch)
    columns = width // unit
    column_tiles, tile_columns, tile_rows = _tile_shape(columns, COPY_TILE_BYTES // unit)
    num_tiles = column_tiles * -(-num_rows // tile_rows)
    shape = (unit, target, source, columns, num_rows, target_pitch, source_pitch)
    return [(num_tiles, *shape, tile_rows, tile_columns, column_tiles, reciprocal(tile_columns))]


def _tile_shape(columns: int, tile_units: int) -> tuple[int, int, int]:
    """Cut rows of `columns` into equal parts, so that tiles of several rows leave few of their units unused.

    Returns:
        the number of tiles in a row, then the columns and the rows of a tile.
    """

    def shape(num_parts: int) -> tuple[int, int, int]:
        tile_columns = -(-columns // num_parts)
        return -(-columns // tile_columns), tile_columns, tile_units // tile_columns

    fewest = -(-columns // tile_units)
    most = max(fewest, min(fewest + 3, columns // _LEAST_COLUMNS))
    # The best shape uses the most units of a tile on average.
    return max(map(shape, range(fewest, most + 1)), key=lambda found: columns / found[0] * found[2])


def _unit(bits: int) -> int:
    """Return the widest unit, 16 bytes at most, that divides every number or-ed into `bits`."""
    lowest = bits & -bits
    return min(lowest, VECTOR_BYTES) if lowest else VECTOR_BYTES
