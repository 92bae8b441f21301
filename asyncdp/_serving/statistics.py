"""The statistics of a batcher."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .call import CallState, Request

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
        """Compute the percentiles of some durations, by the nearest rank."""
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
    """Calls in running batches, including those that were cancelled or timed out, and in batches that
    raised and run again in parts."""
    num_done: int
    """Calls whose results were handed over."""
    num_failed: int
    """Calls that got an exception: of their own sample, of a lost device or of a closed batcher."""
    num_cancelled: int
    """Calls cancelled before their outcome was handed over."""
    num_timed_out: int
    num_refused: int
    """Calls of `call_nowait` that found the queue full."""
    num_batches: int
    num_retried: int
    """Batches that raised and were run again in parts."""
    num_lost_slots: int
    """Places for batches that are gone with their lanes; one that moved to a spare lane is not."""
    num_suspect: int
    """Places for batches whose lanes hang, by `hang_timeout`; others are used until they answer."""
    batch_fill: float
    """Mean samples of a batch over `max_batch_size`, from 0 to 1."""
    padding_waste: float
    """Share of all batches that was padding, by `size_of`, from 0 to 1."""
    wait: Percentiles
    """From a call to the start of its batch."""
    run: Percentiles
    """From the start of a batch to its results."""


@dataclass
class Recorder:
    """Collects what `BatcherStatistics` shows; its `num_x` are fields of those."""

    max_batch_size: int
    num_refused: int = 0
    num_batches: int = 0
    num_retried: int = 0
    num_lost_slots: int = 0
    outcomes: Counter[CallState] = field(default_factory=Counter)
    runs: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    _waits: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    _num_samples: int = 0
    _total_size: float = 0.0
    _padded_size: float = 0.0

    def on_batch(self, calls: Sequence[Request], now: float) -> None:
        """Count a batch whose calls have waited until now."""
        sizes = [call.size for call in calls]
        self._waits.extend([now - call.arrived for call in calls])
        self.num_batches += 1
        self._num_samples += len(calls)
        self._total_size += sum(sizes)
        self._padded_size += len(calls) * max(sizes)

    def statistics(
        self, num_queued: int, num_outside: int, num_running: int, num_suspect: int
    ) -> BatcherStatistics:
        """Return the statistics of this moment."""
        capacity = self.num_batches * self.max_batch_size
        return BatcherStatistics(
            num_queued=num_queued,
            num_outside=num_outside,
            num_running=num_running,
            num_suspect=num_suspect,
            num_done=self.outcomes[CallState.DONE],
            num_failed=self.outcomes[CallState.FAILED],
            num_cancelled=self.outcomes[CallState.CANCELLED],
            num_timed_out=self.outcomes[CallState.TIMED_OUT],
            batch_fill=self._num_samples / capacity if capacity else 0.0,
            padding_waste=1 - self._total_size / self._padded_size if self._padded_size else 0.0,
            wait=Percentiles.of(self._waits),
            run=Percentiles.of(self.runs),
            **{name: count for name, count in vars(self).items() if name.startswith("num_")},
        )
