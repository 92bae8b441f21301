"""What a batch that fails leaves behind: no memory, and the right conclusion about its size."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from fake_engine import FakeEngine, options
from torch import nn

from asyncdp import DataParallel
from asyncdp.infer.batching import cut_windows
from asyncdp.infer.pipeline import Pipeline, is_out_of_memory
from asyncdp.infer.records import Records
from asyncdp.infer.report.monitor import Monitor
from asyncdp.infer.steps import EachValue, Steps, default_collate, length_of, same
from tests.notes import Notes

STEPS = Steps(EachValue(same), default_collate, same, length_of)
OPTIONS = {name: options(batch_size=16, shard_size=16, on_error=name) for name in ("skip", "record")}


class Failing(nn.Module):
    """Fails for more rows than it is allowed; notes how many tensors of failed calls live on at each call."""

    def __init__(self, num_rows, error):
        super().__init__()
        self.num_rows = num_rows
        self.error = error
        self.failed = Notes()
        self.num_alive = Notes()

    def forward(self, x):
        self.num_alive.append(sum(tensor() is not None for tensor in self.failed))
        if len(x) <= self.num_rows:
            return x
        held_by_the_frame = torch.zeros(3)
        self.failed.append(weakref.ref(held_by_the_frame))
        try:
            raise ValueError("the cause")
        except ValueError as cause:
            kept = cause  # a frame that holds its own exception is only freed by the garbage collector
            raise self.error from kept


@pytest.fixture
def without_collector():
    """Nothing is freed but by the last reference going, as in a loop too short for the collector to run."""
    gc.disable()
    yield
    gc.enable()


async def run(engine, written, on_error, count=16):
    monitor = Monitor()
    pipeline = Pipeline(
        engine,
        STEPS,
        OPTIONS[on_error],
        lambda index, num_records, rows, failures: written.append((num_records, len(rows), failures)),
        monitor,
    )
    every = range(count)
    records = Records(every, every, [[float(index)] for index in every], [f"row {index}" for index in every])
    await pipeline.run(cut_windows([records], block_size=16, window=16, wanted=lambda block: True))
    return monitor


@pytest.mark.anyio
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyError("no such word")])
async def test_a_failed_batch_is_freed_before_its_halves_run(without_collector, error):
    """What a failing forward had allocated is free again when the next batch starts, so halves can fit."""
    model, written = Failing(2, error), []
    async with DataParallel(model, ["cpu"]) as engine:
        monitor = await run(engine, written, "skip")
    assert written == [(16, 16, [])]
    assert len(model.failed) >= 3
    assert set(model.num_alive) == {0}
    assert monitor.warnings


@pytest.mark.anyio
async def test_a_refused_record_is_freed_but_reported(without_collector):
    """A record that fails alone holds no memory either, and its traceback reaches into the model's code."""
    model, written = Failing(0, KeyError("no such word")), []
    async with DataParallel(model, ["cpu"]) as engine:
        await run(engine, written, "record", count=3)
    ((num_records, num_good, failures),) = written
    assert (num_records, num_good, len(failures)) == (3, 0, 3)
    assert set(model.num_alive) == {0}
    for failure in failures:
        assert "raise self.error from kept" in failure.traceback
        assert "ValueError: the cause" in failure.traceback


def test_running_out_of_memory_is_recognised_on_the_cpu():
    """What torch, Python and numpy raise when there is no memory calls for smaller batches."""
    for allocate in (lambda: torch.empty(10**15), lambda: bytearray(10**18)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.anyio
async def test_the_cpu_running_out_of_memory_lowers_the_batch_size():
    """On a CPU, too, later batches keep the smaller size, and the warning names no record."""

    def forward(x):
        return torch.empty(10**15) if len(x) > 4 else x

    written = []
    monitor = await run(FakeEngine(forward), written, "skip", count=64)
    assert [num_good for _, num_good, _ in written] == [16] * 4
    assert monitor.warnings == [
        "out of memory with 16 records: going on with 8 per batch",
        "out of memory with 8 records: going on with 4 per batch",
    ]
