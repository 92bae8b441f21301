"""The statistics of a batcher."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from .._checks import shown
from .._runtime import trace
from ..errors import BatcherClosedError, DeviceLostError, QueueFullError
from .call import CallState, Outcomes, Request
from .collate import Padding

_NUM_KEPT = 4096  # the latest durations, which percentiles are made of

_logger = logging.getLogger("asyncdp")

_REASONS = {QueueFullError: "queue_full", BatcherClosedError: "closed", DeviceLostError: "device_lost"}
INVALID = "invalid"
REASONS = (*_REASONS.values(), INVALID)
"""Why a call may be refused."""


def check_name(name: object) -> None:
    """Raise `ValueError` unless metrics can be labelled by this name, or there is none."""
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"the name of a batcher must be a text that is not empty, but got {shown(name)}.")


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
    """Calls that were not queued, see `refused`."""
    num_batches: int
    """Batches taken from the queue; what runs again, after a batch that raised, is not counted again."""
    num_samples: int
    """Samples of those batches."""
    num_retried: int
    """Batches that raised and were run again in parts."""
    num_lost_slots: int
    """Places for batches that are gone with their lanes; one that moved to a spare lane is not."""
    num_suspect: int
    """Places for batches whose lanes hang, by `hang_timeout`; others are used until they answer."""
    num_hung: int
    """Batches that have made their lane suspect."""
    real_tokens: float
    """Sum of the lengths of the samples, by `size_of`. Without it, elements of the tensors that the default
    `collate` pads."""
    padding_tokens: float
    """What padding each sample to the longest one of its batch adds to those."""
    batch_fill: float
    """Mean samples of a batch over `max_batch_size`, from 0 to 1."""
    padding_waste: float
    """Share of all batches that was padding, from 0 to 1."""
    failures: Mapping[str, int]
    """Calls that got an exception, by its class."""
    timeouts: Mapping[str, int]
    """Calls not answered in time, by where they were then: `queued`, so that they never ran, or `running`."""
    refused: Mapping[str, int]
    """Calls that were not queued, by the reason: `queue_full` (of `call_nowait`), `closed`, `device_lost`, or
    `invalid` arguments."""
    wait: Percentiles
    """From a call to the start of its batch."""
    run: Percentiles
    """From the start of a batch to its results."""


class Run(NamedTuple):
    """A batch, or a part of one that raised, that has run.

    Attributes:
        calls: of the batch; those with a result are told of it later.
        started, ended: in seconds, by `time.perf_counter`.
        place: where it ran.
        is_retry: whether it was a part of a batch that raised.
        error: what it raised.
    """

    calls: Sequence[Request]
    started: float
    ended: float
    place: str
    is_retry: bool
    error: BaseException | None


class Observer(Protocol):
    """What is told of everything that one batcher does, on its event loop."""

    def on_run(self, run: Run) -> None:
        """Take note of a batch that has run."""

    def on_closed(self) -> None:
        """Take note that the batcher has ended."""


@dataclass
class Recorder:
    """Collects what `BatcherStatistics` shows; its `num_x` are fields of those."""

    max_batch_size: int
    name: str | None = None
    padding: Padding | None = None
    num_batches: int = 0
    num_samples: int = 0
    num_retried: int = 0
    num_lost_slots: int = 0
    num_hung: int = 0
    outcomes: Outcomes = field(default_factory=Outcomes)
    refused: Counter[str] = field(default_factory=Counter)
    runs: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    observers: list[Observer] = field(default_factory=list)
    _waits: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    _num_filled: int = 0  # places in batches
    _total_size: float = 0.0
    _padded_size: float = 0.0

    def on_refused(self, error: Exception, count: int = 1) -> None:
        """Count calls that were not queued."""
        self.refused[_REASONS.get(type(error), INVALID)] += count

    def on_batch(self, calls: Sequence[Request], now: float) -> None:
        """Count a batch whose calls have waited until now."""
        new = [call for call in calls if not call.has_run]
        if not new:
            return  # all of them are what is left of batches that raised, and were counted then
        self._waits.extend([now - call.arrived for call in new])
        self.num_batches += 1
        self.num_samples += len(new)
        self._num_filled += len(calls)
        self._total_size += sum(call.size for call in new)
        self._padded_size += len(new) * max(call.size for call in calls)

    def on_run(
        self,
        calls: Sequence[Request],
        started: float,
        place: str,
        is_retry: bool,
        error: BaseException | None,
    ) -> None:
        """Tell the observers of a batch that has run, before its calls get to know."""
        run = Run(calls, started, time.perf_counter(), place, is_retry, error)
        if trace.recorder is not None:
            self._trace(trace.recorder, run)
        for observer in tuple(self.observers):
            try:
                observer.on_run(run)
            except Exception:
                # What watches a service must not end it.
                _logger.warning("a metric or span of a batch could not be recorded", exc_info=True)

    def _trace(self, recorder: trace.TraceRecorder, run: Run) -> None:
        row = "batcher" if self.name is None else f"batcher {self.name}"
        size, padding = {"size": len(run.calls)}, self.padding_of(run)
        if not run.is_retry:
            arrived = min(call.arrived for call in run.calls)
            recorder.add(row, "queued", "batch", arrived, run.started, size)
        ran: dict[str, Any] = {**size, "place": run.place, "is_retry": run.is_retry}
        if padding is not None:
            ran["padding"] = padding
        if run.error is not None:
            ran["error"] = type(run.error).__name__
        recorder.add(row, "batch", "batch", run.started, run.ended, ran)

    def padding_of(self, run: Run) -> float | None:
        """Return the `padding_tokens` of a batch; None if nobody knows them."""
        if self.padding is None:
            sizes = [call.size for call in run.calls]
            longest = max(sizes)
            return len(sizes) * longest - sum(sizes) if longest else None
        return self.padding.take([call.sample for call in run.calls])

    def on_closed(self) -> None:
        """Tell the observers that the batcher has ended."""
        observers, self.observers = self.observers, []
        for observer in observers:
            observer.on_closed()

    def counts(self) -> dict[str, Any]:
        """Return the fields of `BatcherStatistics` that need no computing; from any thread."""
        padding, capacity = self.padding, self.num_batches * self.max_batch_size
        if padding is None:
            real, padded = self._total_size, self._padded_size
        else:
            real, padded = padding.totals()
        num_expired, num_timed_out = self.outcomes.num_expired, self.outcomes[CallState.TIMED_OUT]
        return {
            "num_done": self.outcomes[CallState.DONE],
            "num_failed": self.outcomes[CallState.FAILED],
            "num_cancelled": self.outcomes[CallState.CANCELLED],
            "num_timed_out": num_timed_out,
            "timeouts": {"queued": num_expired, "running": num_timed_out - num_expired},
            "num_refused": self.refused.total(),
            "failures": dict(self.outcomes.failures),
            "refused": dict(self.refused),
            "real_tokens": real,
            "padding_tokens": padded - real,
            "padding_waste": 1 - real / padded if padded else 0.0,
            "batch_fill": self._num_filled / capacity if capacity else 0.0,
            **{name: count for name, count in vars(self).items() if name.startswith("num_")},
        }

    def statistics(self, **counts: Any) -> BatcherStatistics:
        """Return the statistics of this moment, with the counts of the dispatcher."""
        return BatcherStatistics(
            **self.counts(), **counts, wait=Percentiles.of(self._waits), run=Percentiles.of(self.runs)
        )
