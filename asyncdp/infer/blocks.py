"""What the stages of the pipeline hand to each other: batches, and blocks that fill up."""

from __future__ import annotations

import dataclasses
from typing import Any

from .records import Failure, Record, Rows


@dataclasses.dataclass(frozen=True)
class Batch:
    """Records of one window that go to the model together, with their items and lengths."""

    block: int
    records: list[Record]
    items: list[Any]
    costs: list[int]

    @classmethod
    def of(
        cls, block: int, records: list[Record], items: list[Any], costs: list[int], indices: list[int]
    ) -> Batch:
        """Picks the records of a batch out of those of a window."""
        return cls(
            block, [records[i] for i in indices], [items[i] for i in indices], [costs[i] for i in indices]
        )

    def part(self, indices: slice) -> Batch:
        """Returns some of the records as a batch of their own."""
        return Batch(self.block, self.records[indices], self.items[indices], self.costs[indices])


@dataclasses.dataclass
class OpenBlock:
    """A block that still misses records."""

    index: int
    size: int | None = None
    num_done: int = 0
    rows: list[Rows] = dataclasses.field(default_factory=list)
    failures: list[Failure] = dataclasses.field(default_factory=list)
