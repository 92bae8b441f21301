"""What a batcher tells about itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_NUM_KEPT = 4096  # the latest durations, which percentiles are made of


@dataclass(frozen=True)
class Percentiles:
    """Durations of the latest calls or batches, in seconds; zeros before the first."""

    p50: float
    p90: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Percentiles:
        """The percentiles of some durations, by the nearest rank."""
        ordered = sorted(seconds)
        if not ordered:
            return cls(0.0, 0.0, 0.0, 0.0)
        p50, p90, p99 = (ordered[int(len(ordered) * share)] for share in (0.5, 0.9, 0.99))
        return cls(p50, p90, p99, ordered[-1])


@dataclass(frozen=True)
class BatcherStatistics:
    """A batcher at one moment; the counts run from its creation."""

    num_queued: int
    """Calls in the queue."""
    num_outside: int
    """Calls that wait for room in the queue."""
    num_running: int
    """Calls in batches under way, those that were given up included."""
    num_done: int
    """Calls whose results were handed over."""
    num_failed: int
    """Calls that got an exception: of their own sample, of a lost device or of a closed batcher."""
    num_cancelled: int
    """Calls given up before their outcome was handed over."""
    num_timed_out: int
    num_refused: int
    """Calls of `call_nowait` that found the queue full."""
    num_batches: int
    num_retried: int
    """Batches that raised and were run again sample by sample."""
    num_lost_slots: int
    """Places for batches that are gone with their lanes; one that moved to a spare lane is not."""
    batch_fill: float
    """Mean samples of a batch over `max_batch_size`, from 0 to 1."""
    padding_waste: float
    """Share of all batches that was padding, by `size_of`, from 0 to 1."""
    wait: Percentiles
    """From a call to the start of its batch."""
    run: Percentiles
    """From the start of a batch to its results."""


class Recorder:
    """Collects what `BatcherStatistics` tells."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self.waits: deque[float] = deque(maxlen=_NUM_KEPT)
        self.runs: deque[float] = deque(maxlen=_NUM_KEPT)
        self.num_running = 0
        self.num_done = 0
        self.num_failed = 0
        self.num_cancelled = 0
        self.num_timed_out = 0
        self.num_refused = 0
        self.num_batches = 0
        self.num_retried = 0
        self.num_lost_slots = 0
        self._num_samples = 0
        self._total_size = 0.0
        self._padded_size = 0.0

    def batch(self, sizes: Sequence[float], waits: Sequence[float]) -> None:
        """Count a batch: the sizes of its samples, where those matter, and how long they waited."""
        self.waits.extend(waits)
        self.num_batches += 1
        self._num_samples += len(waits)
        if sizes:
            self._total_size += sum(sizes)
            self._padded_size += len(sizes) * max(sizes)

    def snapshot(self, num_queued: int, num_outside: int) -> BatcherStatistics:
        """Make the statistics of this moment."""
        capacity = self.num_batches * self._max_batch_size
        return BatcherStatistics(
            num_queued=num_queued,
            num_outside=num_outside,
            num_running=self.num_running,
            num_done=self.num_done,
            num_failed=self.num_failed,
            num_cancelled=self.num_cancelled,
            num_timed_out=self.num_timed_out,
            num_refused=self.num_refused,
            num_batches=self.num_batches,
            num_retried=self.num_retried,
            num_lost_slots=self.num_lost_slots,
            batch_fill=self._num_samples / capacity if capacity else 0.0,
            padding_waste=1 - self._total_size / self._padded_size if self._padded_size else 0.0,
            wait=Percentiles.of(self.waits),
            run=Percentiles.of(self.runs),
        )
