"""Lanes, completions and the scheduler: knows threads and event loops, not torch modules."""

from .default import default_lanes, default_runtime
from .lane import Lane
from .runtime import LaneStatistics, Runtime, RuntimeStatistics
from .schedule import LaneState
from .trace import TraceRecorder

__all__ = [
    "Lane",
    "LaneState",
    "LaneStatistics",
    "Runtime",
    "RuntimeStatistics",
    "TraceRecorder",
    "default_lanes",
    "default_runtime",
]
