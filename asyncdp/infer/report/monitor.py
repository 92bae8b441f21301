"""What a job counts while it runs, for people and for the summary."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

_STAGES = ("read", "preprocess", "collate", "lanes", "postprocess", "write")


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


@dataclasses.dataclass
class Monitor:
    """Counters of one job; written from the loop and its workers, read by the reporter.

    Attributes:
        num_earlier: records that an earlier run had finished.
        stages: seconds spent in each stage but the lanes, summed over its workers.
    """

    num_earlier: int = 0
    num_earlier_bad: int = 0
    num_done: int = 0
    num_bad: int = 0
    num_batches: int = 0
    cost: int = 0
    padding: int = 0
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
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

    def warn_once(self, text: str) -> None:
        """Keep a warning for the reporter, unless it was given before."""
        if text not in self.warnings:
            self.warnings.append(text)

    def busy_fractions(self) -> dict[str, float]:
        """Return the part of the time that each lane was busy, 0 to 1."""
        if len(self.samples) < 2:
            return {}
        elapsed = max(self.samples[-1].seconds - self.samples[0].seconds, 1e-9)
        return {name: min(1.0, busy / elapsed) for name, busy in self._busy_seconds().items()}

    def stage_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each stage; on the lanes without waiting for them."""
        stages = dict(self.stages)
        if len(self.samples) > 1:
            stages["lanes"] = sum(self._busy_seconds().values())
        return {name: stages[name] for name in _STAGES if name in stages}

    def _busy_seconds(self) -> dict[str, float]:
        first, last = self.samples[0].lanes, self.samples[-1].lanes
        return {name: busy - first.get(name, 0.0) for name, busy in last.items()}
