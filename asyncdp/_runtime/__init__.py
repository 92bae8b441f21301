"""Lanes, completions and the scheduler: knows threads and event loops, not torch modules."""

from .lane import Lane
from .runtime import LaneStatistics, Runtime, RuntimeStatistics, default_runtime
from .schedule import LaneState

__all__ = ["Lane", "LaneState", "LaneStatistics", "Runtime", "RuntimeStatistics", "default_runtime"]
