"""Services: batches of many callers' samples, and streams of batches."""

from ..errors import QueueFullError as QueueFull
from .batcher import Batcher
from .call import Call
from .dispatcher import BatcherState
from .metrics import export_opentelemetry, export_prometheus
from .statistics import BatcherStatistics, Percentiles

__all__ = [
    "Batcher",
    "BatcherState",
    "BatcherStatistics",
    "Call",
    "Percentiles",
    "QueueFull",
    "export_opentelemetry",
    "export_prometheus",
]
