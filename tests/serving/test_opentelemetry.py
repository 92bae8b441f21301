"""Metrics and spans by the API of OpenTelemetry, seen through its SDK, and without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from asyncdp import Batcher, Runtime, export_opentelemetry
from asyncdp.errors import CallTimeoutError, DuplicateNameError

pytestmark = pytest.mark.anyio


def check(batch: torch.Tensor) -> torch.Tensor:
    if bool((batch < 0).any()):
        raise ValueError("negative")
    return batch


class Metrics:
    """What one meter collects."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
        self.meter = self.provider.get_meter("test")

    def collect(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        metrics = data.resource_metrics[0].scope_metrics[0].metrics
        assert len({metric.name for metric in metrics}) == len(metrics)
        return {metric.name: metric for metric in metrics}

    def points(self, name: str) -> dict[tuple[str, ...], Any]:
        """Return the points of an instrument by the values of their attributes."""
        metric = self.collect().get(f"asyncdp.batcher.{name}")
        return (
            {tuple(point.attributes.values()): point for point in metric.data.data_points} if metric else {}
        )


class Spans:
    """What one tracer has ended."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == f"asyncdp.batcher.{name}"]


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics()
    yield made
    made.provider.shutdown()


@pytest.fixture
def spans() -> Iterator[Spans]:
    made = Spans()
    yield made
    made.provider.shutdown()


def linked(span: ReadableSpan) -> set[int]:
    return {link.context.span_id for link in span.links}


def ids(spans: list[ReadableSpan]) -> set[int]:
    return {span.get_span_context().span_id for span in spans}  # type: ignore[union-attr]


async def test_instruments_have_units_attributes_and_values(metrics: Metrics) -> None:
    """Counters, gauges and histograms show what the statistics say, each with its unit and its batcher."""
    async with Runtime("cpu") as runtime, Batcher(check, runtime=runtime, pad=0, name="text") as batcher:
        export_opentelemetry(batcher, metrics.meter)
        calls = [batcher.call_nowait(torch.ones(length)) for length in (1, 3)]
        for call in calls:
            await call
        with pytest.raises(ValueError, match="negative"):
            await batcher(-torch.ones(1))
        found = metrics.collect()
        assert {name: metric.unit for name, metric in found.items()} == {
            "asyncdp.batcher.done": "{call}",
            "asyncdp.batcher.failed": "{call}",
            "asyncdp.batcher.cancelled": "{call}",
            "asyncdp.batcher.timed_out": "{call}",
            "asyncdp.batcher.refused": "{call}",
            "asyncdp.batcher.batches": "{batch}",
            "asyncdp.batcher.samples": "{sample}",
            "asyncdp.batcher.real_tokens": "{token}",
            "asyncdp.batcher.padding_tokens": "{token}",
            "asyncdp.batcher.retried": "{batch}",
            "asyncdp.batcher.hung": "{batch}",
            "asyncdp.batcher.lost_slots": "{slot}",
            "asyncdp.batcher.num_queued": "{call}",
            "asyncdp.batcher.num_outside": "{call}",
            "asyncdp.batcher.num_running": "{call}",
            "asyncdp.batcher.num_suspect": "{slot}",
            "asyncdp.batcher.batch_fill": "1",
            "asyncdp.batcher.padding_waste": "1",
            "asyncdp.batcher.queue_wait": "s",
            "asyncdp.batcher.run": "s",
            "asyncdp.batcher.end_to_end": "s",
            "asyncdp.batcher.batch_size": "{sample}",
        }
        assert all(metric.description.endswith(".") for metric in found.values())
        assert metrics.points("done")["text",].value == 2
        assert metrics.points("failed")["text", "ValueError"].value == 1
        assert metrics.points("padding_tokens")["text",].value == 2
        sizes = metrics.points("batch_size")["text",]
        assert (sizes.count, sizes.sum) == (2, 3)
        assert sizes.explicit_bounds[:3] == (1, 2, 4)
        assert metrics.points("end_to_end")["text",].count == 2
        assert 0 < metrics.points("run")["text",].explicit_bounds[0] < 0.01


async def test_two_batchers_lose_no_series_and_leave_when_closed(metrics: Metrics) -> None:
    """Batchers of one meter share its instruments; a closed one has no series any more."""
    async with Runtime("cpu") as runtime:
        async with Batcher(check, runtime=runtime) as first, Batcher(check, runtime=runtime) as second:
            export_opentelemetry(first, metrics.meter, name="a")
            with pytest.raises(DuplicateNameError):
                export_opentelemetry(second, metrics.meter, name="a")
            export_opentelemetry(second, metrics.meter)
            for batcher in (first, second, second):
                await batcher(torch.ones(1))
            done = {name: point.value for (name,), point in metrics.points("done").items()}
            assert done == {"a": 1, "batcher": 2}
            assert {name for (name,) in metrics.points("run")} == {"a", "batcher"}
            await first.aclose()
            assert set(metrics.points("done")) == {("batcher",)}
        assert metrics.points("done") == {}
        async with Batcher(check, runtime=runtime) as third:
            export_opentelemetry(third, metrics.meter, name="a")
            assert set(metrics.points("done")) == {("a",)}


async def test_a_span_of_each_call_is_linked_with_that_of_its_batch(spans: Spans) -> None:
    """A call's span is its caller's child, spans its wait, and is linked with its batch both ways."""
    async with Runtime("cpu") as runtime, Batcher(check, runtime=runtime, max_wait=0.05, name="x") as batcher:
        export_opentelemetry(batcher, tracer=spans.tracer)

        async def request(number: int) -> None:
            with spans.tracer.start_as_current_span(f"request {number}"):
                await batcher(torch.ones(1))

        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(request, number)
    calls, (batch,) = spans.named("call"), spans.named("batch")
    requests = {
        span.get_span_context().span_id: span  # type: ignore[union-attr]
        for span in spans.exporter.get_finished_spans()
        if span.name.startswith("request")
    }
    assert {call.parent.span_id for call in calls if call.parent} == set(requests)
    assert linked(batch) == ids(calls)
    assert len(calls) == 3
    assert batch.parent is None
    attributes = dict(batch.attributes or {})
    assert attributes["batcher"] == "x"
    assert attributes["asyncdp.batch.size"] == 3
    for call in calls:
        assert linked(call) == ids([batch])
        assert dict(call.attributes or {}) == {"batcher": "x", "asyncdp.outcome": "done"}
        assert call.start_time <= batch.start_time < batch.end_time <= call.end_time  # type: ignore[operator]
        assert call.status.status_code is StatusCode.UNSET


async def test_spans_tell_what_failed(spans: Spans) -> None:
    """A bad sample's call and every run with it are errors; its neighbours are linked with all their runs."""
    async with Runtime("cpu") as runtime, Batcher(check, runtime=runtime) as batcher:
        export_opentelemetry(batcher, tracer=spans.tracer)
        await batcher(torch.ones(1))
        spans.exporter.clear()
        calls = [batcher.call_nowait(torch.full((1,), number)) for number in (1.0, -1.0)]
        await calls[0]
        with pytest.raises(ValueError, match="negative"):
            await calls[1]
    good, bad = sorted(spans.named("call"), key=lambda span: span.status.status_code is StatusCode.ERROR)
    assert (bad.attributes or {})["error.type"] == "ValueError"
    assert bad.status.description == "negative"
    runs = spans.named("batch")
    failed = [run for run in runs if run.status.status_code is StatusCode.ERROR]
    assert ids(failed) <= linked(bad)
    assert linked(good) & ids(failed)
    assert linked(good) - ids(failed)
    assert {(run.attributes or {})["asyncdp.batch.is_retry"] for run in runs} == {False, True}


async def test_calls_that_no_batch_answers_have_spans_that_end(spans: Spans) -> None:
    """A cancelled call, and one whose time is over, end their spans with their outcome."""
    async with Runtime("cpu") as runtime, Batcher(check, runtime=runtime, max_wait=30) as batcher:
        export_opentelemetry(batcher, tracer=spans.tracer)
        assert batcher.call_nowait(torch.ones(1)).cancel()
        with pytest.raises(CallTimeoutError):
            await batcher(torch.ones(1), timeout=0.01)
    cancelled, late = spans.named("call")
    assert (cancelled.attributes or {})["asyncdp.outcome"] == "cancelled"
    assert cancelled.status.status_code is StatusCode.UNSET
    assert (late.attributes or {})["asyncdp.outcome"] == "timed out"
    assert (late.attributes or {})["error.type"] == "CallTimeoutError"
    assert spans.named("batch") == []


async def test_calls_from_before_the_export_have_no_spans(spans: Spans) -> None:
    """A batch may hold both: only what was called since then is in its links."""
    async with Runtime("cpu") as runtime, Batcher(check, runtime=runtime) as batcher:
        early = batcher.call_nowait(torch.ones(1))
        export_opentelemetry(batcher, tracer=spans.tracer)
        late = batcher.call_nowait(torch.ones(1))
        await early
        await late
    assert len(spans.named("call")) == 1
    (batch,) = spans.named("batch")
    assert linked(batch) == ids(spans.named("call"))
    assert (batch.attributes or {})["asyncdp.batch.size"] == 2


async def test_without_an_sdk_nothing_happens() -> None:
    """The API alone makes no metric and no span, and calls are answered."""
    async with Runtime("cpu") as runtime, Batcher(check, runtime=runtime) as batcher:
        export_opentelemetry(batcher)
        assert await batcher(torch.ones(1)) == 1
        with pytest.raises(ValueError, match="negative"):
            await batcher(-torch.ones(1))
        call = batcher.call_nowait(torch.ones(1))
        assert call.cancel()


class Broken(SpanProcessor):
    """Raises at every span."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("no room")

    def on_end(self, span: Any) -> None:
        raise RuntimeError("no room")


class BrokenAtEnds(Broken):
    """Raises when a span ends."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        pass


@pytest.fixture(params=[Broken, BrokenAtEnds])
def broken(request: pytest.FixtureRequest) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(request.param())
    return provider


async def test_a_broken_exporter_harms_no_call(
    broken: TracerProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """What the SDK raises is a warning; every call gets its own result or error."""
    async with Runtime("cpu") as runtime, Batcher(check, runtime=runtime) as batcher:
        export_opentelemetry(batcher, tracer=broken.get_tracer("test"))
        assert await batcher(torch.ones(1)) == 1
        with pytest.raises(ValueError, match="negative"):
            await batcher(-torch.ones(1))
    assert "no room" in caplog.text
