"""A block that ended the process that ran it: which of its records does it? No processes, no clock."""

from __future__ import annotations

import dataclasses

MAX_DEATHS = 3
"""So many processes must have ended before a block, or a record, is held to be the cause."""


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What an actor is to run of a block.

    Attributes:
        alone: whether nothing else may run in the actor meanwhile.
        probed: first and last but one record, as offsets in the block, whose outputs are thrown away; None
            for the whole block, which is written.
        refused: offsets of the records that are not run, but count as bad.
        batch_size: most records per batch; None for the job's.
    """

    block: int
    alone: bool = False
    probed: tuple[int, int] | None = None
    refused: tuple[int, ...] = ()
    batch_size: int | None = None


class Suspect:
    """Finds the records at fault by halving, and has the block run without them in the end.

    A process may end for many a reason, so the whole block has to end three, and so has a single record. If
    no record ends one when it is alone, they do it together, and smaller batches are tried.

    Args:
        block: its index.
        size: records in it.
        batch_size: most records per batch of the job.
    """

    def __init__(self, block: int, size: int, batch_size: int) -> None:
        self.block = block
        self.size = size
        self.num_deaths = 1
        self._batch_size = batch_size
        self._limit: int | None = None
        self._refused: set[int] = set()
        self._ranges: list[tuple[int, int]] = []
        self._num_found = 0
        self._smallest = size
        self._num_rounds = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether the block ends processes though none of its records does, not even in batches of one."""
        return self._limit == 0

    def next(self) -> Work:
        """Return what is to be run next."""
        probed = self._ranges[-1] if self._ranges else None
        return Work(self.block, True, probed, tuple(sorted(self._refused)), self._limit)

    def survived(self) -> bool:
        """Note that the actor has done what `next` gave; return whether that was the whole block."""
        if not self._ranges:
            return True
        self._leave()
        return False

    def died(self) -> None:
        """Note that the actor has ended over what `next` gave."""
        self.num_deaths += 1
        if not self._ranges:
            if self.num_deaths >= MAX_DEATHS:
                self._probe(0, self.size)
            return
        start, stop = self._ranges[-1]
        self._smallest = min(self._smallest, stop - start)
        if stop - start > 1:
            self._ranges.pop()
            self._halve(start, stop)
        elif self.num_deaths >= MAX_DEATHS:
            self._refused.add(start)
            self._num_found += 1
            self._leave()

    def _probe(self, start: int, stop: int) -> None:
        self._num_rounds += 1
        self._num_found, self._smallest = 0, self.size
        if stop - start > 1:
            self._halve(start, stop)
        else:
            self._refused.add(start)
            self.num_deaths = 0

    def _halve(self, start: int, stop: int) -> None:
        middle = (start + stop) // 2
        halves = [(middle, stop), (start, middle)]
        self._ranges += [half for half in halves if not self._refused.issuperset(range(*half))]
        self.num_deaths = 0
        if not self._ranges:
            self._end_round()

    def _leave(self) -> None:
        self._ranges.pop()
        self.num_deaths = 0
        if not self._ranges:
            self._end_round()

    def _end_round(self) -> None:
        """Go on to the whole block again, in smaller batches where no single record was at fault."""
        size = self._limit or self._batch_size
        if self._num_found == 0 and (self._num_rounds > 1 or self._smallest < size):
            self._limit = 0 if size == 1 else max(1, min(size, self._smallest) // 2)
