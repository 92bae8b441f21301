"""Lanes, completions and the scheduler: knows threads, not torch modules."""

from .default import default_lanes, default_runtime
from .runtime import Runtime, RuntimeStatistics, check_runtime, scheduler_of
from .schedule import LaneState
from .scheduler import Scheduler
from .task import Lane, LaneStatistics, Task
from .trace import TraceRecorder

__all__ = [
    "Lane",
    "LaneState",
    "LaneStatistics",
    "Runtime",
    "RuntimeStatistics",
    "Scheduler",
    "Task",
    "TraceRecorder",
    "check_runtime",
    "default_lanes",
    "default_runtime",
    "scheduler_of",
]
