"""Host side of a launch: the table a kernel reads and how many blocks it takes.

Pure arithmetic on addresses and sizes, all in bytes unless said otherwise; no torch, no CUDA.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from .bodies import RECIPROCAL_BITS, TILE, VECTOR_BYTES


@dataclass
class Table:
    """Rows of 64-bit integers, each headed by its first tile.

    Attributes:
        values: all rows, one after the other.
        num_rows: how many rows there are.
        num_tiles: how many blocks a launch over the table takes.
    """

    values: array[int] = field(default_factory=lambda: array("q"))
    num_rows: int = 0
    num_tiles: int = 0

    def add(self, num_tiles: int, fields: Sequence[int]) -> None:
        """Append a row of `num_tiles` tiles; one without tiles would hide its neighbour, and is left out."""
        if num_tiles:
            self.values.append(self.num_tiles)
            self.values.extend(fields)
            self.num_rows += 1
            self.num_tiles += num_tiles


def add_sum(table: Table, numel: int, itemsize: int, target: int, sources: Sequence[int]) -> None:
    """Append the sum of `sources` into `target`, dense runs of `numel` elements at these addresses."""
    phases = {address % VECTOR_BYTES for address in (target, *sources)}
    # Only where all addresses reach a 16-byte boundary together can vectors be loaded from each.
    head = min(numel, -target % VECTOR_BYTES // itemsize) if len(phases) == 1 else numel
    width = VECTOR_BYTES // itemsize
    num_vectors = (numel - head) // width
    num_scalars = numel - num_vectors * width
    num_tiles = _tiles(num_vectors) + _tiles(num_scalars)
    table.add(num_tiles, (num_vectors, num_scalars, head, target, *sources))


def add_copy(
    table: Table, target: int, source: int, width: int, num_rows: int, target_pitch: int, source_pitch: int
) -> None:
    """Append a copy of `num_rows` rows of `width` bytes; a pitch is the distance from row to row."""
    if num_rows > 1 and target_pitch == source_pitch == width:
        width, num_rows = width * num_rows, 1
    if num_rows != 1:
        unit = _unit(target | source | width | target_pitch | source_pitch)
        _add_rows(table, unit, target, source, width, num_rows, target_pitch, source_pitch)
        return
    # Addresses as far apart as a multiple of the unit reach its boundaries together.
    unit = _unit(target - source)
    head = min(width, -target % unit)
    body = head + (width - head) // unit * unit
    for start, stop in ((0, head), (head, body), (body, width)):
        length = stop - start
        piece = _unit((target + start) | (source + start) | length)
        _add_rows(table, piece, target + start, source + start, length, 1, 0, 0)


def _add_rows(
    table: Table,
    unit: int,
    target: int,
    source: int,
    width: int,
    num_rows: int,
    target_pitch: int,
    source_pitch: int,
) -> None:
    columns = width // unit
    if not columns or not num_rows:
        return
    tile_columns = min(columns, TILE)
    tile_rows = TILE // tile_columns
    column_tiles = -(-columns // tile_columns)
    num_tiles = column_tiles * -(-num_rows // tile_rows)
    fields = (unit, target, source, columns, num_rows, target_pitch, source_pitch)
    table.add(num_tiles, (*fields, tile_rows, tile_columns, column_tiles, reciprocal(tile_columns)))


def reciprocal(divisor: int) -> int:
    """Return `r` such that `(i * r) >> RECIPROCAL_BITS` is `i // divisor` for every `i` below `TILE`."""
    return (1 << RECIPROCAL_BITS) // divisor + 1


def _tiles(count: int) -> int:
    return -(-count // TILE)


def _unit(bits: int) -> int:
    """Return the widest unit, 16 bytes at most, that divides every number or-ed into `bits`."""
    lowest = bits & -bits
    return min(lowest, VECTOR_BYTES) if lowest else VECTOR_BYTES
