"""Export of a batcher's statistics to Prometheus and OpenTelemetry, through their own client libraries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from .batcher import Batcher

_COUNTS = {
    "done": "calls answered",
    "failed": "calls that got an exception",
    "cancelled": "calls cancelled by their callers",
    "timed_out": "calls not answered in time",
    "refused": "calls refused because the queue was full",
    "batches": "batches run",
    "retried": "batches that raised and were run again in parts",
    "lost_slots": "places for batches whose lane was lost",
}
_GAUGES = {
    "num_queued": "calls in the queue",
    "num_outside": "calls that wait for room in the queue",
    "num_running": "calls in running batches",
    "num_suspect": "places for batches whose lanes hang",
    "batch_fill": "mean samples of a batch over its limit",
    "padding_waste": "share of all batches that was padding",
}
_DURATIONS = {
    "wait": "seconds from a call to the start of its batch",
    "run": "seconds from the start of a batch to its results",
}
_QUANTILES = ("p50", "p90", "p99")


def export_prometheus(batcher: Batcher, registry: Any = None, *, prefix: str = "asyncdp_batcher") -> Any:
    """Register a collector of `batcher.statistics()` with a Prometheus registry.

    Args:
        batcher: read at each scrape.
        registry: a `prometheus_client.CollectorRegistry`; the client's default one if None.
        prefix: of every metric's name.

    Returns:
        The registered collector, for `registry.unregister`.

    Raises:
        MissingExtraError: `prometheus_client` is not installed.
    """
    try:
        import prometheus_client
    except ImportError as error:
        raise MissingExtraError("export to Prometheus", "prometheus_client", "metrics") from error
    registry = prometheus_client.REGISTRY if registry is None else registry
    collector = _Collector(batcher, prefix)
    registry.register(collector)
    return collector


class _Collector:
    def __init__(self, batcher: Batcher, prefix: str) -> None:
        self._batcher = batcher
        self._prefix = prefix

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of one scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._batcher.statistics()
        for name, text in _COUNTS.items():
            yield CounterMetricFamily(f"{self._prefix}_{name}", text, value=getattr(stats, f"num_{name}"))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"{self._prefix}_{name}", text, value=getattr(stats, name))
        for name, text in _DURATIONS.items():
            family = GaugeMetricFamily(f"{self._prefix}_{name}_seconds", text, labels=["quantile"])
            for quantile in _QUANTILES:
                family.add_metric([quantile], getattr(getattr(stats, name), quantile))
            yield family


def export_opentelemetry(batcher: Batcher, meter: Any = None, *, prefix: str = "asyncdp.batcher") -> None:
    """Make observable instruments that read `batcher.statistics()`.

    Args:
        batcher: read at each collection.
        meter: an `opentelemetry.metrics.Meter`; the global provider's if None.
        prefix: of every instrument's name.

    Raises:
        MissingExtraError: `opentelemetry` is not installed.
    """
    try:
        from opentelemetry import metrics
    except ImportError as error:
        raise MissingExtraError("export to OpenTelemetry", "opentelemetry-api", "metrics") from error
    meter = metrics.get_meter("asyncdp") if meter is None else meter

    def value(name: str, _options: object) -> Iterable[Any]:
        return [metrics.Observation(getattr(batcher.statistics(), name))]

    def quantiles(name: str, _options: object) -> Iterable[Any]:
        percentiles = getattr(batcher.statistics(), name)
        return [
            metrics.Observation(getattr(percentiles, quantile), {"quantile": quantile})
            for quantile in _QUANTILES
        ]

    for name, text in _COUNTS.items():
        read = partial(value, f"num_{name}")
        meter.create_observable_counter(f"{prefix}.{name}", [read], description=text)
    for name, text in _GAUGES.items():
        meter.create_observable_gauge(f"{prefix}.{name}", [partial(value, name)], description=text)
    for name, text in _DURATIONS.items():
        read = partial(quantiles, name)
        meter.create_observable_gauge(f"{prefix}.{name}", [read], unit="s", description=text)
