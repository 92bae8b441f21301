"""What a scheduler of whole batches needs of an engine."""

from __future__ import annotations

from typing import Any, Protocol

from .runtime import Runtime
from .task import Lane


class LaneRunner(Protocol):
    """Runs whole batches on lanes that the caller has chosen.

    An engine offers one by a method `__asyncdp_lane_runner__()`.
    """

    @property
    def runtime(self) -> Runtime:
        """The runtime that the lanes belong to."""

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes to choose from."""

    def pick(self) -> int:
        """Return the position in `lanes` of the best lane for the next batch."""

    def run_on(self, position: int, /, *args: Any, **kwargs: Any) -> Any:
        """Run one whole batch on this thread, that of the lane at `position`, and count it.

        On a device that copies while it computes, the result has its values once the lane's task is complete.
        """


class RunnerState(Protocol):
    """All that a batch depends on and that the caller may change between two calls."""

    def equals(self, other: Any) -> bool:
        """Return whether batches of the two states may run as one."""


class StatefulLaneRunner(LaneRunner, Protocol):
    """Runs every batch in the state of its call, whatever has changed when the lane gets to it."""

    def capture(self, *, records: bool | None = None) -> RunnerState:
        """Return the state as of now.

        Args:
            records: whether gradients are to be recorded; None for what the current grad mode says.
        """

    def run_as(self, position: int, state: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Do what `run_on` does, in a state that `capture` gave."""
