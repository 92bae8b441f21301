"""Errors of training over several processes."""

from __future__ import annotations

from .base import AsyncDPError

_NOTHING_CHANGED = (
    "No process has changed anything: correct what failed there, or go on with the next step on all of them."
)


class PeerStepError(AsyncDPError, RuntimeError):
    """A training step, or a checkpoint, was given up on every process: one failed, or they got out of step.

    Args:
        rank: the process to blame, None if it is not known.
        cause: what happened there.
        remedy: what to do about it.
        what: was given up.

    Attributes:
        rank: as above, its rank in the group of the engine.
    """

    def __init__(
        self, rank: int | None, cause: str, remedy: str | None = None, what: str = "the step"
    ) -> None:
        who = "the other processes" if rank is None else f"process {rank}"
        super().__init__(
            f"{what} was given up because of {who}: {cause.rstrip('.')}. {remedy or _NOTHING_CHANGED}"
        )
        self.rank = rank


_GROUPS = (
    "Pass torch.distributed.group.WORLD after init_process_group, a group of torch.distributed.new_group "
    'that this process is in, or one dimension of a mesh, mesh["dp"].'
)


class ProcessGroupError(AsyncDPError, ValueError):
    """A `process_group` is none, this process is not in it, or the others in it do not answer."""

    def __init__(self, cause: str, remedy: str = _GROUPS) -> None:
        super().__init__(f"process_group {cause}. {remedy}")


class ProcessMismatchError(AsyncDPError, ValueError):
    """The modules of processes that are to train together are not alike.

    Args:
        cause: the first difference.

    Attributes:
        rank: the process that differs from process 0.
    """

    def __init__(self, rank: int | None, cause: str) -> None:
        super().__init__(
            f"processes cannot train together: process {rank}: {cause}. "
            "Make the same module on every process; its values may differ, those of process 0 go to all."
        )
        self.rank = rank
