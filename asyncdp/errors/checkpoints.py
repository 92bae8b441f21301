"""Errors of checkpoints."""

from __future__ import annotations

from .base import AsyncDPError


class CheckpointError(AsyncDPError, RuntimeError):
    """A checkpoint could not be written or read.

    Args:
        cause: what happened, without a closing full stop.
        remedy: what to do about it.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}. {remedy}")


class NotACheckpointError(CheckpointError, ValueError):
    """What is at the path was not written by `DataParallel.save`."""

    def __init__(self, path: object, cause: str) -> None:
        super().__init__(
            f"{path} is no checkpoint: {cause}", "Name a folder that `await engine.save(path)` wrote."
        )


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, cut off or changed; nothing was loaded."""

    def __init__(self, path: object, cause: str) -> None:
        super().__init__(
            f"the checkpoint {path} is damaged: {cause}",
            "Load an earlier one, or copy it again from its source.",
        )


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint does not fit what it is to be loaded into; nothing was loaded."""

    def __init__(self, path: object, cause: str, remedy: str) -> None:
        super().__init__(f"the checkpoint {path} does not fit: {cause}", remedy)
