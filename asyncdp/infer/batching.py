"""Which records go together; no threads, no clock, no torch."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Generator, Iterable, Sequence

from .records import Records, in_blocks


@dataclasses.dataclass(frozen=True)
class Window:
    """Neighbouring records of one block, which are sorted by length together.

    Attributes:
        block: number of the block.
        records: its records in order of position.
        block_size: number of records of the whole block when this is its last window, else None.
    """

    block: int
    records: Records
    block_size: int | None


def cut_windows(
    records: Iterable[Records], *, block_size: int, window: int, wanted: Callable[[int], bool]
) -> Generator[Window, None, None]:
    """Cut records into windows that never cross a block's edge.

    The same record meets the same neighbours in every run, whatever was done before: that makes a resumed
    job's output equal to an uninterrupted one's.

    Args:
        records: in order of position, from the first of some block on.
        block_size: positions per block.
        window: most records per window.
        wanted: returns whether a block is to be done; records of others are read and skipped.
    """
    for block, parts in itertools.groupby(in_blocks(records, block_size), operator.itemgetter(0)):
        if not wanted(block):
            continue
        waiting: list[Records] = []
        num_waiting = size = 0
        for _, some in parts:
            waiting.append(some)
            size += len(some)
            num_waiting += len(some)
            if num_waiting >= window:
                whole, num_waiting = Records.joined(waiting), num_waiting % window
                starts = range(0, len(whole) - num_waiting, window)
                # At once: whoever writes into a pipe may write no more for long.
                yield from (Window(block, whole.pick(range(i, i + window)), None) for i in starts)
                waiting = [whole.pick(range(len(whole) - num_waiting, len(whole)))]
        yield Window(block, Records.joined(waiting), size)


def plan_batches(costs: Sequence[int], max_records: int, max_cost: int | None) -> list[Sequence[int]]:
    """Group items of similar length.

    Args:
        costs: length of every item.
        max_records: most items per batch.
        max_cost: most items times longest item per batch, None for no limit.

    Returns:
        Batches of indices, the longest items first, so that memory runs out early if it does.
    """
    if costs and min(costs) == max(costs):
        size = max_records if max_cost is None else min(max_records, max_cost // max(costs[0], 1)) or 1
        return [range(start, min(start + size, len(costs))) for start in range(0, len(costs), size)]
    batches: list[list[int]] = []
    for index in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        batch = batches[-1] if batches else []
        if batch and _fits(costs[index], costs[batch[0]], len(batch), max_records, max_cost):
            batch.append(index)
        else:
            batches.append([index])
    return list(batches)


def _fits(cost: int, longest: int, size: int, max_records: int, max_cost: int | None) -> bool:
    if size >= max_records or (max_cost is not None and longest * (size + 1) > max_cost):
        return False
    # A batch that is not tiny ends early rather than pad: fewer padded entries for somewhat more batches.
    return size < max_records // 4 or cost >= 0.9 * longest


def padding(costs: Sequence[int]) -> int:
    """Return how many entries are added when all are padded to the longest."""
    return max(costs, default=0) * len(costs) - sum(costs)
