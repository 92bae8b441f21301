"""Export of a batcher's statistics through the clients of Prometheus and OpenTelemetry."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest

from asyncdp import Batcher, Runtime, export_opentelemetry, export_prometheus
from asyncdp.errors import MissingExtraError

pytestmark = pytest.mark.anyio


async def test_prometheus_reads_the_statistics() -> None:
    """A scrape shows counts, gauges and quantiles of the moment."""
    registry = CollectorRegistry()
    async with Runtime("cpu") as runtime, Batcher(lambda x: x, runtime=runtime) as batcher:
        collector = export_prometheus(batcher, registry)
        await batcher(torch.zeros(1))
        text = generate_latest(registry).decode()
        registry.unregister(collector)
    assert "asyncdp_batcher_done_total 1.0" in text
    assert "asyncdp_batcher_num_queued 0.0" in text
    assert 'asyncdp_batcher_wait_seconds{quantile="p99"}' in text


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider
    provider.shutdown()


async def test_opentelemetry_reads_the_statistics(
    reader: InMemoryMetricReader, provider: MeterProvider
) -> None:
    """A collection shows the same."""
    async with Runtime("cpu") as runtime, Batcher(lambda x: x, runtime=runtime) as batcher:
        export_opentelemetry(batcher, provider.get_meter("test"))
        await batcher(torch.zeros(1))
        data = reader.get_metrics_data()
    assert data is not None
    found = {
        metric.name: [point.value for point in metric.data.data_points]  # type: ignore[union-attr]
        for metric in data.resource_metrics[0].scope_metrics[0].metrics
    }
    assert found["asyncdp.batcher.done"] == [1]
    assert len(found["asyncdp.batcher.run"]) == 3


@pytest.mark.parametrize(
    ("export", "package"),
    [(export_prometheus, "prometheus_client"), (export_opentelemetry, "opentelemetry")],
)
def test_missing_client_is_told(export: object, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the client library the export says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=package):
        export(None)  # type: ignore[operator]
