"""One inference job, from options to summary."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from .._engine.data_parallel import DataParallel
from ..errors import JobUsageError, TooManyBadRecordsError
from .batching import Window, cut_windows
from .blocks import BlockRows
from .fingerprint import fingerprint
from .model.models import LoadedModel, load_model
from .options import InferOptions
from .output.files import write_whole_bytes
from .output.output import OutputFolder, check_output_free, read_state
from .output.writers import WRITERS, try_writer
from .pipeline import ErrorPolicy, Limits, Pipeline
from .readers import STDIN, open_inputs
from .records import Failure
from .report.memory import release_memory
from .report.monitor import Monitor
from .report.summary import Plan, Reporter, SilentReporter, Summary, summarise
from .setup import find_devices, make_steps
from .task_groups import plain_task_group

SUMMARY_NAME = "_summary.json"

_TICK_SECONDS = 0.5


class Job:
    """An inference job whose model is loaded and whose input is found.

    Args:
        options: What to do.

    Raises:
        JobUsageError: When something that was named does not exist or does not fit.
    """

    def __init__(self, options: InferOptions) -> None:
        self.options = options
        check_output_free(options.output, resume=options.resume)
        _check_apart(options)
        self.devices = find_devices(options.devices)
        self.inputs = open_inputs(
            options.inputs, options.input_format, options.selection, output=options.output
        )
        self.steps = make_steps(options, self.inputs.format_name)
        self.model: LoadedModel = load_model(options)

    async def run(self, reporter: Reporter | None = None, monitor: Monitor | None = None) -> Summary:
        """Runs the job to its end.

        Args:
            reporter: Told how it goes, if anybody is.
            monitor: Counts what happens; a new one if None.

        Raises:
            JobError: See its subclasses; all blocks finished before stay valid.
        """
        reporter, monitor = reporter or SilentReporter(), monitor or Monitor()
        with await anyio.to_thread.run_sync(self._open_output) as output:
            monitor.num_earlier = sum(block.num_records for block in output.finished.values())
            monitor.num_earlier_bad = sum(block.num_bad for block in output.finished.values())
            monitor.warnings += output.warnings
            if not self._is_complete(output):
                await self._run_engine(output, reporter, monitor)
            summary = summarise(monitor, output)
            text = json.dumps(dataclasses.asdict(summary), indent=1).encode()
            await anyio.to_thread.run_sync(write_whole_bytes, output.path / SUMMARY_NAME, text)
        return summary

    async def plan(self) -> Plan:
        """Loads everything and runs the first batch, but writes nothing.

        Raises:
            RecordError: When a record of the first batch is refused.
            ResumeRefusedError: When the job could not be continued in the output folder.
            JobError: When the outputs do not fit the output format.
        """
        shapes: dict[str, str] = {}
        num_earlier = await anyio.to_thread.run_sync(self._num_earlier)

        def keep(index: int, num_records: int, rows: BlockRows, failures: list[Failure]) -> None:
            WRITERS[self.options.output_format](io.BytesIO(), *rows.finish())
            shapes.update(rows.schema)

        first = itertools.islice(self.inputs.read(), self.options.batch_size)
        async with self._engine() as engine:
            pipeline = self._pipeline(engine, ErrorPolicy(), keep, Monitor())
            size = self.options.batch_size
            windows = cut_windows(first, block_size=size, window=size, wanted=lambda block: True)
            await pipeline.run(windows, abandon_reads=self._reads_stdin)
            names = tuple(lane.name for lane in engine.runtime.lanes)
        inputs = self.inputs
        return Plan(
            inputs.format_name,
            len(inputs.files),
            inputs.count_records(),
            names,
            shapes,
            inputs.num_records_read,
            num_earlier,
        )

    @property
    def _reads_stdin(self) -> bool:
        return STDIN in [file.path for file in self.inputs.files]

    def _num_earlier(self) -> int:
        """Returns the number of records that a resumed job would find done."""
        state = read_state(self.options.output, self._fingerprint(), resume=self.options.resume)
        return sum(block.num_records for block in state.blocks.values())

    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.options, self.inputs, self.model)

    def _open_output(self) -> OutputFolder:
        options = self.options
        try_writer(options.output_format)
        return OutputFolder(
            options.output,
            options.output_format,
            self._fingerprint(),
            resume=options.resume,
        )

    def _engine(self) -> Any:
        return DataParallel(self.model.module, self.devices, output_device="cpu")

    def _pipeline(self, engine: Any, policy: ErrorPolicy, write_block: Any, monitor: Monitor) -> Pipeline:
        options = self.options
        limits = Limits(
            options.batch_size,
            options.max_batch_cost,
            len(engine.runtime.lanes),
            options.workers,
            options.worker_processes,
            options.shard_size if options.order == "input" else None,
        )
        return Pipeline(engine, self.steps, limits, policy, write_block, monitor)

    async def _run_engine(self, output: OutputFolder, reporter: Reporter, monitor: Monitor) -> None:
        policy = ErrorPolicy(self.options.on_error, self.options.max_errors)
        async with self._engine() as engine, plain_task_group() as group:
            monitor.restart(engine)
            names = tuple(lane.name for lane in engine.runtime.lanes)
            reporter.started(self._estimate(), monitor, names)
            group.start_soon(self._tick, engine, reporter, monitor)
            try:
                pipeline = self._pipeline(engine, policy, output.write_block, monitor)
                await pipeline.run(self._windows(output), abandon_reads=self._reads_stdin)
            except TooManyBadRecordsError:
                await anyio.to_thread.run_sync(output.write_unfinished, pipeline.failures_left())
                raise
            finally:
                monitor.sample(engine)
                reporter.progressed(self._estimate(), monitor)
                reporter.finished()
            await anyio.to_thread.run_sync(output.journal.finish_input, self.inputs.num_records_read)
            group.cancel_scope.cancel()

    async def _tick(self, engine: Any, reporter: Reporter, monitor: Monitor) -> None:
        while True:
            await anyio.sleep(_TICK_SECONDS)
            monitor.sample(engine)
            reporter.progressed(self._estimate(), monitor)
            await anyio.to_thread.run_sync(release_memory)

    def _windows(self, output: OutputFolder) -> Generator[Window, None, None]:
        size = self.options.shard_size
        part, num_parts = self.options.part
        done = set(output.finished)
        first = part
        while first in done:
            first += num_parts
        return cut_windows(
            self.inputs.read(first * size),
            block_size=size,
            window=min(self.options.window, size),
            wanted=lambda block: block % num_parts == part and block not in done,
        )

    def _estimate(self) -> int | None:
        total = self.inputs.estimate_num_records()
        return None if total is None else count_in_part(total, self.options.shard_size, self.options.part)

    def _is_complete(self, output: OutputFolder) -> bool:
        total = output.journal.state.num_records
        if total is None:
            return False
        done = sum(block.num_records for block in output.finished.values())
        return done == count_in_part(total, self.options.shard_size, self.options.part)


def count_in_part(num_records: int, block_size: int, part: tuple[int, int]) -> int:
    """Returns how many of ``num_records`` lie in the blocks that belong to a part.

    Args:
        num_records: Length of the input.
        block_size: Records per block.
        part: Index from 0, and number, of the parts.
    """
    index, num_parts = part
    num_full, rest = divmod(num_records, block_size)
    count = len(range(index, num_full, num_parts)) * block_size
    return count + (rest if num_full % num_parts == index else 0)


def _check_apart(options: InferOptions) -> None:
    output = options.output.resolve()
    for spec in options.inputs:
        folder = Path(spec).resolve()
        if folder.is_dir() and output.is_relative_to(folder):
            raise JobUsageError(
                f"The output {options.output} lies inside the input folder {spec}",
                "Name a folder elsewhere: a resumed job would read its own shards.",
            )
