"""A machine for the kernels' code that runs it over this process's own memory, thread by thread.

Every load and store is checked: aligned to its size and inside of a tensor of the call.
"""

from __future__ import annotations

import bisect
import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch

from asyncdp._kernels import bodies, cuda, plan

_DTYPES = {"int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64}
_DTYPES |= {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
_HIGHEST = 1 << 64


class CpuMachine:
    """Walks a kernel over all its blocks and threads; `num_wide` counts accesses of a whole vector."""

    def __init__(self) -> None:
        self.index = (0, 0)
        self.num_wide = 0
        self.allowed: list[tuple[int, int]] = []

    def allow(self, address: int, size: int) -> None:
        """Let kernels touch these bytes; all others are forbidden."""
        bisect.insort(self.allowed, (address, address + size))

    def view(self, address: int, dtype: type[np.generic], count: int) -> np.ndarray:
        """Return the memory at an address as an array, after checking that kernels may touch it."""
        size = np.dtype(dtype).itemsize * count
        assert address % size == 0, f"{size} bytes at {address:#x} are not aligned"
        place = bisect.bisect_right(self.allowed, (address, _HIGHEST))
        # From the nearest on: ranges may lie within others.
        inside = any(address + size <= self.allowed[each][1] for each in range(place - 1, -1, -1))
        assert inside, f"{size} bytes at {address:#x} lie outside of every tensor"
        self.num_wide += size == bodies.VECTOR_BYTES
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype, count)

    def access(self, dtype, count, wide=None):
        """Make a load and a store of `count` numbers, held as `wide` while they are added."""

        def store(address, values):
            self.view(address, dtype, count)[:] = np.asarray(values).astype(dtype)

        return (lambda address: self.view(address, dtype, count).astype(wide or dtype)), store

    def bfloat16_access(self, count):
        """Make a load and a store of bfloat16, which NumPy does not know; torch rounds them."""

        def store(address, values):
            rounded = torch.from_numpy(np.asarray(values)).to(torch.bfloat16)
            self.view(address, np.int16, count)[:] = rounded.view(torch.int16).numpy()

        def load(address):
            return (self.view(address, np.uint16, count).astype(np.uint32) << 16).view(np.float32)

        return load, store

    def operations(self, name: str) -> SimpleNamespace:
        """Return what `bodies` asks of a machine, for one dtype."""
        dtype = np.dtype(_DTYPES.get(name, np.uint8))
        wide = np.float32 if name == "float16" else None
        load, store = self.access(dtype.type, bodies.VECTOR_BYTES // dtype.itemsize, wide)
        load_one, store_one = self.access(dtype.type, 1, wide)
        if name == "bfloat16":
            (load, store), (load_one, store_one) = self.bfloat16_access(8), self.bfloat16_access(1)
        add = np.add
        return SimpleNamespace(
            device=lambda function: function,
            block=lambda: self.index[0],
            thread=lambda: self.index[1],
            read=lambda address: int(self.view(address, np.int64, 1)[0]),
            divide=lambda a, b: self.narrow(a) // self.narrow(b),
            multiply=lambda a, b: self.narrow(a) * self.narrow(b),
            units=[(unit, self.access(np.uint8, unit)) for unit in (16, 8, 4, 2, 1)],
            itemsize=dtype.itemsize,
            load_vector=load,
            add_vectors=add,
            store_vector=store,
            load_scalar=load_one,
            add_scalars=add,
            store_scalar=store_one,
        )

    def narrow(self, number: int) -> int:
        """Check that a number fits the 32 bits the device has for it."""
        assert 0 <= number < 1 << 32
        return number

    def run(self, name: str, num_tiles: int, *arguments: int) -> None:
        """Run a kernel as a launch would, one thread after the other."""
        if name == "copy":
            kernel = bodies.make_copy(self.operations("uint8"))
        else:
            kernel = bodies.make_reduce_add(self.operations(name.removeprefix("reduce_add_")))
        for block in range(num_tiles):
            for thread in range(bodies.THREADS):
                self.index = (block, thread)
                with np.errstate(over="ignore"):
                    kernel(*arguments)


def install(monkeypatch) -> CpuMachine:
    """Make `asyncdp._kernels.cuda` work on CPU tensors, through a machine of this kind."""
    machine = CpuMachine()
    sum_table, copy_table = plan.sum_table, plan.copy_table

    def watched_sum_table(numels, addresses, itemsize):
        for numel, row in zip(numels, addresses, strict=True):
            for address in row:
                machine.allow(address, numel * itemsize)
        return sum_table(numels, addresses, itemsize)

    def watched_copy_table(copies):
        copies = list(copies)
        for copy in copies:
            for row in range(copy.num_rows):
                machine.allow(copy.target + row * copy.target_pitch, copy.width)
                machine.allow(copy.source + row * copy.source_pitch, copy.width)
        return copy_table(copies)

    def run(kernel, destination, table, *arguments):
        if table.num_tiles:
            rows = table.rows
            machine.allow(rows.ctypes.data, rows.nbytes)
            machine.run(kernel, table.num_tiles, rows.ctypes.data, len(rows), *arguments)

    monkeypatch.setattr(plan, "sum_table", watched_sum_table)
    monkeypatch.setattr(plan, "copy_table", watched_copy_table)
    monkeypatch.setattr(cuda, "_run", run)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "with_index", lambda device: device)
    return machine
