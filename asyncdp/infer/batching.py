"""Pure: which records go together. No threads, no clock, no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence

from .records import Record


@dataclasses.dataclass(frozen=True)
class Window:
    """Neighbouring records of one block, which are sorted by length together.

    Attributes:
        block: Number of the block.
        records: Its records in order of position.
        closes: Number of records of the whole block when this is its last window, else None.
    """

    block: int
    records: list[Record]
    closes: int | None


def cut_windows(
    records: Iterator[Record], *, block_size: int, window: int, wanted: Callable[[int], bool]
) -> Generator[Window, None, None]:
    """Cuts records into windows that never cross a block's edge.

    The same record meets the same neighbours in every run, whatever was done before: that makes a resumed
    job's output equal to an uninterrupted one's.

    Args:
        records: In order of position, from the first of some block on.
        block_size: Positions per block.
        window: Most records per window.
        wanted: Tells whether a block is to be done; records of others are read and dropped.
    """
    held: list[Record] = []
    block, size = 0, 0
    for record in records:
        if record.position // block_size != block and size:
            if held:
                yield Window(block, held, None)
            yield Window(block, [], size)
            held, size = [], 0
        block = record.position // block_size
        if not wanted(block):
            continue
        size += 1
        held.append(record)
        if len(held) == window:
            yield Window(block, held, None)
            held = []
    if size:
        yield Window(block, held, size)


def plan_batches(costs: Sequence[int], max_records: int, max_cost: int | None) -> list[list[int]]:
    """Groups items of like length.

    Args:
        costs: Length of every item.
        max_records: Most items per batch.
        max_cost: Most items times longest item per batch, None for no limit.

    Returns:
        Batches of indices, the longest items first, so that memory runs out early if it does.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        batch = batches[-1] if batches else []
        if batch and _fits(costs[index], costs[batch[0]], len(batch), max_records, max_cost):
            batch.append(index)
        else:
            batches.append([index])
    return batches


def _fits(cost: int, longest: int, size: int, max_records: int, max_cost: int | None) -> bool:
    if size >= max_records or (max_cost is not None and longest * (size + 1) > max_cost):
        return False
    # A batch that is not tiny ends early rather than pad: on English sentences, batches of 32 from
    # windows of 1024, this takes the padding from 14% of the work to 5% for a fifth more batches.
    return size < max_records // 4 or cost >= 0.9 * longest


def padding(costs: Sequence[int]) -> int:
    """Returns how many entries padding to the longest adds."""
    return max(costs, default=0) * len(costs) - sum(costs)
