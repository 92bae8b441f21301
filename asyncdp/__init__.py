"""Data-parallel PyTorch on asynchronous lanes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from ._data_parallel import DataParallel, DataParallelStatistics, data_parallel
    from ._devices import parse_devices
    from ._gather import gather
    from ._parallel_apply import parallel_apply
    from ._replicate import replicate
    from ._runtime import (
        LaneState,
        LaneStatistics,
        Runtime,
        RuntimeStatistics,
        TraceRecorder,
        default_runtime,
    )
    from ._scatter import scatter
    from ._serving import (
        Batcher,
        BatcherStatistics,
        QueueFull,
        export_opentelemetry,
        export_prometheus,
    )
    from ._training import backward
    from ._tuner import LaneChoice

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
    "TraceRecorder",
    "backward",
    "data_parallel",
    "default_runtime",
    "errors",
    "export_opentelemetry",
    "export_prometheus",
    "gather",
    "parallel_apply",
    "parse_devices",
    "replicate",
    "scatter",
]

# The modules are imported when a name is first asked for, all of them at once: pytest loads the plugin
# of this package in every run, and the command line shows its help, without waiting for torch.
_MODULES = (
    "errors",
    "_data_parallel",
    "_devices",
    "_gather",
    "_parallel_apply",
    "_replicate",
    "_runtime",
    "_scatter",
    "_serving",
    "_training",
    "_tuner",
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = [importlib.import_module(f".{each}", __name__) for each in _MODULES]
    if name not in globals():
        exported = {
            each: getattr(module, each) for module in modules for each in __all__ if hasattr(module, each)
        }
        globals().update(exported)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
