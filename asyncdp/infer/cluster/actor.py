"""What runs in an actor: the pipeline of a job on one machine, fed with one block after another.

Nothing here knows Ray; its methods are called one by one from outside, on one event loop.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import queue
import sys
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread

from ..._engine.data_parallel import DataParallel
from ...errors import InputError, JobUsageError, ProcessEndedError
from ..batching import Window, cut_windows
from ..blocks import BlockRows
from ..fingerprint import model_print
from ..job import open_model, try_first_batch
from ..output.journal import Block
from ..output.shards import write_alone
from ..pipeline import Pipeline
from ..places import exists, is_remote
from ..readers.pieces import Piece
from ..records import Failure, Records
from ..report.memory import release_memory
from ..report.monitor import Monitor
from ..setup import find_devices, make_steps
from ..task_groups import plain_task_group
from .messages import Counts, Opened, PackedError, Setup, Tried, versions
from .suspect import Work

_TICK_SECONDS = 0.5


class JobActor:
    """Holds the model, its engine and a pipeline; blocks come in, their files go into the output folder.

    Errors are returned, packed, since the driver decides over them.

    Args:
        setup: what to run.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._options = setup.options
        self._name = uuid.uuid4().hex[:8]
        self._monitor = Monitor()
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._done: dict[int, Block] = {}
        self._changed = anyio.Event()
        self._engine: Any = None
        self._pipelines: list[Pipeline] = []

    async def open(self) -> Opened | PackedError:
        """Load the model."""
        try:
            return await anyio.to_thread.run_sync(self._open)
        except Exception as error:
            return PackedError.of(error)

    def _open(self) -> Opened:
        self._check_versions()
        if os.path.isdir(self._setup.folder):
            os.chdir(self._setup.folder)
        sys.path += [path for path in self._setup.paths if path not in sys.path]
        # The driver alone knows how many are bad over all actors.
        options = self._options = dataclasses.replace(self._options, max_errors=None)
        self._devices = find_devices(options.devices)
        self._model = open_model(options)
        self._steps = make_steps(options, self._setup.reading.format_name, self._model)
        plain = not (options.preprocess or options.collate or self._model.steps)
        names = tuple(str(device) for device in self._devices)
        return Opened(names, model_print(options, self._model), plain)

    def _check_versions(self) -> None:
        here = versions()
        for name, version in self._setup.versions.items():
            if here[name] != version:
                raise JobUsageError(
                    f"It has {name} {here[name]}, and the process that starts the job has {version}",
                    "Install the same versions on all nodes: outputs must not depend on where a record runs.",
                )

    async def try_first(self, records: Records) -> Tried | PackedError:
        """Run the first batch of a job, and write nothing."""
        try:
            async with DataParallel(self._model.module, self._devices, output_device="cpu") as engine:
                columns, monitor = await try_first_batch(engine, self._steps, self._options, records)
            return Tried(columns, monitor.num_done)
        except Exception as error:
            return PackedError.of(error)

    async def serve(self, token: Path, first_input: Path) -> PackedError | None:
        """Run what `run` hands in, until `close`, or until something ends the job.

        Args:
            token: a file in the output folder that the driver has made.
            first_input: one of the input's files.
        """
        try:
            await anyio.to_thread.run_sync(_check_sees, token, first_input)
            async with self._open_engine(), plain_task_group() as group:
                group.start_soon(_tick)
                pipeline = self._pipeline(self._options, self._write)
                self._wake()
                await pipeline.run(self._windows())
                group.cancel_scope.cancel()
        except Exception as error:
            return PackedError.of(error)
        return None

    def _open_engine(self) -> DataParallel:
        engine = DataParallel(self._model.module, self._devices, output_device="cpu")
        self._engine = engine
        return engine

    def close(self) -> None:
        """Let `serve` end after what it has."""
        self._pieces.put(None)

    async def run(self, work: Work, piece: Piece) -> Block | PackedError | None:
        """Run a block; return what goes into the journal, None for a part of it that was only tried."""
        while not self._pipelines:
            await self._changed.wait()
        if work.alone:
            try:
                await self._run_alone(work, piece)
            except Exception as error:
                return PackedError.of(error)
            return self._done.pop(work.block, None)
        self._pieces.put(piece)
        while work.block not in self._done:
            await self._changed.wait()
        return self._done.pop(work.block)

    async def _run_alone(self, work: Work, piece: Piece) -> None:
        batch_size = work.batch_size or self._options.batch_size
        on_error = self._options.on_error if work.probed is None else "skip"
        change = functools.partial(
            dataclasses.replace, self._options, batch_size=batch_size, on_error=on_error
        )
        options = await anyio.to_thread.run_sync(change)  # which looks at the disk
        if work.probed is not None:
            pipeline = Pipeline(self._engine, self._steps, options, _write_nothing, Monitor())
        else:
            pipeline = self._pipeline(options, self._write)
        try:
            await pipeline.run(self._cut(_without_refused(work, piece, self._setup)))
        finally:
            if pipeline in self._pipelines:
                self._pipelines.remove(pipeline)

    def _pipeline(self, options: Any, write: Any) -> Pipeline:
        pipeline = Pipeline(self._engine, self._steps, options, write, self._monitor)
        self._pipelines.append(pipeline)
        return pipeline

    def _windows(self) -> Generator[Window, None, None]:
        while (piece := self._next_piece()) is not None:
            yield from self._cut(piece.read(self._setup.reading))

    def _next_piece(self) -> Piece | None:
        with self._monitor.waiting("read"):
            return self._pieces.get()

    def _cut(self, records: Iterator[Records]) -> Generator[Window, None, None]:
        size = self._options.shard_size
        window = min(self._options.window, size)
        return cut_windows(records, block_size=size, window=window, wanted=lambda block: True)

    def _write(self, index: int, num_records: int, rows: BlockRows, failures: list[Failure]) -> None:
        """Write a block, in a worker thread."""
        options = self._options
        self._done[index] = write_alone(
            options.output, options.output_format, index, num_records, rows, failures, writer=self._name
        )
        anyio.from_thread.run_sync(self._wake)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def counts(self) -> Counts:
        """Return what was done so far."""
        lanes = self._engine.runtime.statistics().lanes if self._engine is not None else ()
        return Counts.of(self._monitor, tuple(lane.busy_seconds for lane in lanes))

    async def failures_left(self) -> list[Failure]:
        """Return the bad records of blocks that are not written."""
        return [failure for pipeline in self._pipelines for failure in pipeline.failures_left()]


def _check_sees(token: Path, first_input: Path) -> None:
    """Fail where this node does not see what the job reads and writes.

    Raises:
        JobUsageError: with the folder or file.
    """
    if not exists(token):
        remedy = "Name a folder on a disk that all nodes share, or a URL of a store."
        raise JobUsageError(f"The output folder {token.parent} is another one here, or none", remedy)
    if not is_remote(first_input) and not first_input.exists():
        raise InputError(
            f"There is no input {first_input} here",
            "Put the input on a disk that all nodes share, or into a store.",
        )


def _without_refused(work: Work, piece: Piece, setup: Setup) -> Iterator[Records]:
    """Yield the records that some work is about, those that are not to be run as bad ones."""
    start, stop = work.probed or (0, piece.num_records)
    for records in piece.read(setup.reading):
        some = records.between(piece.first + start, piece.first + stop)
        refused = [index for index, at in enumerate(some.positions) if at - piece.first in work.refused]
        if some.span:
            yield some.with_errors({index: ProcessEndedError() for index in refused})


def _write_nothing(index: int, num_records: int, rows: BlockRows, failures: list[Failure]) -> None:
    return


async def _tick() -> None:
    """Keep memory down, until cancelled."""
    while True:
        await anyio.sleep(_TICK_SECONDS)
        await anyio.to_thread.run_sync(release_memory)
