"""What is exported of a batcher: the instruments, their units and values, whatever the client library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._checks import shown
from ..errors import (
    BatcherClosedError,
    DeviceLostError,
    DuplicateNameError,
    EngineCancelledError,
    LaneHungError,
)
from .batcher import Batcher
from .call import BatcherState, CallState
from .statistics import REASONS, Run, check_name

if TYPE_CHECKING:
    from .dispatcher import Dispatcher

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_KINDS = tuple(error.__name__ for error in (DeviceLostError, LaneHungError, EngineCancelledError))
_UNIT_SUFFIXES = {"s": "_seconds", "1": "_ratio"}


@dataclass(frozen=True)
class _Described:
    """What every instrument has.

    Attributes:
        name: without the prefix.
        unit: as OpenTelemetry writes units.
        text: what it counts or shows.
    """

    name: str
    unit: str
    text: str

    @property
    def prometheus_name(self) -> str:
        """The name with its unit."""
        return self.name + _UNIT_SUFFIXES.get(self.unit, "")


@dataclass(frozen=True)
class Instrument(_Described):
    """A counter or a gauge, read from the statistics.

    Attributes:
        field: of `BatcherStatistics`.
        label: what tells its series apart, if the field is a mapping.
        known: values of the label that are there from the beginning, since rates miss the first of a series.
    """

    field: str
    label: str | None = None
    known: Sequence[str] = ()

    def values(self, counts: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], float]]:
        """Yield the labels and the value of each series."""
        value = counts[self.field]
        if self.label is None:
            yield {}, value
        else:
            for key, count in {**dict.fromkeys(self.known, 0), **value}.items():
                yield {self.label: key}, count


@dataclass(frozen=True)
class Histogram(_Described):
    """A histogram, fed by each batch that has run.

    Attributes:
        bounds: upper bounds of its buckets.
        measure: returns the values that a batch adds.
    """

    bounds: Sequence[float]
    measure: Callable[[Run], Sequence[float]]


COUNTERS = (
    Instrument("done", "{call}", "Calls that got their result.", "num_done"),
    Instrument("failed", "{call}", "Calls that got an exception, by its class.", "failures", "kind", _KINDS),
    Instrument("cancelled", "{call}", "Calls cancelled by their callers.", "num_cancelled"),
    Instrument("timed_out", "{call}", "Calls not answered in time, by where they were.", "timeouts", "stage"),
    Instrument(
        "refused", "{call}", "Calls that were not queued, by the reason.", "refused", "reason", REASONS
    ),
    Instrument("batches", "{batch}", "Batches taken from the queue.", "num_batches"),
    Instrument("samples", "{sample}", "Samples of those batches.", "num_samples"),
    Instrument("real_tokens", "{token}", "Lengths of those samples, added up.", "real_tokens"),
    Instrument("padding_tokens", "{token}", "What padding added to those lengths.", "padding_tokens"),
    Instrument("retried", "{batch}", "Batches that raised and were run again in parts.", "num_retried"),
    Instrument("hung", "{batch}", "Batches that made their lane suspect.", "num_hung"),
    Instrument("lost_slots", "{slot}", "Places for batches whose lane was lost.", "num_lost_slots"),
)

GAUGES = (
    Instrument("num_queued", "{call}", "Calls in the queue.", "num_queued"),
    Instrument("num_outside", "{call}", "Calls that wait for room in the queue.", "num_outside"),
    Instrument("num_running", "{call}", "Calls in running batches.", "num_running"),
    Instrument("num_suspect", "{slot}", "Places for batches whose lanes hang.", "num_suspect"),
    Instrument("batch_fill", "1", "Mean samples of a batch over its limit.", "batch_fill"),
    Instrument("padding_waste", "1", "Share of all batches that was padding.", "padding_waste"),
)


def _waits(run: Run) -> Sequence[float]:
    return [] if run.is_retry else [run.started - call.arrived for call in run.calls if not call.has_run]


def _ends(run: Run) -> Sequence[float]:
    if run.error is not None:
        return []
    return [run.ended - call.arrived for call in run.calls if call.state is CallState.PENDING]


HISTOGRAMS = (
    Histogram("queue_wait", "s", "From a call to the start of its batch.", _SECONDS, _waits),
    Histogram(
        "run",
        "s",
        "From the start of a batch, or of a part that ran again, to its end.",
        _SECONDS,
        lambda run: [run.ended - run.started],
    ),
    Histogram("end_to_end", "s", "From a call to its result.", _SECONDS, _ends),
    Histogram(
        "batch_size",
        "{sample}",
        "Samples of a batch.",
        _SAMPLES,
        lambda run: [] if run.is_retry or all(call.has_run for call in run.calls) else [len(run.calls)],
    ),
)


def counts_of(dispatcher: Dispatcher) -> Mapping[str, Any]:
    """Return the values of all counters and gauges; from any thread."""
    return {**dispatcher.recorder.counts(), **dispatcher.counts()}


def dispatcher_to_export(batcher: Batcher) -> Dispatcher:
    """Return the dispatcher of a batcher that has not ended.

    Raises:
        BatcherClosedError: it has.
        TypeError: it is no batcher.
    """
    if not isinstance(batcher, Batcher):
        raise TypeError(f"batcher must be an asyncdp.Batcher, but got {shown(batcher)}.")
    dispatcher = batcher._dispatcher
    if dispatcher.state is BatcherState.CLOSED:
        raise BatcherClosedError("a closed batcher has nothing to export")
    return dispatcher


def choose_name(asked: str | None, taken: Mapping[str, object]) -> str:
    """Return the `batcher` label of one more batcher.

    Raises:
        DuplicateNameError: another batcher has the name that was asked for.
        ValueError: it is no name.
    """
    check_name(asked)
    if asked is None:
        names = ("batcher" if number == 1 else f"batcher-{number}" for number in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken)
    if asked in taken:
        raise DuplicateNameError(asked)
    return asked
