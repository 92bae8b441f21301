"""Batches of many callers' samples, run on lanes."""

from ..errors import QueueFullError as QueueFull
from .batcher import Batcher
from .call import Call
from .metrics import export_opentelemetry, export_prometheus
from .statistics import BatcherStatistics, Percentiles

__all__ = [
    "Batcher",
    "BatcherStatistics",
    "Call",
    "Percentiles",
    "QueueFull",
    "export_opentelemetry",
    "export_prometheus",
]
