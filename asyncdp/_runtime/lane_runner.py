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
        """The runtime that the lanes belong to; run `run_on` by its methods."""

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes to choose from."""

    def pick(self) -> int:
        """Return the position in `lanes` of the best lane for the next batch."""

    def run_on(self, position: int, /, *args: Any, **kwargs: Any) -> Any:
        """Run one whole batch on this thread, that of the lane at `position`, and count it."""
