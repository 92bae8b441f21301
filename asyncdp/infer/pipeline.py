"""Read, prepare, run on the lanes, write: four stages joined by short queues.

Every queue is bounded, so a slow stage makes the ones before it wait, and memory does not grow with the
input.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import anyio
import anyio.to_process
import anyio.to_thread
import torch
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ..errors import AsyncDPError, RecordError, TooManyBadRecordsError
from .batching import Window, padding, plan_batches
from .blocks import Batch, BlockRows, OpenBlock
from .options import InferOptions
from .records import Failure, Record, Records
from .report.events import Report, ShardFinished, ignore
from .report.monitor import Monitor, SlowBatch
from .steps import Steps, arguments_of, check_texts, to_columns, with_kept
from .task_groups import plain_task_group

# Two batches per lane: one runs while the next one waits right behind it.
_BATCHES_PER_LANE = 2


class Engine(Protocol):
    """What the pipeline needs of `asyncdp.DataParallel`."""

    @property
    def runtime(self) -> Any:
        """The runtime, whose lanes are counted."""

    async def on_one_lane(self, *args: Any, **kwargs: Any) -> Any:
        """Run one batch on one lane."""


_Refused = tuple[Record, Exception]
Windows = Generator[Window, None, None]
WriteBlock = Callable[[int, int, BlockRows, list[Failure]], None]


class Pipeline:
    """Runs all windows of an input through an engine and hands finished blocks to a writer.

    Args:
        engine: runs the batches.
        steps: the functions around the model.
        options: sizes of batches and blocks, workers, and what to do with refused records.
        write_block: called in a worker thread, one block at a time.
        monitor: counts what happens.
        report: gets an event for every block that was written.
    """

    def __init__(
        self,
        engine: Engine,
        steps: Steps,
        options: InferOptions,
        write_block: WriteBlock,
        monitor: Monitor,
        report: Report = ignore,
    ) -> None:
        self._engine = engine
        self._steps = steps
        self._options = options
        self._write_block = write_block
        self._monitor = monitor
        self._report = report
        self._batch_size = options.batch_size
        self._open: dict[int, OpenBlock] = {}

    async def run(self, windows: Windows, *, abandon_reads: bool = False) -> None:
        """Run all windows.

        Args:
            windows: read in a worker thread; closed at the end.
            abandon_reads: whether a cancellation leaves a read behind that may never end, as from a
                terminal, instead of waiting for it.

        Raises:
            RecordError: a record was refused and the options say to stop.
            TooManyBadRecordsError: more records were refused than allowed.
            JobError: an input, the outputs' shape or the disk does not let the job go on.
        """
        num_lanes = len(self._engine.runtime.lanes)
        to_prepare, windows_in = anyio.create_memory_object_stream[Window](1)
        to_run, batches_in = anyio.create_memory_object_stream[Batch](num_lanes)
        self._to_write, blocks_in = anyio.create_memory_object_stream[OpenBlock](0)
        async with plain_task_group() as group:
            group.start_soon(self._read, windows, to_prepare, abandon_reads)
            group.start_soon(self._write, blocks_in)
            async with self._to_write, anyio.create_task_group() as stages:
                for _ in range(self._options.workers):
                    stages.start_soon(self._prepare, windows_in.clone(), to_run.clone())
                for _ in range(num_lanes * _BATCHES_PER_LANE):
                    stages.start_soon(self._run_batches, batches_in.clone())
                # Only the clones are left, so each stage ends when the one before it has.
                for stream in (windows_in, to_run, batches_in):
                    stream.close()
        assert not self._open, "every block that was read has been written"

    def failures_left(self) -> list[Failure]:
        """Return the refused records of the blocks that were not written, after a run that failed."""
        return [failure for block in self._open.values() for failure in block.failures]

    async def _read(self, windows: Windows, out: MemoryObjectSendStream[Window], abandon: bool) -> None:
        read = functools.partial(anyio.to_thread.run_sync, self._next, windows, abandon_on_cancel=abandon)
        async with out:
            try:
                while (window := await read()) is not None:
                    await out.send(window)
            finally:
                if not abandon:
                    windows.close()  # and with it the file that is being read

    def _next(self, windows: Windows) -> Window | None:
        with self._monitor.timed("read"):
            return next(windows, None)

    async def _prepare(
        self, windows: MemoryObjectReceiveStream[Window], out: MemoryObjectSendStream[Batch]
    ) -> None:
        async with windows, out:
            async for window in windows:
                batches, failures = await self._prepare_window(window)
                block = self._open.setdefault(window.block, self._new_block(window.block))
                block.size = window.block_size if window.block_size is not None else block.size
                for record, error in failures:
                    self._refuse(block, record, error)
                await self._finish_if_complete(block)
                for batch in batches:
                    await out.send(batch)

    def _new_block(self, index: int) -> OpenBlock:
        in_order = self._options.order == "input"
        return OpenBlock(index, BlockRows(index * self._options.shard_size if in_order else None))

    async def _prepare_window(self, window: Window) -> tuple[list[Batch], list[_Refused]]:
        readable, unreadable = _without_errors(window.records)
        with self._monitor.timed("preprocess"):
            records, items, failures = await self._preprocess(readable)
        costs = self._steps.costs(items)
        whole = Batch(window.block, records, items, costs)
        plan = plan_batches(costs, self._batch_size, self._options.max_batch_cost)
        return [whole.pick(indices) for indices in plan], unreadable + failures

    async def _preprocess(self, records: Records) -> tuple[Records, list[Any], list[_Refused]]:
        """Prepare all records at once, or one by one when that fails, to find those at fault.

        Returns:
            The records that were not refused, their items, and the refused ones.
        """
        try:
            return records, await self._call_preprocess(records.values), []
        except Exception as error:
            if len(records) == 1:
                return records.pick(range(0)), [], [(records[0], error)]
        good: list[int] = []
        items: list[Any] = []
        failures: list[_Refused] = []
        for index in range(len(records)):
            _, made, failed = await self._preprocess(records.pick(range(index, index + 1)))
            good += [index] * len(made)
            items += made
            failures += failed
        return records.pick(good), items, failures

    async def _call_preprocess(self, values: Sequence[Any]) -> list[Any]:
        if not len(values):
            return []
        workers = anyio.to_process if self._options.worker_processes else anyio.to_thread
        items: list[Any] = await workers.run_sync(self._steps.preprocess, values)
        if len(items) != len(values):
            raise ValueError(f"preprocessing gave {len(items)} items for {len(values)} records")
        return items

    async def _run_batches(self, batches: MemoryObjectReceiveStream[Batch]) -> None:
        async with batches:
            async for batch in batches:
                await self._run_batch(batch)

    async def _run_batch(self, batch: Batch) -> None:
        """Run a batch; one that fails is halved until the record at fault is alone."""
        size = len(batch.items)
        if size <= self._batch_size and (await self._succeeds(batch) or size == 1):
            await self._finish_if_complete(self._open[batch.block])
        else:
            await self._run_batch(batch.pick(range(size // 2)))
            await self._run_batch(batch.pick(range(size // 2, size)))

    async def _succeeds(self, batch: Batch) -> bool:
        """Run and count a batch; a failure is recorded, and freed, before anything else runs."""
        try:
            args, kwargs = await anyio.to_thread.run_sync(self._collate, batch)
            start = time.perf_counter()
            output = await self._engine.on_one_lane(*args, **kwargs)
            seconds = time.perf_counter() - start
            num_tokens = await anyio.to_thread.run_sync(self._store, output, batch)
        except AsyncDPError:
            raise  # no record is at fault: a lane is lost, or the outputs are no rows
        except Exception as error:
            if len(batch.items) == 1:
                self._refuse(self._open[batch.block], batch.records[0], error)
            else:
                self._adapt(len(batch.items), error)
            drop_tracebacks(error)
            return False
        self._monitor.num_tokens += num_tokens
        self._count(batch, seconds)
        return True

    def _adapt(self, size: int, error: Exception) -> None:
        """Warn that a batch will be halved; lower the batch size when memory was short."""
        if not is_out_of_memory(error):
            name = type(error).__name__
            self._monitor.warn_once(f"a batch failed with {name}: halving it to find the record at fault")
        elif size // 2 < self._batch_size:
            self._batch_size = size // 2
            self._monitor.warn_once(f"out of memory with {size} records: going on with {size // 2} per batch")

    def _collate(self, batch: Batch) -> Any:
        positions = [list(batch.records.positions)] if self._steps.takes_positions else []
        with self._monitor.timed("collate"):
            return arguments_of(self._steps.collate(batch.items, *positions))

    def _store(self, output: Any, batch: Batch) -> int:
        """Put the outputs of a batch into its block, in a worker thread; return the tokens in them."""
        with self._monitor.timed("postprocess"):
            if self._steps.finish is not None:
                output = self._steps.finish(output, batch.items)
            num_tokens = sum(output[self._steps.counted]) if self._steps.counted else 0
            columns = to_columns(self._steps.postprocess(output), len(batch.items))
            columns = with_kept(columns, batch.records, self._options.keep, self._options.new_names)
            check_texts(columns)
            self._open[batch.block].rows.add(batch.records, columns)
        return num_tokens

    def _count(self, batch: Batch, seconds: float) -> None:
        self._open[batch.block].num_done += len(batch.records)
        longest = max(batch.costs)
        where = batch.records.where[batch.costs.index(longest)]
        added = padding(batch.costs) if self._steps.pads else 0
        counted = SlowBatch(seconds, len(batch.records), longest, where)
        self._monitor.count_batch(counted, sum(batch.costs), added)

    def _refuse(self, block: OpenBlock, record: Record, error: Exception) -> None:
        if self._options.on_error == "stop":
            raise RecordError(record.position, record.where, error) from error
        failure = Failure.of(record, error)
        if self._options.on_error == "record":
            block.failures.append(failure)
        block.num_done += 1
        monitor, limit = self._monitor, self._options.max_errors
        monitor.num_done += 1
        monitor.num_bad += 1
        monitor.last_error = failure.error
        if limit is not None and monitor.num_all_bad > limit:
            raise TooManyBadRecordsError(monitor.num_all_bad, limit, failure.error)

    async def _finish_if_complete(self, block: OpenBlock) -> None:
        if block.num_done == block.size and not block.complete:
            block.complete = True
            await self._to_write.send(block)

    async def _write(self, blocks: MemoryObjectReceiveStream[OpenBlock]) -> None:
        async with blocks:
            async for block in blocks:
                await anyio.to_thread.run_sync(self._finish, block)
                num_bad = block.num_done - len(block.rows)
                self._report(ShardFinished(block.index, block.num_done, num_bad))

    def _finish(self, block: OpenBlock) -> None:
        with self._monitor.timed("write"):
            self._write_block(block.index, block.num_done, block.rows, block.failures)
            del self._open[block.index]


def _without_errors(records: Records) -> tuple[Records, list[_Refused]]:
    """Take out what the reader could not read."""
    if not records.errors:
        return records, []
    good = [index for index in range(len(records)) if index not in records.errors]
    return records.pick(good), [(records[index], error) for index, error in sorted(records.errors.items())]


# The allocator of CPU tensors has no exception type of its own, and other words on Linux than on Windows.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that a smaller batch may succeed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def drop_tracebacks(error: BaseException | None) -> None:
    """Drop the tracebacks of an exception and of its causes, whose frames hold all of a batch's tensors."""
    if error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        drop_tracebacks(error.__cause__)
        drop_tracebacks(error.__context__)
