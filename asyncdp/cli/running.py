"""Runs a job from the command line: signals, reporting, exit codes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio

from ..errors import JobUsageError, MissingExtraError
from ..infer import InferOptions, Job, Reporter, Summary
from ..infer.monitor import Monitor
from ..infer.readers import STDIN
from ..infer.task_groups import plain_task_group

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BAD_RECORDS = 3
EXIT_INTERRUPTED = 130


class Interrupted(Exception):
    """A person or the system asked the job to stop; the text says how to go on."""


def exit_code_of(num_bad: int, error: Exception | None = None) -> int:
    """Returns the exit code for a job that ended with an error, or with some bad records."""
    if error is not None:
        return EXIT_USAGE if isinstance(error, JobUsageError | MissingExtraError) else EXIT_FAILED
    return EXIT_BAD_RECORDS if num_bad else 0


def run_infer(options: InferOptions, *, dry_run: bool, plot: Path | None, as_json: bool) -> int:
    """Runs ``asyncdp infer`` and returns its exit code."""
    from ..infer.plot import check_plot, draw_plot
    from ..infer.reporters import make_reporter, tell_plan, tell_summary

    if plot is not None:
        check_plot(plot)
    job = Job(options)
    if dry_run:
        print(tell_plan(anyio.run(job.plan), as_json=as_json))
        return 0
    monitor = Monitor()
    try:
        summary = anyio.run(run_until_signal, job, make_reporter(as_json=as_json), monitor)
    except Interrupted:
        if str(STDIN) in options.inputs:
            raise Interrupted("interrupted; standard input cannot be read again, so start anew") from None
        raise Interrupted("interrupted; the same command with --resume continues") from None
    print(tell_summary(summary, as_json=as_json))
    if plot is not None:
        draw_plot(plot, monitor.samples)
    return exit_code_of(summary.num_bad)


async def run_until_signal(job: Job, reporter: Reporter, monitor: Monitor) -> Summary:
    """Runs a job; SIGINT and SIGTERM stop it after the batches at hand.

    Raises:
        Interrupted: When a signal came first.
    """
    async with plain_task_group() as group:
        if os.name != "nt":
            group.start_soon(_raise_on_signal)
        summary = await job.run(reporter, monitor)
        group.cancel_scope.cancel()
    return summary


async def _raise_on_signal() -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            # A second signal meets the default handlers again, for people in a hurry.
            raise Interrupted
