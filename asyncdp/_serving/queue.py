"""Which waiting samples make the next batch; free of threads, clocks, I/O and torch."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar


class Item:
    """One sample that waits for its batch.

    Attributes:
        size: length of the sample (tokens, pixels); 0 where sizes play no part.
        priority: higher goes first.
        arrived: when the call was made, in seconds.
        ordinal: place in the order of arrival, set by the schedule.
    """

    __slots__ = ("arrived", "ordinal", "priority", "size")

    ordinal: int

    def __init__(self, size: float, priority: int, arrived: float) -> None:
        self.size = size
        self.priority = priority
        self.arrived = arrived


ItemT = TypeVar("ItemT", bound=Item)

_MIN_FORGOTTEN = 64  # so many that left are cleared away at once, to make it worth while


@dataclass(slots=True)
class _Level(Generic[ItemT]):
    """The items of one priority."""

    items: dict[ItemT, None] = field(default_factory=dict)  # in order of arrival
    by_size: list[tuple[float, int, ItemT]] = field(default_factory=list)

    @property
    def oldest(self) -> ItemT:
        return next(iter(self.items))


@dataclass(slots=True)
class BatchSchedule(Generic[ItemT]):
    """The queue of a batcher.

    At most `max_queue` items are queued; later ones stay outside, and the most urgent is let in as
    another leaves. A batch is led by the most urgent item of the queue. Most urgent is the oldest one
    if it has waited for `max_age`, else the first of the highest priority. The leader takes along the
    items nearest to it in size, so that little is padded and yet nobody starves.

    Args:
        max_batch_size: most items of a batch.
        max_queue: most items in the queue.
        max_wait: seconds an item may wait for its batch to fill.
        max_age: seconds after which an item goes before every priority.
        max_cost: most items times longest of a batch; an item larger than that goes alone.
        max_padding: most of a batch that may be padding, from 0 to 1.
        sized: whether sizes matter.
    """

    max_batch_size: int
    max_queue: int
    max_wait: float = 0.0
    max_age: float = 1.0
    max_cost: float | None = None
    max_padding: float = 1.0
    sized: bool = False
    closing: bool = False
    """Nothing more will come: a batch need not wait to fill."""
    num_queued: int = field(default=0, init=False)
    """Items in the queue."""
    _levels: dict[int, _Level[ItemT]] = field(default_factory=dict)
    _ranks: list[int] = field(default_factory=list)  # the priorities of what is queued, highest first
    _total_size: float = 0.0
    # By ordinal, so in order of arrival; an `OrderedDict` finds its first in no time after many have left.
    _outside: OrderedDict[int, ItemT] = field(default_factory=OrderedDict)
    # Priority, negated, and ordinal of those outside: a heap, which forgets who left only later.
    _outside_ranks: list[tuple[int, int]] = field(default_factory=list)
    _ordinals: Iterator[int] = field(default_factory=itertools.count)

    @property
    def num_outside(self) -> int:
        """Items that wait for room in the queue."""
        return len(self._outside)

    @property
    def is_full(self) -> bool:
        """Whether an item that came now would have to wait for room."""
        return self.num_queued >= self.max_queue

    @property
    def may_leave(self) -> bool:
        """Whether what waits need not wait for more."""
        return self.max_wait == 0 or self.closing or self._is_batch_full()

    def add(self, item: ItemT) -> None:
        """An item arrives."""
        item.ordinal = next(self._ordinals)
        if self.num_queued < self.max_queue:
            self._enqueue(item)
        else:
            heapq.heappush(self._outside_ranks, (-item.priority, item.ordinal))
            self._outside[item.ordinal] = item

    def remove(self, item: ItemT, now: float) -> bool:
        """An item gives up; tell whether it was still waiting."""
        level = self._levels.get(item.priority)
        if level is not None and item in level.items:
            self._dequeue(level, item)
            self._let_in(now)
            return True
        if self._outside.pop(item.ordinal, None) is None:
            return False
        self._forget()
        return True

    def ready_at(self) -> float | None:
        """When the next batch may leave, should nothing more arrive; None if nothing waits."""
        if self.num_queued == 0:
            return None
        oldest = self._oldest().arrived
        return oldest if self.may_leave else oldest + self.max_wait

    def take(self, now: float, num_free: int = 1) -> list[ItemT]:
        """Take the next batch out of the queue.

        Args:
            now: the time, in seconds.
            num_free: places that could run a batch now; what waits is shared out between them, unless
                batches wait to fill.

        Returns:
            The items, the leader first; empty if none waits or the batch may still fill.
        """
        if self.num_queued == 0 or (self.max_wait != 0 and self._must_fill(now)):
            return []
        limit = self.max_batch_size
        if self.max_wait == 0 and num_free > 1:
            limit = min(limit, -(-self.num_queued // num_free))
        if not self.sized and len(self._ranks) == 1 and self.num_queued <= limit:
            batch = self._take_all()
        else:
            batch = self._alike(now, limit) if self.sized else self._in_order(now, limit)
            for item in batch:
                self._dequeue(self._levels[item.priority], item)
        if self._outside:
            self._let_in(now)
        return batch

    def clear(self) -> list[ItemT]:
        """Take out everything, whether queued or outside."""
        waiting = [item for level in self._levels.values() for item in level.items]
        waiting += self._outside.values()
        self._levels, self._ranks, self._outside, self._outside_ranks = {}, [], OrderedDict(), []
        self.num_queued, self._total_size = 0, 0.0
        return waiting

    def _must_fill(self, now: float) -> bool:
        """Whether the batch that may leave next still waits for more."""
        return not self.may_leave and self._oldest().arrived + self.max_wait > now

    def _take_all(self) -> list[ItemT]:
        """Take out everything of the only priority there is."""
        items = self._levels[self._ranks[0]].items
        batch = list(items)
        items.clear()
        self._close_level(self._ranks[0])
        self.num_queued = 0
        return batch

    def _enqueue(self, item: ItemT) -> None:
        level = self._levels.get(item.priority)
        if level is None or not level.items:
            level = self._open_level(item.priority)
        level.items[item] = None
        self.num_queued += 1
        if self.sized:
            insort(level.by_size, (item.size, item.ordinal, item))
            self._total_size += item.size

    def _dequeue(self, level: _Level[ItemT], item: ItemT) -> None:
        del level.items[item]
        self.num_queued -= 1
        if self.sized:
            del level.by_size[bisect_left(level.by_size, (item.size, item.ordinal))]
            self._total_size -= item.size
        if not level.items:
            self._close_level(item.priority)

    def _open_level(self, rank: int) -> _Level[ItemT]:
        if self._ranks:
            insort(self._ranks, rank, key=lambda other: -other)
        else:
            self._ranks.append(rank)
        if rank not in self._levels:
            self._levels[rank] = _Level()
        return self._levels[rank]

    def _close_level(self, rank: int) -> None:
        """Nothing of a priority is left."""
        self._ranks.remove(rank)
        if len(self._levels) > 1:  # the last one stays, since most often it is the only one there ever is
            del self._levels[rank]

    def _let_in(self, now: float) -> None:
        """Let items in from outside while there is room."""
        while self._outside and self.num_queued < self.max_queue:
            ordinal, oldest = next(iter(self._outside.items()))
            if oldest.arrived + self.max_age > now:
                ordinal = heapq.heappop(self._outside_ranks)[1]
            item = self._outside.pop(ordinal, None)
            if item is not None:
                self._enqueue(item)
        self._forget()

    def _forget(self) -> None:
        """Clear the heap of those who have left."""
        if len(self._outside_ranks) > 2 * len(self._outside) + _MIN_FORGOTTEN:
            self._outside_ranks = [rank for rank in self._outside_ranks if rank[1] in self._outside]
            heapq.heapify(self._outside_ranks)

    def _oldest(self) -> ItemT:
        if len(self._ranks) == 1:
            return self._levels[self._ranks[0]].oldest
        return min((self._levels[rank].oldest for rank in self._ranks), key=lambda item: item.ordinal)

    def _is_batch_full(self) -> bool:
        if self.num_queued >= self.max_batch_size or self.is_full:
            return True
        return self.max_cost is not None and self._total_size >= self.max_cost

    def _in_order(self, now: float, limit: int) -> list[ItemT]:
        """The `limit` most urgent items."""
        ordered: Iterable[ItemT] = itertools.chain.from_iterable(
            self._levels[rank].items for rank in self._ranks
        )
        if len(self._ranks) > 1:
            # Everyone past the age cap goes first; dict drops what comes a second time.
            ordered = dict.fromkeys(itertools.chain(self._overdue(now), ordered))
        return list(itertools.islice(ordered, limit))

    def _overdue(self, now: float) -> list[ItemT]:
        found: list[ItemT] = []
        for level in self._levels.values():
            found += itertools.takewhile(lambda item: item.arrived + self.max_age <= now, level.items)
        return sorted(found, key=lambda item: item.ordinal)

    def _alike(self, now: float, limit: int) -> list[ItemT]:
        """The most urgent item and those nearest to it in size, higher priorities first."""
        oldest = self._oldest()
        overdue = oldest.arrived + self.max_age <= now
        leader = oldest if overdue else self._levels[self._ranks[0]].oldest
        batch = [leader]
        total = longest = leader.size
        for rank in self._ranks:
            for item in _nearest_first(self._levels[rank].by_size, leader.size):
                if len(batch) == limit:
                    return batch
                if item is leader or not self._fits(
                    len(batch) + 1, total + item.size, max(longest, item.size)
                ):
                    continue
                batch.append(item)
                total += item.size
                longest = max(longest, item.size)
        return batch

    def _fits(self, num_items: int, total: float, longest: float) -> bool:
        """Whether a batch of these sizes keeps within cost and padding."""
        padded = num_items * longest
        if self.max_cost is not None and padded > self.max_cost:
            return False
        return total >= padded * (1 - self.max_padding)


def _nearest_first(by_size: list[tuple[float, int, ItemT]], size: float) -> Iterator[ItemT]:
    """The items in the order of their distance from `size`, of equals the shorter one first."""
    right = bisect_left(by_size, (size, -1))
    left = right - 1
    while left >= 0 or right < len(by_size):
        goes_left = right == len(by_size) or (
            left >= 0 and size - by_size[left][0] <= by_size[right][0] - size
        )
        if goes_left:
            yield by_size[left][2]
            left -= 1
        else:
            yield by_size[right][2]
            right += 1
