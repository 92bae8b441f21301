"""Which waiting samples make the next batch; free of threads, clocks, I/O and torch."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Item(Protocol):
    """One sample that waits for its batch.

    Attributes:
        size: length of the sample (tokens, pixels); 0 where sizes do not matter.
        priority: higher goes first.
        arrived: when the call was made, in seconds.
        ordinal: place in the order of arrival, set by the queue.
    """

    size: float
    priority: int
    arrived: float
    ordinal: int


ItemT = TypeVar("ItemT", bound=Item)

_MIN_STALE = 64  # so many stale entries are removed at once, to make it worth while


@dataclass(slots=True)
class BatchQueue(Generic[ItemT]):
    """The queue of a batcher.

    At most `max_queue` items are queued; later ones stay outside, and the most urgent is let in as
    another leaves. A batch is led by the most urgent item of the queue: the oldest one if it has waited
    for `max_age`, else the first of the highest priority. The leader takes along the items nearest to it
    in size, so that little is padded and yet nobody starves.

    Args:
        max_batch_size: most items of a batch.
        max_queue: most items in the queue.
        max_wait: seconds an item may wait for its batch to fill.
        max_age: seconds after which an item goes before every priority.
        max_cost: most items times longest of a batch; an item larger than that goes alone.
        max_padding: most of a batch that may be padding, from 0 to 1.
        sized: whether sizes matter.
        is_closing: whether nothing more will come, so that a batch need not wait to fill.

    Attributes:
        num_queued: items in the queue.
        full_size: items of a full batch, at most `max_batch_size`: more of them do not wait to fill one.
    """

    max_batch_size: int
    max_queue: int
    max_wait: float = 0.0
    max_age: float = 1.0
    max_cost: float | None = None
    max_padding: float = 1.0
    sized: bool = False
    is_closing: bool = False
    num_queued: int = field(default=0, init=False)
    full_size: int = field(init=False)
    # By priority, no entry empty; the items in order of arrival.
    _items: dict[int, dict[ItemT, None]] = field(default_factory=dict, init=False)
    _by_size: dict[int, list[tuple[float, int, ItemT]]] = field(default_factory=dict, init=False)
    _total_size: float = field(default=0.0, init=False)
    # By ordinal, so in order of arrival; unlike a dict, it finds its first at once after many have left.
    _outside: OrderedDict[int, ItemT] = field(default_factory=OrderedDict, init=False)
    # A heap of negated priority and ordinal of those outside; entries of those who left go later.
    _outside_ranks: list[tuple[int, int]] = field(default_factory=list, init=False)
    _ordinals: Iterator[int] = field(default_factory=itertools.count, init=False)

    def __post_init__(self) -> None:
        self.full_size = self.max_batch_size

    @property
    def num_outside(self) -> int:
        """Items that wait for room in the queue."""
        return len(self._outside)

    @property
    def is_full(self) -> bool:
        """Whether an item that came now would have to wait for room."""
        return self.num_queued >= self.max_queue

    def has_room(self, count: int) -> bool:
        """Return whether a request of `count` items may come in; a large one must leave room for others."""
        free = self.max_queue - self.num_queued
        return free >= (count if count == 1 or self.num_queued == 0 else 2 * count)

    @property
    def may_leave(self) -> bool:
        """Whether what is queued need not wait for more."""
        return self.max_wait == 0 or self.is_closing or self._is_batch_full()

    def add(self, item: ItemT) -> None:
        """Take an item in, or let it wait for room."""
        item.ordinal = next(self._ordinals)
        if self.num_queued < self.max_queue:
            self._enqueue(item)
        else:
            heapq.heappush(self._outside_ranks, (-item.priority, item.ordinal))
            self._outside[item.ordinal] = item

    def put_back(self, items: Iterable[ItemT]) -> None:
        """Queue items again that were taken, ahead of all that have not been, even if the queue is full."""
        later = self._items
        self._items = {}
        for item in items:
            self._enqueue(item)
        for priority, others in later.items():
            self._items.setdefault(priority, {}).update(others)

    def remove(self, item: ItemT, now: float) -> bool:
        """Remove an item; return whether it was still waiting."""
        if item in self._items.get(item.priority, ()):
            self._dequeue(item)
            self._let_in(now)
            return True
        if self._outside.pop(item.ordinal, None) is None:
            return False
        self._remove_stale_ranks()
        return True

    def ready_at(self) -> float | None:
        """Return when the next batch may leave if nothing more arrives; None if nothing is queued."""
        if self.num_queued == 0:
            return None
        oldest = self._oldest().arrived
        return oldest if self.may_leave else oldest + self.max_wait

    def take(self, now: float, num_free: int = 1) -> list[ItemT]:
        """Take the next batch out of the queue.

        Args:
            now: the time, in seconds.
            num_free: places that could run a batch now; what is queued is shared out between them,
                unless batches wait to fill.

        Returns:
            The items, the leader first; empty if none is queued or the batch may still fill.
        """
        if self.num_queued == 0 or (self.max_wait != 0 and self._must_fill(now)):
            return []
        limit = self.full_size
        if self.max_wait == 0:
            limit = min(limit, -(-self.num_queued // num_free))
        batch = self._alike(now, limit) if self.sized else self._in_order(now, limit)
        for item in batch:
            self._dequeue(item)
        if self._outside:
            self._let_in(now)
        return batch

    def clear(self) -> list[ItemT]:
        """Take out everything, whether queued or outside."""
        waiting = [item for items in self._items.values() for item in items]
        waiting += self._outside.values()
        self._items, self._by_size, self._outside, self._outside_ranks = {}, {}, OrderedDict(), []
        self.num_queued, self._total_size = 0, 0.0
        return waiting

    def _must_fill(self, now: float) -> bool:
        """Return whether the next batch still waits for more."""
        return not self.may_leave and self._oldest().arrived + self.max_wait > now

    def _enqueue(self, item: ItemT) -> None:
        self._items.setdefault(item.priority, {})[item] = None
        self.num_queued += 1
        if self.sized:
            insort(self._by_size.setdefault(item.priority, []), (item.size, item.ordinal, item))
            self._total_size += item.size

    def _dequeue(self, item: ItemT) -> None:
        items = self._items[item.priority]
        del items[item]
        self.num_queued -= 1
        if self.sized:
            by_size = self._by_size[item.priority]
            del by_size[bisect_left(by_size, (item.size, item.ordinal))]
            self._total_size -= item.size
        if not items:
            del self._items[item.priority]
            self._by_size.pop(item.priority, None)

    def _let_in(self, now: float) -> None:
        """Let items in from outside while there is room."""
        while self._outside and self.num_queued < self.max_queue:
            ordinal, oldest = next(iter(self._outside.items()))
            if oldest.arrived + self.max_age > now:
                ordinal = heapq.heappop(self._outside_ranks)[1]
            item = self._outside.pop(ordinal, None)
            if item is not None:
                self._enqueue(item)
        self._remove_stale_ranks()

    def _remove_stale_ranks(self) -> None:
        if len(self._outside_ranks) > 2 * len(self._outside) + _MIN_STALE:
            self._outside_ranks = [rank for rank in self._outside_ranks if rank[1] in self._outside]
            heapq.heapify(self._outside_ranks)

    def _oldest(self) -> ItemT:
        return min((next(iter(items)) for items in self._items.values()), key=lambda item: item.ordinal)

    def _is_batch_full(self) -> bool:
        if self.num_queued >= self.full_size or self.is_full:
            return True
        return self.max_cost is not None and self._total_size >= self.max_cost

    def _in_order(self, now: float, limit: int) -> list[ItemT]:
        """Return the `limit` most urgent items."""
        ordered: Iterable[ItemT] = itertools.chain.from_iterable(
            map(self._items.__getitem__, sorted(self._items, reverse=True))
        )
        if len(self._items) > 1:
            # Everyone past the age cap goes first; dict drops what comes a second time.
            ordered = dict.fromkeys(itertools.chain(self._overdue(now), ordered))
        return list(itertools.islice(ordered, limit))

    def _overdue(self, now: float) -> list[ItemT]:
        found: list[ItemT] = []
        for items in self._items.values():
            found += itertools.takewhile(lambda item: item.arrived + self.max_age <= now, items)
        return sorted(found, key=lambda item: item.ordinal)

    def _alike(self, now: float, limit: int) -> list[ItemT]:
        """Return the most urgent item and those nearest to it in size, higher priorities first."""
        priorities = sorted(self._items, reverse=True)
        leader = self._oldest()
        if leader.arrived + self.max_age > now:
            leader = next(iter(self._items[priorities[0]]))
        batch = [leader]
        total = longest = leader.size
        for priority in priorities:
            for item in _nearest_first(self._by_size[priority], leader.size):
                if len(batch) == limit:
                    return batch
                longer = max(longest, item.size)
                if item is not leader and self._fits(len(batch) + 1, total + item.size, longer):
                    batch.append(item)
                    total += item.size
                    longest = longer
        return batch

    def _fits(self, num_items: int, total: float, longest: float) -> bool:
        """Return whether a batch of these sizes keeps within cost and padding."""
        padded = num_items * longest
        if self.max_cost is not None and padded > self.max_cost:
            return False
        return total >= padded * (1 - self.max_padding)


def _nearest_first(by_size: list[tuple[float, int, ItemT]], size: float) -> Iterator[ItemT]:
    """Yield the items in the order of their distance from `size`, of equals the shorter one first."""
    right = bisect_left(by_size, (size, -1))
    left = right - 1
    while left >= 0 or right < len(by_size):
        goes_left = right == len(by_size) or (
            left >= 0 and size - by_size[left][0] <= by_size[right][0] - size
        )
        yield by_size[left if goes_left else right][2]
        if goes_left:
            left -= 1
        else:
            right += 1
