"""The interface between a lane and its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

DeviceTimes = Callable[[], tuple[float, float] | None]
"""Returns when a task began and ended on its device, by the host's `time.perf_counter`, in seconds.

Called once the task is complete; returns None if it failed.
"""


class LaneDevice:
    """What one lane needs to know of its device; one object serves exactly one lane.

    A task is first *issued* and later *complete*. On a CPU both happen at once, which is what this base
    class does; on CUDA an event marks the completion. All methods except `capture`, `prefetch` and, after a
    `capture` that raised, `lost` run on the lane's thread.

    Attributes:
        device: where this lane's tensors live.
        captures: whether `capture` does anything.
        prefetches: whether the device copies while it computes, so that `prefetch` and `fetch` pay.
    """

    captures: bool = False
    prefetches: bool = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def open(self) -> None:
        """Prepare the thread that has just started (current device, stream)."""

    def warm_up(self) -> None:
        """Build and load the kernels of this device; called on the lane's thread."""

    def close(self) -> None:
        """Release what `open` took; the lane's last call."""

    def capture(self) -> Any:
        """Return, on the submitting thread, what a new task must wait for before it reads its inputs."""
        return None

    def prefetch(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Begin to copy tensors from the host to the device; called on a thread that may wait.

        Returns:
            a function that the task which uses the copies calls to get them.
        """
        raise NotImplementedError

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Begin to copy results of the task that runs to the host.

        Nothing waits for these copies but the completion of the task: until then their values are not there.
        """
        raise NotImplementedError

    def time_next(self) -> DeviceTimes | None:
        """Have the device's own clock time the next task; return None if there is only the host's clock.

        Called while a trace is recorded. Never raises: an error of the device is raised by `issue`.
        """
        return None

    def issue(self, captured: Any, function: Callable[[], Any]) -> tuple[Any, Any]:
        """Call `function` with this lane's stream current, ordered behind what `capture` returned.

        Returns:
            the value of the call, and a marker of its end for `on_complete`; None if it is complete already.

        Raises:
            BaseException: the error of `function`, after everything it had issued is complete.
        """
        return function(), None

    def on_complete(self, marker: Any, callback: Callable[[BaseException | None], None]) -> None:
        """Call `callback` from any thread once `marker` is reached, with the error if the device failed."""
        raise NotImplementedError

    def lost(self, error: BaseException) -> bool:
        """Return whether `error` means that the device is lost for good."""
        return False
