"""Data-parallel PyTorch on asynchronous lanes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors, infer
    from ._devices import parse_devices
    from ._engine.calls import EngineView
    from ._engine.data_parallel import DataParallel, DataParallelStatistics, data_parallel
    from ._engine.map import BatchStream
    from ._engine.train import StepResult, StepStream
    from ._engine.tuner import LaneChoice
    from ._runtime import (
        Lane,
        LaneState,
        LaneStatistics,
        Runtime,
        RuntimeStatistics,
        TraceRecorder,
        default_runtime,
    )
    from ._serving import (
        Batcher,
        BatcherStatistics,
        Call,
        Percentiles,
        QueueFull,
        export_opentelemetry,
        export_prometheus,
    )
    from ._training.checkpoint.keeper import Checkpoint
    from ._tree import PerRow, Whole
    from ._verbs.backward import backward
    from ._verbs.gather import gather
    from ._verbs.parallel_apply import parallel_apply
    from ._verbs.replicate import replicate
    from ._verbs.scatter import scatter
    from .errors import PeerStepError

__version__ = "0.1.0"

# A worker process of anyio has none if its parent's has no file, as in a notebook, and dill, which torch
# imports where it is installed, needs one.
sys.modules.setdefault("__main__", ModuleType("__main__"))

__all__ = [
    "BatchStream",
    "Batcher",
    "BatcherStatistics",
    "Call",
    "Checkpoint",
    "DataParallel",
    "DataParallelStatistics",
    "EngineView",
    "Lane",
    "LaneChoice",
    "LaneState",
    "LaneStatistics",
    "PeerStepError",
    "PerRow",
    "Percentiles",
    "QueueFull",
    "Runtime",
    "RuntimeStatistics",
    "StepResult",
    "StepStream",
    "TraceRecorder",
    "Whole",
    "backward",
    "data_parallel",
    "default_runtime",
    "errors",
    "export_opentelemetry",
    "export_prometheus",
    "gather",
    "infer",
    "parallel_apply",
    "parse_devices",
    "replicate",
    "scatter",
]

# The modules are imported when a name is first asked for, all of them at once: pytest loads the plugin
# of this package in every run, and the command line shows its help, without waiting for torch.
_MODULES = (
    "errors",
    "_devices",
    "_engine.calls",
    "_engine.data_parallel",
    "_engine.map",
    "_engine.train",
    "_engine.tuner",
    "_runtime",
    "_serving",
    "_training.checkpoint.keeper",
    "_tree",
    "_verbs.backward",
    "_verbs.gather",
    "_verbs.parallel_apply",
    "_verbs.replicate",
    "_verbs.scatter",
)

# Rooms of their own, which nothing else here needs. That of Ray is no part of `import *`, since it needs Ray.
_ROOMS = ("infer", "ray")


def __getattr__(name: str) -> Any:
    if name not in (*__all__, *_ROOMS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    modules = [importlib.import_module(f".{each}", __name__) for each in _MODULES]
    if name not in globals():
        exported = {
            each: getattr(module, each) for module in modules for each in __all__ if hasattr(module, each)
        }
        globals().update(exported)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
