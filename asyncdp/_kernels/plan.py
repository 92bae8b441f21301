"""Host side of a launch: the table a kernel reads and how many blocks it takes.

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

# A row is cut into no narrower parts than this, to save idle threads: every part ends amid a line of memory.
_LEAST_COLUMNS = 128


@dataclass(frozen=True)
class Table:
    """Rows of 64-bit integers, each headed by its first tile.

    Attributes:
        rows: all rows, of shape (rows, fields). None is without a tile, which would hide its neighbour.
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

    def back(self) -> Copy:
        """Return the copy from the target to the source."""
        return Copy(self.source, self.target, self.width, self.num_rows, self.source_pitch, self.target_pitch)


def sum_table(numels: Sequence[int], addresses: Sequence[Sequence[int]], itemsize: int) -> Table:
    """Plan sums of dense runs of elements.

    Args:
        numels: elements in each run.
        addresses: for each sum its target, then its inputs, as many for each.
        itemsize: of an element.
    """
    numel, address = np.array(numels, np.int64), np.array(addresses, np.int64)
    target = address[:, 0]
    # Only where all addresses reach a 16-byte boundary together can vectors be loaded from each.
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
    """Return `r` such that `(i * r) >> RECIPROCAL_BITS` is `i // divisor` for any two of one tile."""
    return (1 << RECIPROCAL_BITS) // divisor + 1


def _table(num_tiles: Integers, fields: Integers) -> Table:
    rows = np.column_stack((np.cumsum(num_tiles) - num_tiles, fields))[num_tiles > 0]
    return Table(np.ascontiguousarray(rows), int(num_tiles.sum()))


def _aligned_pieces(copy: Copy) -> list[Copy]:
    """Make one row of what is one in memory, and cut it so that its middle starts and ends on a boundary."""
    target, source, width, num_rows, target_pitch, source_pitch = copy
    if num_rows > 1 and target_pitch == source_pitch == width:
        width, num_rows = width * num_rows, 1
    if num_rows != 1:
        return [copy]
    # Addresses as far apart as a multiple of the unit reach its boundaries together.
    unit = _unit(target - source)
    head = min(width, -target % unit)
    body = head + (width - head) // unit * unit
    cuts = ((0, head), (head, body), (body, width))
    return [Copy(target + start, source + start, stop - start, 1, 0, 0) for start, stop in cuts]


def _in_tiles(copy: Copy) -> list[tuple[int, ...]]:
    """Return a row of the copy's table with its number of tiles in front, or nothing for an empty copy."""
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
        How many tiles make a row, and how many columns and rows a tile has.
    """

    def shape(num_parts: int) -> tuple[int, int, int]:
        tile_columns = -(-columns // num_parts)
        return -(-columns // tile_columns), tile_columns, tile_units // tile_columns

    fewest = -(-columns // tile_units)
    most = max(fewest, min(fewest + 3, columns // _LEAST_COLUMNS))
    # By the units that a tile uses on average.
    return max(map(shape, range(fewest, most + 1)), key=lambda found: columns / found[0] * found[2])


def _unit(bits: int) -> int:
    """Return the widest unit, 16 bytes at most, that divides every number or-ed into `bits`."""
    lowest = bits & -bits
    return min(lowest, VECTOR_BYTES) if lowest else VECTOR_BYTES
