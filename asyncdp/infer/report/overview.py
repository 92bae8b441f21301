"""What `asyncdp report` tells of an output folder, as text."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

from ..output.journal import load_journal
from .history import Point, read_points, split_runs
from .monitor import SlowBatch
from .reporters import format_clock

_RECENT = 30.0  # seconds


@dataclasses.dataclass(frozen=True)
class Overview:
    """A job as its output folder shows it, over all its runs.

    Attributes:
        state: `running`, `done`, `stopped`, or why it failed.
        num_done, num_bad: records in finished shards, or in the last point where those are more.
        num_records: records to do in all, None where that is not known.
        num_shards, num_bytes: finished shards, and the size of their files.
        rate: records per second in the last seconds of the last run.
        seconds: of all runs.
        points: those of all runs.
    """

    folder: Path
    state: str
    num_done: int
    num_bad: int
    num_records: int | None
    num_shards: int
    num_bytes: int
    rate: float
    seconds: float
    points: list[Point]

    @property
    def last_of_runs(self) -> list[Point]:
        """The last point of each run."""
        return [run[-1] for run in split_runs(self.points)]

    @property
    def sizes(self) -> dict[int, int]:
        """Batches by number of records, rounded up to a power of two."""
        total = Counter[int]()
        for point in self.last_of_runs:
            total.update({int(size): count for size, count in point.sizes.items()})
        return dict(sorted(total.items()))

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage."""
        total = Counter[str]()
        for point in self.last_of_runs:
            total.update(point.stages)
        return dict(total)

    @property
    def padding(self) -> float:
        """The part of the batches that was padding, 0 to 1."""
        added = sum(point.padding for point in self.last_of_runs)
        return added / max(sum(point.cost for point in self.last_of_runs) + added, 1)

    @property
    def lanes(self) -> dict[str, float]:
        """The part of its run that each lane of the last run was busy, 0 to 1."""
        last = self.points[-1] if self.points else None
        return {name: busy / max(last.seconds, 1e-9) for name, busy in last.lanes.items()} if last else {}

    @property
    def slowest(self) -> list[SlowBatch]:
        """The slowest batches of all runs, the slowest first."""
        known = [[p.slowest for p in run if p.slowest is not None] for run in split_runs(self.points)]
        return sorted(itertools.chain.from_iterable(lists[-1] for lists in known if lists), reverse=True)[:10]

    @property
    def seconds_left(self) -> float | None:
        """The seconds left at this rate, None where they cannot be told."""
        if self.num_records is None or not self.rate or self.state != "running":
            return None
        return max(self.num_records - self.num_done, 0) / self.rate


def look_at(folder: Path) -> Overview:
    """Read what an output folder tells of its job, whether that runs or not.

    Raises:
        ResumeRefusedError: there is no journal of a job.
    """
    journal = load_journal(folder)
    points = read_points(folder)
    blocks = journal.blocks.values()
    done = sum(block.num_records for block in blocks)
    last = points[-1] if points else None
    is_running = last is not None and last.is_live
    num_records = last.num_records if last else None
    return Overview(
        folder=folder,
        state=_state(last, is_running=is_running, is_whole=journal.num_records is not None),
        num_done=max(done, last.num_done) if last and is_running else done,
        num_bad=max(sum(block.num_bad for block in blocks), last.num_bad if last and is_running else 0),
        num_records=num_records,
        num_shards=len(blocks),
        num_bytes=sum(file.num_bytes for block in blocks for file in block.files),
        rate=_recent_rate(points),
        seconds=sum(run[-1].seconds for run in split_runs(points)),
        points=points,
    )


def _state(last: Point | None, *, is_running: bool, is_whole: bool) -> str:
    if is_running:
        return "running"
    if last is None or last.state == "running":  # killed before it could say so
        return "done" if is_whole else "stopped"
    return last.state


def _recent_rate(points: list[Point]) -> float:
    if not points:
        return 0.0
    last = points[-1]
    run = [point for point in points if point.run == last.run]
    first = next(point for point in run if last.seconds - point.seconds <= _RECENT)
    if first is last and len(run) > 1:
        first = run[-2]
    seconds = last.seconds - first.seconds
    return (last.num_done - first.num_done) / seconds if seconds > 0 else 0.0


def facts_of(overview: Overview) -> dict[str, str]:
    """Return the figures of an overview in words, by what they are about."""
    last = overview.points[-1] if overview.points else None
    of_all = f" of {overview.num_records:,}" if overview.num_records is not None else ""
    facts = {
        "records": f"{overview.num_done:,}{of_all}, {overview.num_bad:,} bad",
        "shards": f"{overview.num_shards:,}, {overview.num_bytes / 1e6:,.1f} MB",
    }
    if last is None:
        return facts
    num_runs, left = len(overview.last_of_runs), overview.seconds_left
    peak = max(point.memory or 0 for point in overview.points)
    return facts | {
        "time": f"{format_clock(overview.seconds)} in {num_runs} run{'s' if num_runs > 1 else ''}"
        + (f", {format_clock(left)} left" if left is not None else ""),
        "rate": f"{overview.rate:,.1f} records/s lately",
        "lanes": ", ".join(f"{name} {busy:.0%}" for name, busy in overview.lanes.items()),
        "memory": f"{(last.memory or 0) >> 20:,} MiB, at most {peak >> 20:,} MiB",
        "padding": f"{overview.padding:.1%} of the batches",
    }


def format_overview(overview: Overview) -> str:
    """Put an overview into words."""
    facts = facts_of(overview)
    if overview.points:
        facts |= {
            "batches": ", ".join(f"{count:,} of up to {size:,}" for size, count in overview.sizes.items()),
            "stages": ", ".join(f"{name} {spent:.1f} s" for name, spent in overview.stages.items()),
        }
    text = [f"{overview.folder}: {overview.state}", *(f"  {name:8} {fact}" for name, fact in facts.items())]
    if overview.slowest:
        text += ["  slowest  seconds  records  longest  which is"]
        text += [f"{b.seconds:18.3f} {b.num_records:8,} {b.cost:8,}  {b.where}" for b in overview.slowest]
    return "\n".join(text)
