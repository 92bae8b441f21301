"""Data-parallel PyTorch on asynchronous lanes."""

from ._data_parallel import DataParallel, DataParallelStatistics, data_parallel
from ._devices import parse_devices
from ._gather import gather
from ._parallel_apply import parallel_apply
from ._replicate import replicate
from ._runtime import LaneState, LaneStatistics, Runtime, RuntimeStatistics, default_runtime
from ._scatter import scatter
from ._serving import Batcher, BatcherStatistics
from ._training import backward
from ._tuner import LaneChoice
from .errors import QueueFullError as QueueFull

__version__ = "0.1.0"

__all__ = [
    "Batcher",
    "BatcherStatistics",
    "DataParallel",
    "DataParallelStatistics",
    "LaneChoice",
    "LaneState",
    "LaneStatistics",
    "QueueFull",
    "Runtime",
    "RuntimeStatistics",
    "backward",
    "data_parallel",
    "default_runtime",
    "gather",
    "parallel_apply",
    "parse_devices",
    "replicate",
    "scatter",
]
