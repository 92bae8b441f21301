"""Data-parallel PyTorch on asynchronous lanes."""

from ._data_parallel import DataParallel, DataParallelStatistics, data_parallel
from ._devices import parse_devices
from ._gather import gather
from ._parallel_apply import parallel_apply
from ._replicate import replicate
from ._runtime import LaneState, LaneStatistics, Runtime, RuntimeStatistics, default_runtime
from ._scatter import scatter
from ._training import backward
from ._tuner import LaneChoice

__version__ = "0.1.0"

__all__ = [
    "DataParallel",
    "DataParallelStatistics",
    "LaneChoice",
    "LaneState",
    "LaneStatistics",
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
