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
from .files import write_whole
from .fingerprint import fingerprint
from .model.models import load_model
from .options import InferOptions
from .output.output import OutputFolder, check_output_free, read_state
from .output.writers import try_writer, write_shard
from .pipeline import Pipeline
from .readers import STDIN, open_inputs
from .records import Failure
from .report.memory import release_memory
from .report.monitor import Monitor
from .report.summary import Plan, Reporter, SilentReporter, Summary, summarize
from .setup import find_devices, make_steps
from .task_groups import plain_task_group

SUMMARY_NAME = "_summary.json"

_TICK_SECONDS = 0.5


class Job:
    """An inference job whose model is loaded and whose input is found.

    Args:
        options: what to do.

    Raises:
        JobUsageError: something that was named does not exist or does not fit.
    """

    def __init__(self, options: InferOptions) -> None:
        self.options = options
        self._options_of_plan = dataclasses.replace(options, on_error="stop")
        check_output_free(options.output, resume=options.resume)
        _check_apart(options)
        self.devices = find_devices(options.devices)
        self.inputs = open_inputs(
            options.inputs,
            options.input_format,
            options.selection,
            output=options.output,
            dialect=options.dialect,
        )
        self.model = load_model(
            options.model,
            weights=options.weights,
            dtype=options.dtype,
            autocast=options.autocast,
            compile=options.compile,
            allow_pickle=options.allow_unsafe_pickle,
        )
        if not (options.preprocess or options.collate or options.task):
            self.inputs.check_fit()
        self.steps = make_steps(options, self.inputs.format_name, self.model)

    async def run(self, reporter: Reporter | None = None, monitor: Monitor | None = None) -> Summary:
        """Run the job to its end.

        Args:
            reporter: shows how the job goes; None shows nothing.
            monitor: counts what happens; a new one if None.

        Raises:
            JobError: see its subclasses; all blocks finished before stay valid.
        """
        reporter, monitor = reporter or SilentReporter(), monitor or Monitor()
        with await anyio.to_thread.run_sync(self._open_output) as output:
            monitor.num_earlier = sum(block.num_records for block in output.finished.values())
            monitor.num_earlier_bad = sum(block.num_bad for block in output.finished.values())
            monitor.warnings += self.inputs.warnings + output.warnings
            if not self._is_complete(output):
                await self._run_engine(output, reporter, monitor)
            files, error_files = output.count_files()
            summary = summarize(monitor, output=str(output.path), files=files, error_files=error_files)
            summary = dataclasses.replace(summary, passed_over=dict(self.inputs.passed_over))
            text = json.dumps(dataclasses.asdict(summary), indent=1).encode()
            await anyio.to_thread.run_sync(write_whole, output.path / SUMMARY_NAME, text)
        return summary

    async def plan(self) -> Plan:
        """Load everything and run the first batch, but write nothing.

        Raises:
            RecordError: a record of the first batch is refused.
            ResumeRefusedError: the job could not be continued in the output folder.
            JobError: the outputs do not fit the output format.
        """
        shapes: dict[str, str] = {}
        num_earlier = await anyio.to_thread.run_sync(self._num_earlier)
        inputs, size = self.inputs, self.options.batch_size

        def try_format(index: int, num_records: int, rows: BlockRows, failures: list[Failure]) -> None:
            write_shard(self.options.output_format, io.BytesIO(), *rows.finish())
            shapes.update(rows.schema)

        first = itertools.islice(inputs.read(), size)
        windows = cut_windows(first, block_size=size, window=size, wanted=lambda block: True)
        async with self._engine() as engine:
            pipeline = Pipeline(engine, self.steps, self._options_of_plan, try_format, Monitor())
            await pipeline.run(windows, abandon_reads=self._reads_stdin)
            names = tuple(lane.name for lane in engine.runtime.lanes)
        return Plan(
            input_format=inputs.format_name,
            num_files=len(inputs.files),
            num_records=inputs.count_records(),
            devices=names,
            columns=shapes,
            num_tried=inputs.num_records_read,
            num_earlier=num_earlier,
        )

    @property
    def _reads_stdin(self) -> bool:
        return STDIN in [file.path for file in self.inputs.files]

    def _num_earlier(self) -> int:
        """Return the number of records that a resumed job would find done."""
        state = read_state(self.options.output, self._fingerprint(), resume=self.options.resume)
        return sum(block.num_records for block in state.blocks.values())

    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.options, self.inputs, self.model)

    def _open_output(self) -> OutputFolder:
        options = self.options
        try_writer(options.output_format)
        return OutputFolder(options.output, options.output_format, self._fingerprint(), resume=options.resume)

    def _engine(self) -> DataParallel:
        return DataParallel(self.model.module, self.devices, output_device="cpu")

    async def _run_engine(self, output: OutputFolder, reporter: Reporter, monitor: Monitor) -> None:
        async with self._engine() as engine, plain_task_group() as group:
            monitor.restart(engine)
            names = tuple(lane.name for lane in engine.runtime.lanes)
            reporter.started(self._estimate(), monitor, names)
            group.start_soon(self._tick, engine, reporter, monitor)
            pipeline = Pipeline(engine, self.steps, self.options, output.write_block, monitor)
            try:
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
        first = next(block for block in itertools.count(part, num_parts) if block not in done)
        return cut_windows(
            self.inputs.read(first * size),
            block_size=size,
            window=min(self.options.window, size),
            wanted=lambda block: block % num_parts == part and block not in done,
        )

    def _estimate(self) -> int | None:
        total = self.inputs.estimate_num_records()
        return None if total is None else self._own_share(total)

    def _is_complete(self, output: OutputFolder) -> bool:
        total = output.journal.state.num_records
        done = sum(block.num_records for block in output.finished.values())
        return total is not None and done == self._own_share(total)

    def _own_share(self, num_records: int) -> int:
        return count_in_part(num_records, self.options.shard_size, self.options.part)


def count_in_part(num_records: int, block_size: int, part: tuple[int, int]) -> int:
    """Return how many of `num_records` lie in the blocks that belong to a part.

    Args:
        num_records: length of the input.
        block_size: records per block.
        part: index from 0, and number, of the parts.
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
