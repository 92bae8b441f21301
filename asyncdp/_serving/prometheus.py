"""Collectors for `prometheus_client`."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from .instruments import COUNTERS, GAUGES, HISTOGRAMS, choose_name, counts_of, dispatcher_to_export
from .statistics import Run

if TYPE_CHECKING:
    from .batcher import Batcher

_exported: weakref.WeakKeyDictionary[Any, dict[str, dict[str, Collector]]] = weakref.WeakKeyDictionary()
"""For each registry and prefix, the collectors by the names of their batchers."""


class _Buckets:
    """One histogram of one batcher."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, values: Sequence[float]) -> None:
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
        self.total += sum(values)

    def cumulative(self) -> list[tuple[str, float]]:
        """Return each upper bound, as text, with the count of values up to it; from any thread."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        return list(zip(names, accumulate(tuple(self._counts)), strict=True))


class Collector:
    """The metrics of one batcher in one registry; of all that share a prefix, the first collects for all.

    A registry writes what its collectors yield as it comes, and each family may be there only once.
    """

    def __init__(self, batcher: Batcher, registry: Any, prefix: str, name: str | None) -> None:
        self._dispatcher = dispatcher_to_export(batcher)
        self._registry = weakref.ref(registry)
        self._prefix = prefix
        self._others = _exported.setdefault(registry, {}).setdefault(prefix, {})
        for taken, other in list(self._others.items()):
            if not other.is_registered():
                del self._others[taken]
        self._name = choose_name(self._dispatcher.recorder.name if name is None else name, self._others)
        self._buckets = {each: _Buckets(each.bounds) for each in HISTOGRAMS}
        registry.register(self)
        self._others[self._name] = self
        self._dispatcher.recorder.observers.append(self)

    def is_registered(self) -> bool:
        """Return whether the registry still has this collector; users may unregister it."""
        # Not public. Registries tell nobody what they have, nor their collectors that they are gone.
        registered = getattr(self._registry(), "_collector_to_names", None)
        return registered is None or self in registered

    def describe(self) -> Iterable[Any]:
        """Claim no names: they are those of the other collectors, too."""
        return ()

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of one scrape."""
        collectors = [each for each in list(self._others.values()) if each.is_registered()]
        if collectors and collectors[0] is self:
            yield from _families(self._prefix, collectors)

    def on_run(self, run: Run) -> None:
        """Add a batch to the histograms; once the collector is unregistered, hear of no more."""
        if not self.is_registered():
            self._dispatcher.recorder.observers.remove(self)
            return
        for histogram, buckets in self._buckets.items():
            buckets.add(histogram.measure(run))

    def on_closed(self) -> None:
        """Leave the registry."""
        self._others.pop(self._name, None)
        registry = self._registry()
        if registry is not None and self.is_registered():
            registry.unregister(self)


def _families(prefix: str, collectors: Sequence[Collector]) -> Iterator[Any]:
    counts = {each._name: counts_of(each._dispatcher) for each in collectors}
    for kind, instruments in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
        for instrument in instruments:
            labels = ["batcher"] if instrument.label is None else ["batcher", instrument.label]
            family = kind(f"{prefix}_{instrument.prometheus_name}", instrument.text, labels=labels)
            for name, values in counts.items():
                for own, value in instrument.values(values):
                    family.add_metric([name, *own.values()], value)
            yield family
    for histogram in HISTOGRAMS:
        bars = HistogramMetricFamily(
            f"{prefix}_{histogram.prometheus_name}", histogram.text, labels=["batcher"]
        )
        for each in collectors:
            buckets = each._buckets[histogram]
            bars.add_metric([each._name], buckets.cumulative(), buckets.total)
        yield bars
