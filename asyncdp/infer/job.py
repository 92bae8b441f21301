"""One inference job, from options to summary."""

from __future__ import annotations

import dataclasses
import functools
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
from .model.models import LoadedModel, load_model
from .options import InferOptions
from .output.output import OutputFolder, check_output_free, read_state
from .output.writers import try_writer, write_shard
from .pipeline import Engine, Pipeline
from .places import is_remote, lies_in, place_of
from .readers import STDIN, Inputs, open_inputs
from .records import Failure, Records
from .report.events import Report, ignore
from .report.memory import heap_set_aside, release_memory
from .report.monitor import Monitor
from .report.summary import Plan, Summary
from .report.watch import Watch
from .setup import find_devices, make_steps
from .steps import Steps
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
        check_output_free(options.output, resume=options.resume)
        check_apart(options)
        self.devices = find_devices(options.devices)
        self.inputs = inputs_of(options)
        self.model = open_model(options)
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
        watch = Watch(monitor, functools.partial(estimate, self.options, self.inputs), report or ignore)
        with await anyio.to_thread.run_sync(self._open_output) as output:
            take_up(output, self.inputs, monitor)
            if not is_complete(self.options, self.inputs, output):
                with heap_set_aside():
                    await self._run_engine(output, watch)
            return await conclude(watch, output, self.inputs)

    async def plan(self) -> Plan:
        """Load everything and run the first batch, but write nothing.

        Raises:
            RecordError: a record of the first batch is refused.
            ResumeRefusedError: the job could not be continued in the output folder.
            JobError: the outputs do not fit the output format.
        """
        num_done = await anyio.to_thread.run_sync(self._num_earlier)
        inputs = self.inputs
        async with self._engine() as engine:
            first = await anyio.to_thread.run_sync(
                first_records, inputs, self.options.batch_size, abandon_on_cancel=self._reads_stdin
            )
            shapes, monitor = await try_first_batch(engine, self.steps, self.options, first)
            names = tuple(lane.name for lane in engine.runtime.lanes)
        return Plan(
            input_format=inputs.format_name,
            num_files=len(inputs.files),
            num_records=None if inputs.subset.chooses else inputs.count_records(),
            devices=names,
            columns=shapes,
            num_tried=monitor.num_done,
            num_earlier=num_done,
        )

    @property
    def _reads_stdin(self) -> bool:
        return STDIN in [file.path for file in self.inputs.files]

    def _num_earlier(self) -> int:
        return num_earlier(self.options, self._fingerprint())

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
            group.start_soon(tick, watch)
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
            records = self.inputs.read_together(first * size, num_before=num_before)
            yield from cut_windows(
                records, **sizes, wanted=lambda block: block % num_parts == part and block not in done
            )
            return
        blocks = [block for block in own_blocks(self.options, self.inputs, total) if block not in done]
        # Neighbouring blocks are read in one go.
        for _, numbered in itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
            run = [block for _, block in numbered]
            records = self.inputs.read_together(run[0] * size, min((run[-1] + 1) * size, total))
            yield from cut_windows(records, **sizes, wanted=lambda _: True)


def own_blocks(options: InferOptions, inputs: Inputs, num_records: int) -> range:
    """Return the blocks that a job is to do of an input of so many records."""
    is_counted = inputs.count_records() is not None
    return blocks_of_part(num_records, options.shard_size, options.part, contiguous=is_counted)


def is_complete(options: InferOptions, inputs: Inputs, output: OutputFolder) -> bool:
    """Return whether earlier runs have done all that a job is to do."""
    total = output.journal.state.num_records
    return total is not None and output.finished.keys() >= set(own_blocks(options, inputs, total))


def estimate(options: InferOptions, inputs: Inputs) -> int | None:
    """Return how many records a job is to do, earlier runs included; None where nobody knows yet."""
    total, size = inputs.estimate_num_records(), options.shard_size
    if total is None:
        return None
    return sum(min(size, total - block * size) for block in own_blocks(options, inputs, total))


def num_earlier(options: InferOptions, fingerprint: dict[str, Any]) -> int:
    """Return the number of records that a resumed job would find done."""
    state = read_state(options.output, fingerprint, resume=options.resume)
    return sum(block.num_records for block in state.blocks.values())


def inputs_of(options: InferOptions) -> Inputs:
    """Find the files that a job reads."""
    return open_inputs(
        options.inputs,
        options.input_format,
        options.selection,
        output=options.output,
        dialect=options.dialect,
        subset=options.subset,
    )


def open_model(options: InferOptions) -> LoadedModel:
    """Load the model of a job."""
    return load_model(
        options.model,
        options,
        weights=options.weights,
        dtype=options.dtype,
        autocast=options.autocast,
        compile=options.compile,
        allow_pickle=options.allow_unsafe_pickle,
    )


def take_up(output: OutputFolder, inputs: Inputs, monitor: Monitor) -> None:
    """Begin with what the output folder says of earlier runs."""
    monitor.num_earlier = sum(block.num_records for block in output.finished.values())
    monitor.num_earlier_bad = sum(block.num_bad for block in output.finished.values())
    monitor.warnings += inputs.warnings + output.warnings
    inputs.file_rows.update(output.journal.state.file_rows)
    output.journal.file_rows = inputs.file_rows


async def conclude(watch: Watch, output: OutputFolder, inputs: Inputs) -> Summary:
    """Return the summary of a job that is done, and leave it in the output folder."""
    watch.warn()
    files, error_files = output.count_files()
    summary = watch.monitor.summary(
        output=str(output.path), files=files, error_files=error_files, passed_over=inputs.passed_over
    )
    text = json.dumps(dataclasses.asdict(summary), indent=1).encode()
    await anyio.to_thread.run_sync(write_whole, output.path / SUMMARY_NAME, text)
    return summary


def first_records(inputs: Inputs, size: int) -> Records:
    """Return the first records that a job is about, numbered anew, so that they are one block."""
    found = itertools.islice(inputs.read(), size)
    numbered = [record._replace(position=index) for index, record in enumerate(found)]
    return Records.of(numbered, inputs.selection.keep)


async def try_first_batch(
    engine: Engine,
    steps: Steps,
    options: InferOptions,
    records: Records,
) -> tuple[dict[str, str], Monitor]:
    """Run one batch, and try the output format on it.

    Args:
        engine: runs it.
        steps: the functions around the model.
        options: of the job.
        records: at most as many as a batch takes.

    Returns:
        The columns that came out, and what was counted.
    """
    shapes: dict[str, str] = {}
    size, monitor = options.batch_size, Monitor()

    def try_format(index: int, num_records: int, rows: BlockRows, failures: list[Failure]) -> None:
        write_shard(options.output_format, io.BytesIO(), *rows.finish())
        shapes.update(rows.schema)

    def stopping() -> InferOptions:  # which looks at the disk
        return dataclasses.replace(options, on_error="stop")

    some = [records] if records else []
    windows = cut_windows(some, block_size=size, window=size, wanted=lambda block: True)
    strict = await anyio.to_thread.run_sync(stopping)
    await Pipeline(engine, steps, strict, try_format, monitor).run(windows)
    return shapes, monitor


async def tick(watch: Watch) -> None:
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


def check_apart(options: InferOptions) -> None:
    """Fail where the output lies in an input folder.

    Raises:
        JobUsageError: with both.
    """
    for spec in options.inputs:
        folder = place_of(spec)
        if lies_in(options.output, folder) and (is_remote(folder) or folder.is_dir()):
            raise JobUsageError(
                f"The output {options.output} lies inside the input folder {spec}",
                "Name a folder elsewhere: a resumed job would read its own shards.",
            )
