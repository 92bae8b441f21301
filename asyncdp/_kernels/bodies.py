"""The code of the kernels, in plain Python over a small machine.

A machine provides the block and thread index, loads, stores and additions. `source` provides CUDA's machine,
with which Numba compiles the code; the tests provide one that runs it over ordinary memory, so that every
address is checked without a GPU. Tables are rows of 64-bit integers, laid out by `plan`.

All addresses and offsets are in bytes; a vector is 16 bytes, the widest load there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VECTOR_BYTES = 16
THREADS = 256
# Four loads in flight in every thread hide the latency of memory at half occupancy.
UNROLL = 4
TILE = THREADS * UNROLL
# A tile of a copy has this many bytes whatever its unit: with fewer, a block would spend most of its time on
# finding its row.
COPY_TILE_BYTES = TILE * VECTOR_BYTES

# Enough to divide any index of a tile exactly; not 32, so that the reciprocal of 1 fits 32 bits.
RECIPROCAL_BITS = 31

# Fields of a reduce-add row; the addresses of the inputs follow.
NUM_VECTORS, NUM_SCALARS, HEAD, SUM, SOURCES = 1, 2, 3, 4, 5

# Fields of a copy row. Widths and columns count units, pitches bytes.
(
    UNIT,
    TARGET,
    SOURCE,
    WIDTH,
    NUM_ROWS,
    TARGET_PITCH,
    SOURCE_PITCH,
    TILE_ROWS,
    TILE_COLUMNS,
    COLUMN_TILES,
    RECIPROCAL,
    COPY_FIELDS,
) = range(1, 13)


def add_packed(a, b, signs):  # type: ignore[no-untyped-def]
    """Add the small integers packed into two words; `signs` has the top bit of each set.

    The top bits are added without carry, so that no sum overflows into its neighbour.
    """
    return ((a & ~signs) + (b & ~signs)) ^ ((a ^ b) & signs)


def make_find_row(machine: Any) -> Callable[..., int]:
    """Make the search for the row a tile belongs to; field 0 of a row is its first tile."""
    read = machine.read

    def find_row(table, num_rows, row_bytes, tile):  # type: ignore[no-untyped-def]
        low, high = 0, num_rows
        while high - low > 1:
            middle = (low + high) >> 1
            if read(table + middle * row_bytes) <= tile:
                low = middle
            else:
                high = middle
        return table + low * row_bytes

    return find_row


def make_reduce_add(machine: Any) -> Callable[[int, int, int], None]:
    """Make `reduce_add(table, num_rows, num_inputs)`: one block sums one tile of one row's tensors."""
    block, thread, read = machine.block, machine.thread, machine.read
    itemsize, width = machine.itemsize, VECTOR_BYTES // machine.itemsize
    find_row = machine.device(make_find_row(machine))
    sum_four = machine.device(_make_sum_four(machine))
    sum_vector = machine.device(
        _make_sum_one(machine, machine.load_vector, machine.add_vectors, machine.store_vector)
    )
    sum_scalar = machine.device(
        _make_sum_one(machine, machine.load_scalar, machine.add_scalars, machine.store_scalar)
    )

    def reduce_add(table, num_rows, num_inputs):  # type: ignore[no-untyped-def]
        row = find_row(table, num_rows, (SOURCES + num_inputs) * 8, block())
        num_vectors = read(row + NUM_VECTORS * 8)
        head = read(row + HEAD * 8)
        index = (block() - read(row)) * TILE + thread()
        # Tiles of vectors come first, all full except the last; tiles of scalars follow.
        scalars_from = (num_vectors + TILE - 1) & -TILE
        if index < scalars_from:
            offset = head * itemsize + index * VECTOR_BYTES
            if index + (UNROLL - 1) * THREADS < num_vectors:
                sum_four(row, num_inputs, offset)
            else:
                while index < num_vectors:
                    sum_vector(row, num_inputs, offset)
                    offset += THREADS * VECTOR_BYTES
                    index += THREADS
        else:
            index -= scalars_from
            end = min(index + TILE, read(row + NUM_SCALARS * 8))
            while index < end:
                element = index if index < head else index + num_vectors * width
                sum_scalar(row, num_inputs, element * itemsize)
                index += THREADS

    return reduce_add


def _make_sum_four(machine: Any) -> Callable[[int, int, int], None]:
    read, load, add, store = machine.read, machine.load_vector, machine.add_vectors, machine.store_vector
    step = THREADS * VECTOR_BYTES

    def sum_four(row, num_inputs, offset):  # type: ignore[no-untyped-def]
        entry = row + SOURCES * 8
        end = entry + num_inputs * 8
        source = read(entry) + offset
        a, b = load(source), load(source + step)
        c, d = load(source + 2 * step), load(source + 3 * step)
        entry += 8
        while entry < end:
            source = read(entry) + offset
            e, f = load(source), load(source + step)
            g, h = load(source + 2 * step), load(source + 3 * step)
            a, b, c, d = add(a, e), add(b, f), add(c, g), add(d, h)
            entry += 8
        target = read(row + SUM * 8) + offset
        store(target, a)
        store(target + step, b)
        store(target + 2 * step, c)
        store(target + 3 * step, d)

    return sum_four


def _make_sum_one(machine: Any, load: Any, add: Any, store: Any) -> Callable[[int, int, int], None]:
    read = machine.read

    def sum_one(row, num_inputs, offset):  # type: ignore[no-untyped-def]
        entry = row + SOURCES * 8
        end = entry + num_inputs * 8
        total = load(read(entry) + offset)
        entry += 8
        while entry < end:
            total = add(total, load(read(entry) + offset))
            entry += 8
        store(read(row + SUM * 8) + offset, total)

    return sum_one


def make_copy(machine: Any) -> Callable[[int, int], None]:
    """Make `copy(table, num_rows)`: one block copies one tile of a two-dimensional run of units."""
    block, read, divide = machine.block, machine.read, machine.divide
    find_row = machine.device(make_find_row(machine))
    copy_16, copy_8, copy_4, copy_2, copy_1 = (
        machine.device(_make_copy_tile(machine, load, store, unit)) for unit, (load, store) in machine.units
    )

    def copy(table, num_rows):  # type: ignore[no-untyped-def]
        row = find_row(table, num_rows, COPY_FIELDS * 8, block())
        tile = block() - read(row)
        column_tiles = read(row + COLUMN_TILES * 8)
        tile_row = divide(tile, column_tiles)
        tile_column = tile - tile_row * column_tiles
        unit = read(row + UNIT * 8)
        if unit == 16:
            copy_16(row, tile_row, tile_column)
        elif unit == 8:
            copy_8(row, tile_row, tile_column)
        elif unit == 4:
            copy_4(row, tile_row, tile_column)
        elif unit == 2:
            copy_2(row, tile_row, tile_column)
        else:
            copy_1(row, tile_row, tile_column)

    return copy


def make_offset(machine: Any, unit: int) -> Callable[..., int]:
    """Make the function from a thread's index to its byte offset in a tile; -1 outside of the tile."""
    multiply = machine.multiply

    def offset(index, reciprocal, tile_columns, num_rows, num_columns, pitch):  # type: ignore[no-untyped-def]
        # Multiplying by the reciprocal divides by tile_columns, exactly for every index of a tile.
        row = multiply(index, reciprocal) >> RECIPROCAL_BITS
        column = index - multiply(row, tile_columns)
        return row * pitch + column * unit if row < num_rows and column < num_columns else -1

    return offset


def _make_copy_tile(machine: Any, load: Any, store: Any, unit: int) -> Callable[[int, int, int], None]:
    thread, read = machine.thread, machine.read
    offset = machine.device(make_offset(machine, unit))

    def load_four(source, i, reciprocal, columns, num_rows, num_columns, pitch):  # type: ignore[no-untyped-def]
        # A thread outside of the tile reads the tile's first unit, to keep branches from between the loads.
        a = load(source + max(offset(i, reciprocal, columns, num_rows, num_columns, pitch), 0))
        i += THREADS
        b = load(source + max(offset(i, reciprocal, columns, num_rows, num_columns, pitch), 0))
        i += THREADS
        c = load(source + max(offset(i, reciprocal, columns, num_rows, num_columns, pitch), 0))
        i += THREADS
        d = load(source + max(offset(i, reciprocal, columns, num_rows, num_columns, pitch), 0))
        return a, b, c, d

    def store_four(target, values, i, reciprocal, columns, num_rows, num_columns, pitch):  # type: ignore[no-untyped-def]
        at = offset(i, reciprocal, columns, num_rows, num_columns, pitch)
        if at >= 0:
            store(target + at, values[0])
        at = offset(i + THREADS, reciprocal, columns, num_rows, num_columns, pitch)
        if at >= 0:
            store(target + at, values[1])
        at = offset(i + 2 * THREADS, reciprocal, columns, num_rows, num_columns, pitch)
        if at >= 0:
            store(target + at, values[2])
        at = offset(i + 3 * THREADS, reciprocal, columns, num_rows, num_columns, pitch)
        if at >= 0:
            store(target + at, values[3])

    load_four, store_four = machine.device(load_four), machine.device(store_four)

    def copy_tile(row, tile_row, tile_column):  # type: ignore[no-untyped-def]
        reciprocal, columns = read(row + RECIPROCAL * 8), read(row + TILE_COLUMNS * 8)
        to_pitch, from_pitch = read(row + TARGET_PITCH * 8), read(row + SOURCE_PITCH * 8)
        first_row, first_column = tile_row * read(row + TILE_ROWS * 8), tile_column * columns
        num_rows = min(read(row + TILE_ROWS * 8), read(row + NUM_ROWS * 8) - first_row)
        num_columns = min(columns, read(row + WIDTH * 8) - first_column)
        target = read(row + TARGET * 8) + first_row * to_pitch + first_column * unit
        source = read(row + SOURCE * 8) + first_row * from_pitch + first_column * unit
        i, end = thread(), num_rows * columns
        while i < end:
            # Loads before stores: all four are in flight together.
            values = load_four(source, i, reciprocal, columns, num_rows, num_columns, from_pitch)
            store_four(target, values, i, reciprocal, columns, num_rows, num_columns, to_pitch)
            i += TILE

    return copy_tile
