"""Jobs from Python: whole ones, and ones that are watched while they run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import anyio.to_thread

from .._devices.threads import end_own_team
from .cluster.job import ClusterJob
from .config import make_options
from .job import Job
from .options import InferOptions
from .report.events import Event, EventQueue, Finished
from .report.summary import Plan, Summary
from .task_groups import plain_task_group

Inputs = InferOptions | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class RunningJob:
    """A job that runs beside the caller's code; made by `start`.

    Attributes:
        summary: what the job did, None until it is done.
    """

    def __init__(self) -> None:
        self.summary: Summary | None = None
        self._events = EventQueue()
        self._scope = anyio.CancelScope()

    def events(self) -> AsyncIterator[Event]:
        """Iterate over what happens, up to `Finished`; each event is seen once.

        The job does not wait for the one who iterates: of progress only the newest is kept.
        """
        return self._events

    def cancel(self) -> None:
        """Stop after the batches in flight; the same job with `resume=True` goes on."""
        self._scope.cancel()

    async def _run(self, inputs: Inputs, options: dict[str, Any]) -> None:
        try:
            with self._scope:
                job = await anyio.to_thread.run_sync(_load, inputs, options)
                self.summary = await job.run(self._events.put)
                self._events.put(Finished(self.summary))
        finally:
            self._events.close()


@contextlib.asynccontextmanager
async def start(inputs: Inputs, **options: Any) -> AsyncIterator[RunningJob]:
    """Run a job beside a block of code, which can watch it.

    The end of the block waits for the job. A failure of the job cancels the block and is raised at its end;
    an exception in the block, or a cancellation, stops the job after the batches in flight.

    Args:
        inputs: as for `run`.
        options: as for `run`.

    Yields:
        The running job.

    Raises:
        JobError: see its subclasses; all shards finished before stay valid.
    """
    job = RunningJob()
    failure: Exception | None = None
    async with plain_task_group() as group:
        group.start_soon(job._run, inputs, options)
        try:
            yield job
        except Exception as error:  # the group would put it into another one, or take it apart
            failure = error
            group.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def run(inputs: Inputs, **options: Any) -> Summary:
    """Run a model over all records of some files, on all lanes of this machine or of a Ray cluster.

    Nothing is printed and no signal is handled. Cancelled, it stops after the batches in flight, and the same
    call with `resume=True` goes on.

    Args:
        inputs: files, folders, patterns; or `InferOptions`, which `options` change.
        options: the options of `asyncdp infer`, with underscores; `model` and `output` are needed.

    Returns:
        What the job did.

    Raises:
        JobUsageError: an option is unknown or does not fit, or something that was named does not exist.
        JobError: see its subclasses; all shards finished before stay valid.
    """
    async with start(inputs, **options) as job:
        pass
    assert job.summary is not None, "it ended without an exception, and nobody else can cancel it"
    return job.summary


async def plan(inputs: Inputs, **options: Any) -> Plan:
    """Load everything and run the first batch, but write nothing.

    Args:
        inputs: as for `run`.
        options: as for `run`.

    Raises:
        JobError: as `run`.
    """
    plans: list[Plan] = []
    async with plain_task_group() as group:

        async def make() -> None:
            job = await anyio.to_thread.run_sync(_load, inputs, options)
            plans.append(await job.plan())

        group.start_soon(make)
    return plans[0]


def load_job(options: InferOptions) -> Job | ClusterJob:
    """Return a job on this machine, or on the cluster that its options name."""
    return Job(options) if options.ray is None else ClusterJob(options)


def _load(inputs: Inputs, options: dict[str, Any]) -> Job | ClusterJob:
    """Load a job in a worker thread, which keeps no threads of its own for computing."""
    if isinstance(inputs, InferOptions):
        chosen = make_options(options, inputs)
    else:
        chosen = make_options({"inputs": inputs, **options})
    try:
        return load_job(chosen)
    finally:
        end_own_team()
