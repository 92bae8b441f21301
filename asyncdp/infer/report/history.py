"""How a job went, noted in its output folder while it runs, for `asyncdp report`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

from ..places import append_line, open_place
from .monitor import Monitor, Sample, SlowBatch

PROGRESS_NAME = "_progress.jsonl"

RUNNING = "running"

_LEAST_PAUSE = 1.0
# A pause grows with the job, so that the file of a job of days stays small.
_PAUSES_PER_JOB = 300


@dataclasses.dataclass(frozen=True)
class Point:
    """A job at one moment, one line of the file; counts run from the start of its run.

    Attributes:
        run: when the run began, seconds since the epoch.
        host, pid: the process of the run.
        state: `running`, `done`, `stopped`, or why it failed.
        seconds: since the start of the run.
        num_done, num_bad: records, those of earlier runs included.
        num_records: records to do in all, None where that is not known.
        lanes: seconds each lane was busy, by name.
        memory: bytes that the process held.
        cost, padding: entries of batches that are the records', and those that were added.
        sizes: batches by number of records, rounded up to a power of two.
        stages: seconds by stage.
        slowest: the batches that took longest; None where they are those of the point before.
    """

    run: float
    host: str
    pid: int
    state: str
    seconds: float
    num_done: int
    num_bad: int
    num_records: int | None
    lanes: dict[str, float]
    memory: int | None
    cost: int
    padding: int
    sizes: dict[str, int]
    stages: dict[str, float]
    slowest: list[SlowBatch] | None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Point:
        """Read a line."""
        slowest = fields.pop("slowest")
        return cls(**fields, slowest=None if slowest is None else [SlowBatch(**each) for each in slowest])

    @property
    def is_live(self) -> bool:
        """Whether its run still goes on, as far as can be told from here."""
        if self.state != RUNNING:
            return False
        if self.host != platform.node():
            pause = max(_LEAST_PAUSE, self.seconds / _PAUSES_PER_JOB)
            return time.time() - self.run - self.seconds < 10 * pause
        with contextlib.suppress(PermissionError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
        return True


class ProgressLog:
    """Notes points of one run in the output folder; what cannot be noted does not stop the job."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS_NAME
        self._run = time.time()
        self._last = -math.inf
        self._slowest: list[SlowBatch] = []

    def note(self, monitor: Monitor, num_records: int | None, state: str = RUNNING) -> None:
        """Append where the job is, unless it runs on and was noted a moment ago."""
        pause = max(_LEAST_PAUSE, monitor.seconds / _PAUSES_PER_JOB)
        if state == RUNNING and monitor.seconds - self._last < pause:
            return
        self._last = monitor.seconds
        slowest = monitor.slowest_batches()
        point = Point(
            run=self._run,
            host=platform.node(),
            pid=os.getpid(),
            state=state,
            seconds=round(monitor.seconds, 3),
            num_done=monitor.num_all_done,
            num_bad=monitor.num_all_bad,
            num_records=num_records,
            lanes={name: round(busy, 3) for name, busy in monitor.lane_seconds().items()},
            memory=monitor.memory,
            cost=monitor.cost,
            padding=monitor.padding,
            sizes={str(size): count for size, count in sorted(monitor.sizes.items())},
            stages={name: round(spent, 3) for name, spent in monitor.stage_seconds().items()},
            slowest=slowest if slowest != self._slowest else None,
        )
        self._slowest = slowest
        line = json.dumps(dataclasses.asdict(point)).encode() + b"\n"
        with contextlib.suppress(OSError):
            append_line(self._path, line)


def read_points(folder: Path) -> list[Point]:
    """Return the points of all runs of a job, in order; lines that a crash has cut are left out."""
    try:
        with open_place(folder / PROGRESS_NAME) as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    points = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            points.append(Point.from_json(json.loads(line)))
    return points


def split_runs(points: list[Point]) -> list[list[Point]]:
    """Return the points of each run."""
    runs: dict[float, list[Point]] = {}
    for point in points:
        runs.setdefault(point.run, []).append(point)
    return list(runs.values())


def samples_of(points: list[Point]) -> list[Sample]:
    """Return samples for a picture; the time between two runs is left out."""
    samples: list[Sample] = []
    seconds, busy = 0.0, dict[str, float]()
    for run in split_runs(points):
        for point in run:
            lanes = {name: busy.get(name, 0.0) + value for name, value in point.lanes.items()}
            samples.append(Sample(seconds + point.seconds, point.num_done, {**busy, **lanes}))
        seconds, busy = samples[-1].seconds, samples[-1].lanes
    names = busy.keys()
    return [dataclasses.replace(s, lanes={name: s.lanes.get(name, 0.0) for name in names}) for s in samples]
