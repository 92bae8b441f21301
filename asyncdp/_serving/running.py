"""A batch that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .call import Request
from .search import Search
from .slots import Slot


@dataclass(slots=True, eq=False)
class RunningBatch:
    """Calls that run on a slot together.

    Attributes:
        started: when, in seconds.
        search: what they are a part of, if they were in a batch that raised.
        has_failed: whether it raised.
        is_hung: whether its slot hangs, or has.
        is_substituted: whether its slot hangs and another one has its place.
        cancel: cancels it while it runs.
    """

    slot: Slot
    calls: Sequence[Request]
    started: float
    search: Search | None
    has_failed: bool = False
    is_hung: bool = False
    is_substituted: bool = False
    cancel: Callable[[], object] | None = None
