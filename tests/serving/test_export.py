"""Export of a batcher's metrics and spans through the clients of Prometheus and OpenTelemetry."""

from __future__ import annotations

import gc
import re
import shutil
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest, openmetrics
from prometheus_client.openmetrics import exposition, parser  # noqa: F401
from prometheus_client.parser import text_string_to_metric_families

from asyncdp import Batcher, QueueFull, Runtime, export_opentelemetry, export_prometheus
from asyncdp.errors import BatcherClosedError, DuplicateNameError, MissingExtraError

from ..runtime.helpers import wait_until

pytestmark = pytest.mark.anyio

NAME = re.compile(r"asyncdp_batcher(_[a-z]+)+")


def check(batch: torch.Tensor) -> torch.Tensor:
    if bool((batch < 0).any()):
        raise ValueError("negative")
    return batch


@asynccontextmanager
async def batchers(*names: str | None, **options: Any) -> AsyncIterator[list[Batcher]]:
    async with Runtime("cpu") as runtime, AsyncExitStack() as stack:
        made = [Batcher(check, runtime=runtime, name=name, **options) for name in names]
        yield [await stack.enter_async_context(batcher) for batcher in made]


def values_of(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the samples of a scrape, by name and labels; each family must be there once."""
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert len({family.name for family in families}) == len(families)
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


def value(found: Any, name: str, **labels: str) -> Any:
    return found["asyncdp_batcher_" + name, frozenset(labels.items())]


async def run_some(batcher: Batcher) -> None:
    """Have 3 + 5 samples of length 1 to 5 padded, one of which is bad, and one more call refused."""
    for values in ([1.0] * 3, [1.0, 1.0, -1.0, 1.0, 1.0]):
        calls = [
            batcher.call_nowait(torch.full((length,), number)) for length, number in enumerate(values, 1)
        ]
        for call, number in zip(calls, values, strict=True):
            if number < 0:
                with pytest.raises(ValueError, match="negative"):
                    await call
            else:
                await call
    calls = [batcher.call_nowait(torch.ones(5)) for _ in range(8)]
    with pytest.raises(QueueFull):
        batcher.call_nowait(torch.ones(5))
    for call in calls:
        await call


async def test_prometheus_has_counters_gauges_and_histograms() -> None:
    """Every kind of count is a counter, durations and sizes are histograms, each labelled by its batcher."""
    registry = CollectorRegistry()
    async with batchers("text", pad=0, max_queue=8) as (batcher,):
        export_prometheus(batcher, registry)
        await run_some(batcher)
        found = values_of(registry)
        text = {"batcher": "text"}
        assert value(found, "done_total", **text) == 15
        assert value(found, "failed_total", kind="ValueError", **text) == 1
        assert value(found, "failed_total", kind="DeviceLostError", **text) == 0
        assert value(found, "refused_total", reason="queue_full", **text) == 1
        assert value(found, "refused_total", reason="closed", **text) == 0
        assert value(found, "timed_out_total", stage="queued", **text) == 0
        assert value(found, "hung_total", **text) == 0
        assert value(found, "retried_total", **text) == 1
        stats = batcher.statistics()
        assert value(found, "samples_total", **text) == stats.num_samples >= 16
        assert value(found, "batches_total", **text) == stats.num_batches
        assert value(found, "real_tokens_total", **text) == stats.real_tokens > 0
        assert value(found, "padding_tokens_total", **text) == stats.padding_tokens > 0
        assert value(found, "num_queued", **text) == value(found, "num_suspect", **text) == 0
        assert value(found, "end_to_end_seconds_count", **text) == 15
        assert value(found, "queue_wait_seconds_count", **text) == stats.num_samples
        assert value(found, "run_seconds_count", **text) > stats.num_batches  # the parts, too
        assert value(found, "batch_size_count", **text) == stats.num_batches
        assert value(found, "batch_size_sum", **text) == stats.num_samples
        assert value(found, "batch_size_bucket", le="4.0", **text) == stats.num_batches - 2
        assert value(found, "batch_size_bucket", le="8.0", **text) == stats.num_batches


async def test_durations_land_in_their_buckets() -> None:
    """A wait of half a second is above 0.25 s and up to the bucket of 30 s."""
    registry = CollectorRegistry()
    async with batchers(None, max_wait=0.4) as (batcher,):
        export_prometheus(batcher, registry)
        await batcher(torch.ones(1))
        found = values_of(registry)
    for name in ("queue_wait", "end_to_end"):
        assert value(found, f"{name}_seconds_bucket", batcher="batcher", le="0.25") == 0
        assert value(found, f"{name}_seconds_bucket", batcher="batcher", le="30.0") == 1
        assert value(found, f"{name}_seconds_sum", batcher="batcher") >= 0.4


@pytest.mark.parametrize("new_registry", [CollectorRegistry, lambda: CollectorRegistry(auto_describe=True)])
async def test_several_batchers_share_a_registry(new_registry: Callable[[], CollectorRegistry]) -> None:
    """No series is lost, whichever leaves first: closed, or unregistered by its user."""
    registry = new_registry()

    def there() -> set[str]:
        return {
            dict(labels)["batcher"]
            for name, labels in values_of(registry)
            if name == "asyncdp_batcher_done_total"
        }

    async with batchers("a", None, None) as (first, second, third):
        collectors = [
            export_prometheus(first, registry),
            export_prometheus(second, registry),
            export_prometheus(third, registry, name="c"),
        ]
        for batcher in (first, second, third):
            await batcher(torch.ones(1))
        assert there() == {"a", "batcher", "c"}
        registry.unregister(collectors[0])
        assert there() == {"batcher", "c"}
        export_prometheus(first, registry, name="again")
        await second.aclose()
        assert there() == {"c", "again"}
        await first(torch.ones(1))
        assert value(values_of(registry), "done_total", batcher="again") == 2
    assert there() == set()
    assert not any(name.startswith("asyncdp_batcher") for name, _ in values_of(registry))


async def test_names_are_told_apart() -> None:
    """Batchers without a name get one; a name that is taken is refused, and nothing is registered."""
    registry = CollectorRegistry()
    async with batchers(None, None, "batcher-3", "x") as (first, second, third, fourth):
        for batcher in (first, second, third):
            export_prometheus(batcher, registry)
        with pytest.raises(DuplicateNameError, match=r"'batcher-3'.*name="):
            export_prometheus(fourth, registry, name="batcher-3")
        export_prometheus(fourth, registry, prefix="other", name="batcher-3")
        labels = {dict(labels).get("batcher") for _, labels in values_of(registry)}
    assert labels == {"batcher", "batcher-2", "batcher-3"}


@pytest.mark.parametrize("wrong", [{"name": ""}, {"name": 3}])
async def test_what_makes_no_name_is_refused_at_once(wrong: dict[str, Any]) -> None:
    """No scrape fails later, nothing is registered, and the batcher may be exported by another name."""
    registry = CollectorRegistry()
    async with batchers(None) as (batcher,):
        with pytest.raises(ValueError, match="name"):
            export_prometheus(batcher, registry, **wrong)
        assert not generate_latest(registry)
        export_prometheus(batcher, registry)
        assert await batcher(torch.ones(1)) == 1
    with pytest.raises(ValueError, match="name"):
        Batcher(check, **wrong)


async def test_a_closed_batcher_cannot_be_exported() -> None:
    """It would be registered for good."""
    registry = CollectorRegistry()
    async with batchers(None) as (batcher,):
        pass
    for export in (export_prometheus, export_opentelemetry):
        with pytest.raises(BatcherClosedError, match="export"):
            export(batcher, *([registry] if export is export_prometheus else []))
    assert not generate_latest(registry)


async def test_an_exported_batcher_that_is_never_entered_leaves_too() -> None:
    """Closing it is enough, and nothing keeps it alive."""
    registry = CollectorRegistry()
    async with Runtime("cpu") as runtime:
        batcher = Batcher(check, runtime=runtime)
        export_prometheus(batcher, registry)
        await batcher.aclose()
        assert not generate_latest(registry)
        alive = weakref.ref(batcher._dispatcher)
        del batcher
        gc.collect()
        assert alive() is None


async def test_names_follow_the_conventions_of_prometheus() -> None:
    """Counters end in `_total`, durations in `_seconds`, shares in `_ratio`; every metric has a help text."""
    registry = CollectorRegistry()
    async with batchers(None) as (batcher,):
        export_prometheus(batcher, registry)
        families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert len(families) == 22
    for family in families:
        assert NAME.fullmatch(family.name)
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        assert not re.search(r"_(total|count|sum|bucket|counter|gauge|histogram)$", family.name)
        names = {sample.name for sample in family.samples}
        assert family.type != "counter" or names == {family.name + "_total"}
        assert family.type != "histogram" or family.name.endswith(("_seconds", "_size"))
        assert not any("quantile" in sample.labels for sample in family.samples)


async def test_a_scrape_in_the_open_metrics_format_says_the_same() -> None:
    """Prometheus asks for OpenMetrics where it can: its stricter parser takes what two batchers export."""
    registry = CollectorRegistry()
    async with batchers("a", "b", pad=0, max_queue=8) as both:
        for batcher in both:
            export_prometheus(batcher, registry)
            await run_some(batcher)
        found = values_of(registry)
        text = openmetrics.exposition.generate_latest(registry).decode()
    families = list(openmetrics.parser.text_string_to_metric_families(text))
    same = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    assert same == found


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_finds_nothing_to_complain_about() -> None:
    """`promtool check metrics` accepts a scrape of two batchers."""
    registry = CollectorRegistry()
    async with batchers("a", "b", pad=0, max_queue=8) as both:
        for batcher in both:
            export_prometheus(batcher, registry)
            await run_some(batcher)
        text = generate_latest(registry)
    checked = await anyio.run_process(["promtool", "check", "metrics"], input=text, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


async def test_scrapes_come_from_other_threads() -> None:
    """A thread that scrapes without pause while batches run sees whole numbers, and never an error."""
    registry = CollectorRegistry()
    done, failures = threading.Event(), []

    def scrape() -> None:
        while not done.is_set():
            try:
                values_of(registry)
            except Exception as error:
                failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=scrape)
    try:
        async with batchers("a", max_batch_size=4) as (batcher,):
            export_prometheus(batcher, registry)
            thread.start()
            for _ in range(50):
                calls = [batcher.call_nowait(torch.ones(1)) for _ in range(16)]
                for call in calls:
                    await call
    finally:
        done.set()
        await anyio.to_thread.run_sync(thread.join)
        sys.setswitchinterval(interval)
    assert failures == []


async def test_what_watches_a_service_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    """An exporter that raises is a warning; calls get their results."""
    registry = CollectorRegistry()
    async with batchers(None) as (batcher,):
        collector = export_prometheus(batcher, registry)
        collector._buckets = None  # type: ignore[attr-defined]
        assert await batcher(torch.ones(1)) == 1
    assert "could not be recorded" in caplog.text


async def test_a_lane_that_hangs_shows() -> None:
    """While a lane hangs the gauge is 1; afterwards only the counter tells of it."""
    registry, latch = CollectorRegistry(), threading.Event()

    def hang(batch: torch.Tensor) -> torch.Tensor:
        assert latch.wait(30)
        return batch

    async with (
        Runtime("cpu") as runtime,
        Batcher(hang, runtime=runtime, hang_timeout=0.02, name="x") as batcher,
        anyio.create_task_group() as group,
    ):
        export_prometheus(batcher, registry)
        group.start_soon(batcher, torch.ones(1))
        await wait_until(lambda: value(values_of(registry), "num_suspect", batcher="x") == 1)
        latch.set()
        await wait_until(lambda: value(values_of(registry), "num_suspect", batcher="x") == 0)
        assert value(values_of(registry), "hung_total", batcher="x") == 1


@pytest.mark.parametrize(
    ("export", "package"),
    [(export_prometheus, "prometheus_client"), (export_opentelemetry, "opentelemetry")],
)
def test_missing_client_is_told(export: object, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the client library the export says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=package):
        export(None)  # type: ignore[operator]
