"""Export of a batcher's metrics and spans, through the client libraries of Prometheus and OpenTelemetry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from .batcher import Batcher


def export_prometheus(
    batcher: Batcher, registry: Any = None, *, prefix: str = "asyncdp_batcher", name: str | None = None
) -> Any:
    """Register the metrics of a batcher with a Prometheus registry, until it is closed.

    Args:
        batcher: read at each scrape; its histograms begin now.
        registry: a `prometheus_client.CollectorRegistry`; the client's default one if None. It may hold any
            number of batchers.
        prefix: of every metric's name.
        name: the label `batcher` of all its series; the batcher's own name if None, else "batcher",
            "batcher-2" and so on.

    Returns:
        The registered collector, for `registry.unregister`; closing the batcher does that, too.

    Raises:
        MissingExtraError: `prometheus_client` is not installed.
        DuplicateNameError: another batcher there has this name.
        BatcherClosedError: the batcher is closed.
        ValueError: `name` is no text, or empty.
    """
    try:
        import prometheus_client
    except ImportError as error:
        raise MissingExtraError("export to Prometheus", "prometheus_client", "metrics") from error
    from .prometheus import Collector

    return Collector(batcher, prometheus_client.REGISTRY if registry is None else registry, prefix, name)


def export_opentelemetry(
    batcher: Batcher,
    meter: Any = None,
    *,
    prefix: str = "asyncdp.batcher",
    name: str | None = None,
    tracer: Any = None,
) -> None:
    """Make instruments of a batcher's metrics and spans of its calls and batches, until it is closed.

    A span of a call is a child of its caller's, and linked with the span of each batch that ran it. Without
    an SDK all of this does nothing.

    Args:
        batcher: read at each collection; its histograms begin now.
        meter: an `opentelemetry.metrics.Meter`; the global provider's if None. It may hold any number of
            batchers.
        prefix: of every instrument's and span's name.
        name: the attribute `batcher` of all of them; the batcher's own name if None, else "batcher",
            "batcher-2" and so on.
        tracer: an `opentelemetry.trace.Tracer`; the global provider's if None. `NoOpTracer()` makes no spans.

    Raises:
        MissingExtraError: `opentelemetry` is not installed.
        DuplicateNameError: another batcher there has this name.
        BatcherClosedError: the batcher is closed.
    """
    try:
        import opentelemetry.metrics  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("export to OpenTelemetry", "opentelemetry-api", "metrics") from error
    from .opentelemetry import Export

    Export(batcher, meter, prefix, name, tracer)
