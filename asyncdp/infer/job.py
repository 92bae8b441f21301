"""One inference job, from options to summary."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Generator
from typing import Any

import anyio
import anyio.to_thread

from .._engine.data_parallel import DataParallel
from ..errors import JobUsageError, TooManyBadRecordsError
from .batching import Window, cut_windows
from .blocks import BlockRows
from .files import write_whole
from .fingerprint import fingerprint, model_print
from .model.models import load_model
from .options import InferOptions
from .output.output import OutputFolder, check_output_free, read_state
from .output.writers import try_writer, write_shard
from .pipeline import Pipeline
from .places import is_remote, lies_in, place_of
from .readers import STDIN, open_inputs
from .records import Failure
from .report.events import Report, ignore
from .report.memory import release_memory
from .report.monitor import Monitor
from .report.summary import Plan, Summary
from .report.watch import Watch
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
            subset=options.subset,
        )
        self.model = load_model(
            options.model,
            options,
            weights=options.weights,
            dtype=options.dtype,
            autocast=options.autocast,
            compile=options.compile,
            allow_pickle=options.allow_unsafe_pickle,
        )
        if not (options.preprocess or options.collate or self.model.steps):
            self.inputs.check_fit()
        self.steps = make_steps(options, self.inputs.format_name, self.model)

    async def run(self, report: Report | None = None, monitor: Monitor | None = None) -> Summary:
        """Run the job to its end.

        Args:
            report: gets every event but `Finished`; None for nobody.
            monitor: counts what happens; a new one if None.

        Raises:
            JobError: see its subclasses; all blocks finished before stay valid.
        """
        monitor = monitor or Monitor()
        watch = Watch(monitor, self._estimate, report or ignore)
        with await anyio.to_thread.run_sync(self._open_output) as output:
            monitor.num_earlier = sum(block.num_records for block in output.finished.values())
            monitor.num_earlier_bad = sum(block.num_bad for block in output.finished.values())
            monitor.warnings += self.inputs.warnings + output.warnings
            self.inputs.file_rows.update(output.journal.state.file_rows)
            output.journal.file_rows = self.inputs.file_rows
            if not self._is_complete(output):
                await self._run_engine(output, watch)
            watch.warn()
            files, error_files = output.count_files()
            summary = monitor.summary(
                output=str(output.path),
                files=files,
                error_files=error_files,
                passed_over=self.inputs.passed_over,
            )
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

        selected = (record for record in inputs.read() if record.is_selected)
        # Numbered anew, so that they are one block.
        first = (
            record._replace(position=index) for index, record in enumerate(itertools.islice(selected, size))
        )
        monitor = Monitor()
        windows = cut_windows(first, block_size=size, window=size, wanted=lambda block: True)
        async with self._engine() as engine:
            pipeline = Pipeline(engine, self.steps, self._options_of_plan, try_format, monitor)
            await pipeline.run(windows, abandon_reads=self._reads_stdin)
            names = tuple(lane.name for lane in engine.runtime.lanes)
        return Plan(
            input_format=inputs.format_name,
            num_files=len(inputs.files),
            num_records=None if inputs.subset.chooses else inputs.count_records(),
            devices=names,
            columns=shapes,
            num_tried=monitor.num_done,
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
        return fingerprint(self.options, self.inputs, model_print(self.options, self.model))

    def _open_output(self) -> OutputFolder:
        options = self.options
        try_writer(options.output_format)
        return OutputFolder(options.output, options.output_format, self._fingerprint(), resume=options.resume)

    def _engine(self) -> DataParallel:
        return DataParallel(self.model.module, self.devices, output_device="cpu")

    async def _run_engine(self, output: OutputFolder, watch: Watch) -> None:
        async with watch.noted_in(output.path), self._engine() as engine, plain_task_group() as group:
            watch.start(engine)
            group.start_soon(_tick, watch)
            pipeline = Pipeline(
                engine, self.steps, self.options, output.write_block, watch.monitor, watch.report
            )
            try:
                await pipeline.run(self._windows(output), abandon_reads=self._reads_stdin)
            except TooManyBadRecordsError:
                await anyio.to_thread.run_sync(output.write_unfinished, pipeline.failures_left())
                raise
            finally:
                watch.look()
            total = self.inputs.count_records()
            total = self.inputs.num_records_read if total is None else total
            await anyio.to_thread.run_sync(output.finish, total)
            group.cancel_scope.cancel()

    def _windows(self, output: OutputFolder) -> Generator[Window, None, None]:
        size, total = self.options.shard_size, self.inputs.count_records()
        sizes = {"block_size": size, "window": min(self.options.window, size)}
        done = set(output.finished)
        if total is None:
            part, num_parts = self.options.part
            first = next(block for block in itertools.count(part, num_parts) if block not in done)
            num_before = sum(block.num_records for block in output.finished.values() if block.index < first)
            records = self.inputs.read(first * size, num_before=num_before)
            yield from cut_windows(
                records, **sizes, wanted=lambda block: block % num_parts == part and block not in done
            )
            return
        blocks = [block for block in self._own_blocks(total) if block not in done]
        # Neighbouring blocks are read in one go.
        for _, numbered in itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
            run = [block for _, block in numbered]
            records = self.inputs.read(run[0] * size, min((run[-1] + 1) * size, total))
            yield from cut_windows(records, **sizes, wanted=lambda _: True)

    def _estimate(self) -> int | None:
        total = self.inputs.estimate_num_records()
        return None if total is None else self._count_own(total)

    def _is_complete(self, output: OutputFolder) -> bool:
        total = output.journal.state.num_records
        return total is not None and output.finished.keys() >= set(self._own_blocks(total))

    def _own_blocks(self, num_records: int) -> range:
        is_counted = self.inputs.count_records() is not None
        return blocks_of_part(num_records, self.options.shard_size, self.options.part, contiguous=is_counted)

    def _count_own(self, num_records: int) -> int:
        size = self.options.shard_size
        return sum(min(size, num_records - block * size) for block in self._own_blocks(num_records))


async def _tick(watch: Watch) -> None:
    """Look at a job again and again, until cancelled."""
    while True:
        await anyio.sleep(_TICK_SECONDS)
        watch.look()
        await anyio.to_thread.run_sync(_tidy, watch)


def _tidy(watch: Watch) -> None:
    release_memory()
    watch.note()


def blocks_of_part(num_records: int, block_size: int, part: tuple[int, int], *, contiguous: bool) -> range:
    """Return the blocks that belong to a part.

    Args:
        num_records: length of the input.
        block_size: records per block.
        part: index from 0, and number, of the parts.
        contiguous: whether they are neighbours, so that the part reads only its own piece of the input;
            else every n-th, which needs no knowledge of the input's length.
    """
    index, num_parts = part
    num_blocks = -(-num_records // block_size)
    if contiguous:
        return range(num_blocks * index // num_parts, num_blocks * (index + 1) // num_parts)
    return range(index, num_blocks, num_parts)


def _check_apart(options: InferOptions) -> None:
    for spec in options.inputs:
        folder = place_of(spec)
        if lies_in(options.output, folder) and (is_remote(folder) or folder.is_dir()):
            raise JobUsageError(
                f"The output {options.output} lies inside the input folder {spec}",
                "Name a folder elsewhere: a resumed job would read its own shards.",
            )
