"""Errors of a batcher and of its calls."""

from __future__ import annotations

from collections.abc import Mapping

from .base import AsyncDPError


class CollateError(AsyncDPError, ValueError):
    """The samples of one batch cannot be stacked."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"cannot make a batch: {cause}. "
            "Pass a value as pad= for tensors of different lengths, or a function of your own as collate=."
        )


class SplitError(AsyncDPError, ValueError):
    """The output of a batch cannot be split into one output per sample."""

    def __init__(self, cause: str, num_samples: int) -> None:
        super().__init__(
            f"{cause} of {num_samples} samples. "
            "Return one row per sample along dim 0, or pass a function of your own as split=."
        )


class CallTimeoutError(AsyncDPError, TimeoutError):
    """A call of a batcher was not answered in time.

    Attributes:
        has_waited: whether it was still in the queue, so that it never ran.
    """

    def __init__(self, seconds: float, has_waited: bool) -> None:
        where = "still waited in the queue" if has_waited else "was in a batch"
        super().__init__(
            f"the call was not answered within {round(seconds, 3)} s; it {where}. "
            "Allow more time, or send fewer calls at once."
        )
        self.has_waited = has_waited


class CallCancelledError(AsyncDPError, RuntimeError):
    """A call of a batcher was awaited after it had been cancelled."""

    def __init__(self) -> None:
        super().__init__(
            "the call was given up, by its cancel() or because a task that awaited it was cancelled. "
            "Call again with the sample, and do not cancel a call whose result you need."
        )


class EngineCancelledError(AsyncDPError, RuntimeError):
    """The engine of a batcher raised an error that ends tasks or the process, `SystemExit` say."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            f"the engine raised {type(error).__name__} although it was not cancelled (the cause of this "
            "error). Catch it inside the engine: it would end the callers, or the process, for one sample."
        )


class BatcherClosedError(AsyncDPError, RuntimeError):
    """A batcher was called before or after its `async with` block."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"{cause}. Call it inside `async with batcher:`.")


class OtherLoopError(AsyncDPError, RuntimeError):
    """A batcher was called on another event loop than that of its `async with` block."""

    def __init__(self) -> None:
        super().__init__(
            "the batcher was entered on another event loop. "
            "Make one batcher per loop; they may share one engine or runtime."
        )


class NestedCallError(AsyncDPError, RuntimeError):
    """What a batcher runs called this very batcher, by itself or through another one."""

    def __init__(self) -> None:
        super().__init__(
            "what a batcher runs called this very batcher, by itself or through another one, which could "
            "wait for itself for ever. Call the model itself there, or another Batcher that does not call it."
        )


class NotServableError(AsyncDPError, TypeError):
    """The engine given to a batcher is neither a DataParallel nor callable."""

    def __init__(self, got: object) -> None:
        super().__init__(
            f"expected a DataParallel engine or something to call, but got {type(got).__qualname__}. "
            "Wrap a module in DataParallel, or pass a function of one batch."
        )


class DuplicateNameError(AsyncDPError, ValueError):
    """Metrics of two batchers would have the same name and labels."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the metrics of a batcher named {name!r} are exported there already. "
            "Pass another name=, to the Batcher or to this export."
        )


class NoLaneWorksError(AsyncDPError, RuntimeError):
    """All lanes of a model are lost, hang or are closed, so that nothing it is asked will be answered."""

    def __init__(self, states: Mapping[str, str]) -> None:
        listed = ", ".join(f"{name} is {state}" for name, state in states.items())
        super().__init__(f"no lane works: {listed}. Start another process in the place of this one.")
