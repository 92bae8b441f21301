"""What a job tells: while it runs, at its end, and before it starts."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from ..output.output import ERRORS_PREFIX, OutputFolder
from .monitor import Monitor


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        num_records: Records of this job's part that are done, earlier runs included.
        num_earlier: Those of them that an earlier run had done.
        num_bad: Those of them that were refused, earlier runs included.
        seconds: Time this run took, loading not included.
        rate: Records per second of this run.
        padding: Part of the batches that was padding, 0 to 1; stacks and lists of texts have none.
        stages: Seconds by stage, summed over its workers; on the lanes without waiting for them.
        lanes: Part of the time each lane was busy, 0 to 1.
        files: Shards with outputs in the output folder.
        error_files: Files there that tell of bad records.
    """

    num_records: int
    num_earlier: int
    num_bad: int
    seconds: float
    rate: float
    padding: float
    stages: dict[str, float]
    lanes: dict[str, float]
    files: int
    output: str
    error_files: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job would do, found out without writing anything.

    Attributes:
        num_records: Records in the input, None when that is not known.
        devices: Names of the lanes.
        columns: Output columns of the first batch with type and shape, empty for an empty input.
        num_tried: Records in the first batch.
        num_earlier: Records that a resumed job finds done.
    """

    input_format: str
    num_files: int
    num_records: int | None
    devices: tuple[str, ...]
    columns: dict[str, str]
    num_tried: int
    num_earlier: int = 0


class Reporter(Protocol):
    """Tells a person or a machine how the job goes; called on the event loop."""

    def started(self, num_records: int | None, monitor: Monitor, lanes: tuple[str, ...]) -> None:
        """The model is loaded and the lanes are up."""

    def progressed(self, num_records: int | None, monitor: Monitor) -> None:
        """Some time has passed."""

    def finished(self) -> None:
        """The job has ended, well or not."""


class SilentReporter:
    """Tells nobody."""

    def started(self, num_records: int | None, monitor: Monitor, lanes: tuple[str, ...]) -> None:
        """Keeps quiet."""

    def progressed(self, num_records: int | None, monitor: Monitor) -> None:
        """Keeps quiet."""

    def finished(self) -> None:
        """Keeps quiet."""


def summarise(monitor: Monitor, output: OutputFolder) -> Summary:
    """Puts together what a job counted and what its folder holds."""
    seconds = monitor.seconds
    busy = monitor.busy_fractions()
    work = monitor.cost + monitor.padding
    names = [file.name for block in output.finished.values() for file in block.files]
    num_told = sum(name.startswith(ERRORS_PREFIX) for name in names)
    return Summary(
        num_records=monitor.num_earlier + monitor.num_done,
        num_earlier=monitor.num_earlier,
        num_bad=monitor.num_earlier_bad + monitor.num_bad,
        seconds=seconds,
        rate=monitor.num_done / seconds if seconds else 0.0,
        padding=monitor.padding / work if work else 0.0,
        stages=monitor.stage_seconds(),
        lanes=busy,
        files=len(names) - num_told,
        output=str(output.path),
        error_files=num_told,
    )
