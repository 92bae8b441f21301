"""A job that runs over a cluster, from options to summary."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread

from ..files import TEMPORARY_PREFIX, write_whole
from ..fingerprint import fingerprint
from ..job import (
    check_apart,
    conclude,
    estimate,
    first_records,
    inputs_of,
    is_complete,
    num_earlier,
    own_blocks,
    take_up,
    tick,
)
from ..options import InferOptions
from ..output.journal import Block
from ..output.output import OutputFolder, check_output_free
from ..output.writers import try_writer
from ..places import remove
from ..readers.pieces import Planner, Reading
from ..records import Records
from ..report.events import Report, ShardFinished, ignore
from ..report.monitor import Monitor
from ..report.summary import Plan, Summary
from ..report.watch import Watch
from ..task_groups import plain_task_group
from .driver import Driver, Stopped
from .messages import Opened, Setup, versions
from .placing import parse_resources
from .ray_cluster import RayCluster, connected
from .tally import Tally

T = TypeVar("T")


class ClusterJob:
    """An inference job over a Ray cluster, whose input is found.

    Blocks are the same as on one machine, and so is the output folder: a job may be begun here and be
    continued there. The model is loaded on the nodes alone.

    Args:
        options: what to do.

    Raises:
        JobUsageError: something that was named does not exist or does not fit.
    """

    def __init__(self, options: InferOptions) -> None:
        self.options = options
        parse_resources(options.ray_resources)
        check_output_free(options.output, resume=options.resume)
        check_apart(options)
        try_writer(options.output_format)
        self.inputs = inputs_of(options)
        # A plain copy: what the options have worked out already need not travel.
        plain = dataclasses.replace(options)
        reading = Reading(self.inputs.format_name, options.selection, options.dialect, self.inputs.sample)
        paths = [os.path.abspath(path) for path in sys.path if os.path.isdir(path or ".")]
        self._setup = Setup(plain, reading, os.getcwd(), tuple(paths), versions())

    async def run(self, report: Report | None = None, monitor: Monitor | None = None) -> Summary:
        """Run the job to its end.

        Args:
            report: gets every event but `Finished`; None for nobody.
            monitor: counts what happens; a new one if None.

        Raises:
            JobError: see its subclasses; all blocks finished before stay valid.
        """
        monitor, report = monitor or Monitor(), report or ignore
        watch = Watch(monitor, functools.partial(estimate, self.options, self.inputs), report)
        async with _on_cluster(self.options.ray or "") as cluster:
            tally = Tally(monitor)
            driver = Driver(cluster, self._setup, tally)
            if cluster.is_new:
                monitor.warn_once("no Ray cluster runs here: one was started, on this machine alone")
            _, opened = await _until_cancelled(driver, driver.open_first)
            with await anyio.to_thread.run_sync(self._open_output, opened) as output:
                take_up(output, self.inputs, monitor)
                planner = self._planner(output)
                if not is_complete(self.options, self.inputs, output):
                    await self._run(driver, tally, output, planner, watch)
                return await conclude(watch, output, self.inputs)

    async def plan(self) -> Plan:
        """Load everything on one node and run the first batch there, but write nothing.

        Raises:
            RecordError: a record of the first batch is refused.
            ResumeRefusedError: the job could not be continued in the output folder.
            JobError: the outputs do not fit the output format.
        """
        async with _on_cluster(self.options.ray or "") as cluster:
            driver = Driver(cluster, self._setup, Tally(Monitor()))
            actor, opened = await _until_cancelled(driver, driver.open_first)
            print_ = await anyio.to_thread.run_sync(self._fingerprint, opened)
            num_done = await anyio.to_thread.run_sync(num_earlier, self.options, print_)
            records = await anyio.to_thread.run_sync(self._first_records)
            tried = await _until_cancelled(driver, lambda: driver.try_first(actor, records))
            names = driver.node_names
        return Plan(
            input_format=self.inputs.format_name,
            num_files=len(self.inputs.files),
            num_records=None if self.inputs.subset.chooses else self.inputs.count_records(),
            devices=tuple(f"{name} ({len(opened.lanes)} lanes)" for name in names),
            columns=tried.columns,
            num_tried=tried.num_records,
            num_earlier=num_done,
        )

    def _first_records(self) -> Records:
        return first_records(self.inputs, self.options.batch_size)

    def _fingerprint(self, opened: Opened) -> dict[str, Any]:
        return fingerprint(self.options, self.inputs, opened.print)

    def _open_output(self, opened: Opened) -> OutputFolder:
        if opened.checks_inputs:
            self.inputs.check_fit()
        options = self.options
        return OutputFolder(
            options.output, options.output_format, self._fingerprint(opened), resume=options.resume
        )

    async def _run(
        self, driver: Driver, tally: Tally, output: OutputFolder, planner: Planner, watch: Watch
    ) -> None:
        def on_block(block: Block) -> None:
            event = ShardFinished(block.index, block.num_records, block.num_bad)
            anyio.from_thread.run_sync(watch.report, event)

        def run() -> None:
            with _token_in(output.path) as token:
                driver.run(output, planner, token, on_block)
                output.widen_shards()
                assert planner.num_records is not None, "the input was read to its end"
                output.finish(planner.num_records, others_wrote=True)

        async with watch.noted_in(output.path), plain_task_group() as group:
            watch.start(tally)
            group.start_soon(tick, watch)
            try:
                await _until_cancelled(driver, run)
            finally:
                watch.look()
            group.cancel_scope.cancel()

    def _planner(self, output: OutputFolder) -> Planner:
        total, done, (part, num_parts) = self.inputs.count_records(), output.finished, self.options.part
        own = None if total is None else own_blocks(self.options, self.inputs, total)

        def wanted(block: int) -> bool:
            is_own = block % num_parts == part if own is None else block in own
            return is_own and block not in done

        return Planner(self.inputs, self.options.shard_size, wanted)


@contextlib.asynccontextmanager
async def _on_cluster(address: str) -> AsyncIterator[RayCluster]:
    """Connect in worker threads; one that is cancelled meanwhile closes the connection by itself."""
    connection, lock = connected(address), threading.Lock()
    ends: list[str] = []

    def connect() -> RayCluster:
        cluster = connection.__enter__()
        close_unless_first("connected")
        return cluster

    def close_unless_first(end: str) -> None:
        with lock:
            ends.append(end)
        if len(ends) == 2:
            close()

    def close() -> None:
        connection.__exit__(None, None, None)

    try:
        # To start a cluster takes seconds, which nobody who has pressed Ctrl-C wants to wait for.
        cluster = await anyio.to_thread.run_sync(connect, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(close_unless_first, "cancelled")
        raise
    try:
        yield cluster
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(close)


async def _until_cancelled(driver: Driver, function: Callable[[], T]) -> T:
    """Run a function of a driver in a worker thread; a cancellation stops the driver."""
    results: list[T] = []

    async def stop_when_cancelled() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            if not results:
                driver.stop()

    async with plain_task_group() as group:
        group.start_soon(stop_when_cancelled)
        try:
            results.append(await anyio.to_thread.run_sync(function))
        except Stopped:
            await anyio.sleep_forever()  # which raises at once
        group.cancel_scope.cancel()
    return results[0]


@contextlib.contextmanager
def _token_in(folder: Path) -> Iterator[Path]:
    """Give a file in a folder, by which a node sees that it is the same folder."""
    token = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    write_whole(token, b"The nodes of a running job look for this file.\n")
    try:
        yield token
    finally:
        with contextlib.suppress(OSError):
            remove(token)
