"""What happens in a job, for whoever watches it."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Callable

import anyio

from .summary import Summary


@dataclasses.dataclass(frozen=True)
class Started:
    """The model is loaded and the lanes are up.

    Attributes:
        num_records: records to do in all, None when that is not known; estimated where files do not state it.
        num_earlier: those of them that an earlier run has done.
        lanes: names of the lanes; on a cluster those of the nodes.
    """

    num_records: int | None
    num_earlier: int
    lanes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the job is; twice a second.

    Attributes:
        num_done: records that are done, earlier runs included.
        num_records: records to do in all, as in `Started`.
        num_bad: refused records, earlier runs included.
        seconds: time since the start.
        rate: records per second of this run.
        seconds_left: None where it cannot be estimated.
        lanes: part of the last seconds that each lane was busy, 0 to 1, by name; on a cluster the mean of
            each node's lanes, by the node's name.
        memory: bytes that the process holds, None where the system does not tell.
        nodes: how many nodes of a cluster the job runs on; None where it runs on this machine alone.
    """

    num_done: int
    num_records: int | None
    num_bad: int
    seconds: float
    rate: float
    seconds_left: float | None
    lanes: dict[str, float]
    memory: int | None
    nodes: int | None = None


@dataclasses.dataclass(frozen=True)
class Warned:
    """Something that a person should know."""

    text: str


@dataclasses.dataclass(frozen=True)
class ShardFinished:
    """A shard is on the disk and in the journal: no kill loses it any more.

    Attributes:
        index: number of the shard.
        num_records: records in it, good and bad.
        num_bad: those of them that were refused.
    """

    index: int
    num_records: int
    num_bad: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """The job is done."""

    summary: Summary


Event = Started | Progress | Warned | ShardFinished | Finished
Report = Callable[[Event], object]
"""Takes events, on the event loop; must not block."""


def ignore(event: Event) -> None:
    """Take an event that nobody wants."""


class EventQueue(AsyncIterator[Event]):
    """Events of a job on their way to one who may be slow: of progress only the newest is kept."""

    def __init__(self) -> None:
        self._unread: deque[Event] = deque()
        self._is_closed = False
        self._changed = anyio.Event()

    def put(self, event: Event) -> None:
        """Add an event; never waits."""
        if isinstance(event, Progress) and self._unread and isinstance(self._unread[-1], Progress):
            self._unread.pop()
        self._unread.append(event)
        self._wake()

    def close(self) -> None:
        """End the iteration behind the last event."""
        self._is_closed = True
        self._wake()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._unread:
            if self._is_closed:
                raise StopAsyncIteration
            await self._changed.wait()
        return self._unread.popleft()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
