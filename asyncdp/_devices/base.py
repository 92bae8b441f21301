"""The interface between a lane and the device it works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

DeviceTimes = Callable[[], tuple[float, float] | None]
"""Tells when a work began and ended on its device, by the host's `time.perf_counter`, in seconds.

Called once the work is complete; gives None if the work failed.
"""


class LaneDevice:
    """What one lane needs to know of its device; one object serves exactly one lane.

    Work on a device is first *issued* and later *complete*. On a CPU the two are the same, which is
    what this base class does; on CUDA an event tells them apart. All methods but `capture`, `prefetch`
    and, after a `capture` that raised, `lost` run on the lane's thread.

    Attributes:
        device: where this lane's tensors live.
        captures: whether `capture` has anything to note.
        prefetches: whether the device copies while it computes, so that `prefetch` is worth a thread.
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
        """Note, on the submitting thread, what must be done before new work may read its inputs."""
        return None

    def prefetch(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Begin to copy tensors from the host to the device; called on a thread that may wait.

        Returns:
            What gives the copies to the work on this lane that uses them.
        """
        raise NotImplementedError

    def time_next(self) -> DeviceTimes | None:
        """Have the device's own clock time the next work issued; None if the host's is all there is.

        A recorder of traces asks for it. Never raises: what ails the device is told by `issue`.
        """
        return None

    def issue(self, captured: Any, function: Callable[[], Any]) -> tuple[Any, Any]:
        """Call `function` with this lane's stream current, ordered behind what `capture` noted.

        Returns:
            The call's value, and a marker of its end for `on_complete`; None if it is complete already.

        Raises:
            BaseException: what `function` raised, after all it had issued is complete.
        """
        return function(), None

    def on_complete(self, marker: Any, callback: Callable[[BaseException | None], None]) -> None:
        """Call `callback` from some thread once `marker` is reached, with the error if the device failed."""
        raise NotImplementedError

    def lost(self, error: BaseException) -> bool:
        """Tell whether `error` means that the device will not answer again."""
        return False
