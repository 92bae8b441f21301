"""Runs a job from the command line: signals, reporting, exit codes."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import anyio

from ..errors import AsyncDPError, JobUsageError, MissingExtraError
from ..infer import InferOptions
from ..infer.readers import STDIN
from ..infer.report.monitor import Monitor
from ..infer.running import load_job
from ..infer.task_groups import plain_task_group

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BAD_RECORDS = 3
EXIT_INTERRUPTED = 130


class Interrupted(Exception):
    """A signal asked the job to stop; the text says how to go on."""


class Abandoned(Exception):
    """A job has failed, but a thread of it may wait for standard input for ever."""

    def __init__(self, error: AsyncDPError) -> None:
        super().__init__(str(error))
        self.error = error


def exit_code_of(num_bad: int, error: Exception | None = None) -> int:
    """Return the exit code for a job that ended with an error, or with some bad records."""
    if error is not None:
        return EXIT_USAGE if isinstance(error, JobUsageError | MissingExtraError) else EXIT_FAILED
    return EXIT_BAD_RECORDS if num_bad else 0


def run_infer(options: InferOptions, *, dry_run: bool, plot: Path | None, as_json: bool) -> int:
    """Run `asyncdp infer` and return its exit code."""
    from ..infer.report.plot import check_plot, draw_plot
    from ..infer.report.reporters import format_plan, format_summary, make_reporter

    if plot is not None:
        check_plot(plot)
    job = load_job(options)
    if dry_run:
        print(format_plan(_run(job.plan, options, "nothing was written"), as_json=as_json))
        return 0
    monitor = Monitor()
    with make_reporter(as_json=as_json) as reporter:
        run = functools.partial(job.run, reporter.report, monitor)
        summary = _run(run, options, "the same command with --resume continues")
    print(format_summary(summary, as_json=as_json))
    if plot is not None:
        draw_plot(plot, monitor.samples)
    return exit_code_of(summary.num_bad)


def _run(job: Callable[[], Awaitable[T]], options: InferOptions, going_on: str) -> T:
    """Run a job to its end, or until a signal comes; the error then says how to go on."""
    reads_stdin = str(STDIN) in options.inputs
    try:
        return anyio.run(run_until_signal, job)
    except Interrupted:
        if reads_stdin:
            going_on = "start again, since standard input cannot be read twice"
        raise Interrupted(f"interrupted; {going_on}") from None
    except AsyncDPError as error:
        if reads_stdin:
            raise Abandoned(error) from error
        raise


async def run_until_signal(job: Callable[[], Awaitable[T]]) -> T:
    """Run a job; SIGINT and SIGTERM stop it after the batches in flight.

    Raises:
        Interrupted: when a signal came first.
    """
    async with plain_task_group() as group:
        if os.name != "nt":
            group.start_soon(_raise_on_signal)
        result = await job()
        group.cancel_scope.cancel()
    return result


async def _raise_on_signal() -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            # The handlers that were there before take the second signal, and end the process at once.
            raise Interrupted
