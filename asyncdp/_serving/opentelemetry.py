"""Instruments and spans of the OpenTelemetry API."""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics, trace
from opentelemetry.context import Context

from .call import CallState, Request
from .instruments import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    Instrument,
    choose_name,
    counts_of,
    dispatcher_to_export,
)
from .statistics import Run

if TYPE_CHECKING:
    from .batcher import Batcher
    from .dispatcher import Dispatcher

_logger = logging.getLogger("asyncdp")

_exported: weakref.WeakKeyDictionary[Any, dict[str, _Instruments]] = weakref.WeakKeyDictionary()
"""The instruments of each meter and prefix: making them again would lose one of two batchers."""


@functools.cache
def default_meter() -> Any:
    """Return one and the same meter of the global provider, also of one that is set later."""
    return metrics.get_meter("asyncdp")


class _Instruments:
    """The instruments of one meter, which show every batcher that is open.

    The API cannot unregister an instrument: what is gone is a batcher's series.
    """

    def __init__(self, meter: Any, prefix: str) -> None:
        self.dispatchers: dict[str, Dispatcher] = {}
        for make, instruments in (
            (meter.create_observable_counter, COUNTERS),
            (meter.create_observable_gauge, GAUGES),
        ):
            for each in instruments:
                read = functools.partial(self._read, each)
                make(f"{prefix}.{each.name}", [read], unit=each.unit, description=each.text)
        self.histograms = {
            each: meter.create_histogram(
                f"{prefix}.{each.name}",
                unit=each.unit,
                description=each.text,
                explicit_bucket_boundaries_advisory=each.bounds,
            )
            for each in HISTOGRAMS
        }

    def _read(self, instrument: Instrument, _options: object) -> Iterable[Any]:
        return [
            metrics.Observation(value, {"batcher": name, **labels})
            for name, dispatcher in list(self.dispatchers.items())
            for labels, value in instrument.values(counts_of(dispatcher))
        ]


class _TracedRequest(Request):
    """A call with a span, from the call until somebody has its outcome."""

    __slots__ = ("span",)
    span: trace.Span

    def _count(self) -> None:
        if not self._is_counted:
            try:
                self.span.set_attribute("asyncdp.outcome", self.state.value)
                if self._error is not None and self.state is not CallState.CANCELLED:
                    _mark_failed(self.span, self._error)
                self.span.end()
            except Exception:
                _logger.warning("the span of a call could not be ended", exc_info=True)
        super()._count()


class Export:
    """One batcher, with its instruments and spans."""

    def __init__(
        self, batcher: Batcher, meter: Any, prefix: str, name: str | None, tracer: trace.Tracer | None
    ) -> None:
        self._dispatcher = dispatcher = dispatcher_to_export(batcher)
        meter = default_meter() if meter is None else meter
        of_meter = _exported.setdefault(meter, {})
        if prefix not in of_meter:
            of_meter[prefix] = _Instruments(meter, prefix)
        self._instruments = of_meter[prefix]
        self._name = choose_name(
            dispatcher.recorder.name if name is None else name, self._instruments.dispatchers
        )
        self._labels = {"batcher": self._name}
        self._tracer = trace.get_tracer("asyncdp") if tracer is None else tracer
        self._prefix = prefix
        self._instruments.dispatchers[self._name] = dispatcher
        dispatcher.recorder.observers.append(self)
        dispatcher.make_request = self._make_request

    def _make_request(self, *args: Any) -> Request:
        """Make a request with a span, whose parent is the caller's."""
        try:
            span = self._tracer.start_span(f"{self._prefix}.call", attributes=self._labels)
        except Exception:
            _logger.warning("the span of a call could not be begun", exc_info=True)
            return Request(*args)
        request = _TracedRequest(*args)
        request.span = span
        return request

    def on_run(self, run: Run) -> None:
        """Add a batch to the histograms, and make its span, linked with those of its calls."""
        for histogram, recorded in self._instruments.histograms.items():
            for value in histogram.measure(run):
                recorded.record(value, self._labels)
        calls = [call.span for call in run.calls if isinstance(call, _TracedRequest)]
        contexts = [span.get_span_context() for span in calls]
        ended = time.time_ns()
        span = self._tracer.start_span(
            f"{self._prefix}.batch",
            Context(),  # of no caller's trace, since it is in the traces of all
            attributes={
                **self._labels,
                "asyncdp.batch.size": len(run.calls),
                "asyncdp.batch.place": run.place,
                "asyncdp.batch.is_retry": run.is_retry,
            },
            links=[trace.Link(context) for context in contexts if context.is_valid],
            start_time=ended - round((run.ended - run.started) * 1e9),
        )
        if run.error is not None:
            _mark_failed(span, run.error)
        for call in calls:
            if call.is_recording():  # else it has ended, by a cancellation
                call.add_link(span.get_span_context())
        span.end(ended)

    def on_closed(self) -> None:
        """Take the batcher's series out of the instruments."""
        self._instruments.dispatchers.pop(self._name, None)


def _mark_failed(span: trace.Span, error: BaseException) -> None:
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))
