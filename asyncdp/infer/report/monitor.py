"""What a job counts while it runs, for people and for the summary."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .events import Progress
from .summary import Summary

_STAGES = ("read", "preprocess", "collate", "lanes", "postprocess", "write")
_LATELY = 5.0  # seconds
NUM_SLOWEST = 10


@dataclasses.dataclass(frozen=True)
class Sample:
    """The job at one moment; counts run from its start.

    Attributes:
        seconds: time since the start.
        num_done: records that have an output or were refused.
        lanes: seconds each lane was busy, by name.
    """

    seconds: float
    num_done: int
    lanes: dict[str, float]


@dataclasses.dataclass(frozen=True, order=True)
class SlowBatch:
    """A batch that took long.

    Attributes:
        seconds: from the moment it was handed to the lanes; it may have waited for the one before.
        num_records: its records.
        cost: length of the longest of them.
        where: file and line or row of that one.
    """

    seconds: float
    num_records: int
    cost: int
    where: str


@dataclasses.dataclass
class Monitor:
    """Counters of one job; written from the loop and its workers, read by the reporter.

    Attributes:
        num_earlier: records that an earlier run had finished.
        num_tokens: tokens that a model generated.
        stages: seconds spent in each stage but the lanes, summed over its workers.
        memory: bytes that the process holds, None where that is not known.
        sizes: batches by number of records, rounded up to a power of two.
        slowest: a heap of the slowest batches.
        last_error: that of the record that was refused last, empty if there is none.
        num_nodes: nodes of a cluster that the job runs on, None where it runs on this machine.
    """

    num_earlier: int = 0
    num_earlier_bad: int = 0
    num_done: int = 0
    num_bad: int = 0
    num_batches: int = 0
    cost: int = 0
    padding: int = 0
    num_tokens: int = 0
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    memory: int | None = None
    sizes: Counter[int] = dataclasses.field(default_factory=Counter)
    slowest: list[SlowBatch] = dataclasses.field(default_factory=list)
    last_error: str = ""
    num_nodes: int | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)
    _lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False)

    @property
    def num_all_done(self) -> int:
        """Records done by this run and those before it."""
        return self.num_earlier + self.num_done

    @property
    def num_all_bad(self) -> int:
        """Records refused by this run and those before it."""
        return self.num_earlier_bad + self.num_bad

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def restart(self, engine: Any) -> None:
        """Start the clock, and take the lanes' load so far as zero."""
        self.started = time.perf_counter()
        self.sample(engine)

    def sample(self, engine: Any) -> None:
        """Record where the job is; old samples are thinned out so that a long job stays small."""
        busy = {lane.name: lane.busy_seconds for lane in engine.runtime.statistics().lanes}
        self.samples.append(Sample(self.seconds, self.num_done, busy))
        if len(self.samples) > 2000:
            del self.samples[1::2]

    def count_batch(self, batch: SlowBatch, cost: int, padding: int) -> None:
        """Count a batch that has its outputs.

        Args:
            batch: what it is.
            cost: entries of its records.
            padding: entries that were added to them.
        """
        self.num_done += batch.num_records
        self.num_batches += 1
        self.cost += cost
        self.padding += padding
        self.sizes[1 << (batch.num_records - 1).bit_length()] += 1
        if len(self.slowest) < NUM_SLOWEST:
            heapq.heappush(self.slowest, batch)
        elif batch > self.slowest[0]:
            heapq.heapreplace(self.slowest, batch)

    def slowest_batches(self) -> list[SlowBatch]:
        """Return the slowest batches, the slowest first."""
        return sorted(self.slowest, reverse=True)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a block of code to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            with self._lock:
                self.stages[stage] = self.stages.get(stage, 0.0) + spent

    @contextlib.contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        """Take the time of a block of code, which only waits for others, off that of a stage around it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.stages[stage] = self.stages.get(stage, 0.0) - (time.perf_counter() - start)

    def warn_once(self, text: str) -> None:
        """Keep a warning for the reporter, unless it was given before."""
        if text not in self.warnings:
            self.warnings.append(text)

    def progress(self, num_records: int | None) -> Progress:
        """Return how far the job is.

        Args:
            num_records: records to do in all, None where that is not known.
        """
        rate = self.num_done / max(self.seconds, 1e-9)
        left = None if num_records is None else max(num_records - self.num_all_done, 0)
        return Progress(
            num_done=self.num_all_done,
            num_records=num_records,
            num_bad=self.num_all_bad,
            seconds=self.seconds,
            rate=rate,
            seconds_left=left / rate if left is not None and rate else None,
            lanes=self.busy_fractions(_LATELY),
            memory=self.memory,
            nodes=self.num_nodes,
        )

    def busy_fractions(self, seconds: float = math.inf) -> dict[str, float]:
        """Return the part of the last seconds that each lane was busy, 0 to 1; by default of all the time."""
        if len(self.samples) < 2:
            return {}
        last = self.samples[-1]
        first = next(sample for sample in self.samples if last.seconds - sample.seconds <= seconds)
        if first is last:
            first = self.samples[-2]
        elapsed = max(last.seconds - first.seconds, 1e-9)
        return {
            name: min(1.0, (busy - first.lanes.get(name, 0.0)) / elapsed) for name, busy in last.lanes.items()
        }

    def stage_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each stage; on the lanes without waiting for them."""
        stages = dict(self.stages)
        if len(self.samples) > 1:
            stages["lanes"] = sum(self.lane_seconds().values())
        return {name: stages[name] for name in _STAGES if name in stages}

    def lane_seconds(self) -> dict[str, float]:
        """Return the seconds that each lane was busy."""
        if not self.samples:
            return {}
        first, last = self.samples[0].lanes, self.samples[-1].lanes
        return {name: busy - first.get(name, 0.0) for name, busy in last.items()}

    def summary(
        self, *, output: str, files: int, error_files: int, passed_over: Mapping[str, int]
    ) -> Summary:
        """Put together what was counted and what the output folder holds; see `Summary`."""
        seconds = self.seconds
        computed = self.cost + self.padding
        return Summary(
            num_records=self.num_all_done,
            num_earlier=self.num_earlier,
            num_bad=self.num_all_bad,
            seconds=seconds,
            rate=self.num_done / seconds if seconds else 0.0,
            padding=self.padding / computed if computed else 0.0,
            stages=self.stage_seconds(),
            lanes=self.busy_fractions(),
            files=files,
            output=output,
            error_files=error_files,
            passed_over=dict(passed_over),
            num_tokens=self.num_tokens,
            token_rate=self.num_tokens / seconds if seconds else 0.0,
        )
