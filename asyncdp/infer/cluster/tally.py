"""What all actors together have done, and how busy their nodes are; no processes, no clock."""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from typing import NamedTuple

from ..output.journal import Block
from ..report.monitor import NUM_SLOWEST, Monitor
from .messages import Counts


class NodeLoad(NamedTuple):
    """The mean of a node's lanes, as one lane."""

    name: str
    busy_seconds: float


@dataclasses.dataclass
class _Member:
    node: str
    counts: Counts = dataclasses.field(default_factory=Counts)
    num_done: int = 0
    num_bad: int = 0


class Tally:
    """Adds up what actors say; stands for an engine where a job is watched.

    Records count once their block is in the journal; those of blocks in the work count as long as their
    actor lives.

    Args:
        monitor: gets the sums.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._members: dict[int, _Member] = {}
        self._ended: dict[str, list[float]] = {}
        self._past = Counts()
        self._num_done = 0
        self._num_bad = 0

    @property
    def runtime(self) -> Tally:
        """Itself: what a job asks of an engine's runtime is here."""
        return self

    @property
    def lanes(self) -> list[NodeLoad]:
        """The nodes that have, or had, an actor."""
        busy = {name: list(seconds) for name, seconds in self._ended.items()}
        for member in self._members.values():
            busy.setdefault(member.node, []).extend(_mean(member.counts.lane_seconds))
        return [NodeLoad(name, sum(seconds)) for name, seconds in busy.items()]

    def statistics(self) -> Tally:
        """Return itself; see `runtime`."""
        return self

    def start(self, actor: int, node: str) -> None:
        """Count an actor on a node from now on."""
        self._members[actor] = _Member(node)

    def note(self, actor: int, counts: Counts) -> None:
        """Take what an actor says of itself."""
        if actor in self._members:
            self._members[actor].counts = counts

    def finish(self, actor: int, block: Block) -> None:
        """Count a block that is in the journal."""
        self._num_done += block.num_records
        self._num_bad += block.num_bad
        if (member := self._members.get(actor)) is not None:
            member.num_done += block.num_records
            member.num_bad += block.num_bad

    def end(self, actor: int) -> None:
        """Count an actor no longer; what it did not finish is not done."""
        member = self._members.pop(actor, None)
        if member is not None:
            self._ended.setdefault(member.node, []).extend(_mean(member.counts.lane_seconds))
            self._past = _added([self._past, member.counts])

    def apply(self) -> None:
        """Write the sums into the monitor."""
        members = self._members.values()
        partly = [(m.counts.num_done - m.num_done, m.counts.num_bad - m.num_bad) for m in members]
        monitor = self.monitor
        monitor.num_done = self._num_done + sum(max(done, 0) for done, _ in partly)
        monitor.num_bad = self._num_bad + sum(max(bad, 0) for _, bad in partly)
        monitor.num_nodes = len({member.node for member in members})
        total = _added([self._past, *(member.counts for member in members)])
        for name in ("num_batches", "num_tokens", "cost", "padding", "stages", "slowest", "last_error"):
            setattr(monitor, name, getattr(total, name))
        monitor.sizes = Counter(total.sizes)


def _mean(seconds: tuple[float, ...]) -> list[float]:
    return [sum(seconds) / len(seconds)] if seconds else []


def _added(parts: list[Counts]) -> Counts:
    total = Counts()
    stages, sizes = Counter[str](), Counter[int]()
    for part in parts:
        for name in ("num_done", "num_bad", "num_batches", "num_tokens", "cost", "padding"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        stages.update(part.stages)  # which adds seconds as well
        sizes.update(part.sizes)
        total.last_error = part.last_error or total.last_error
    total.stages, total.sizes = dict(stages), dict(sizes)
    total.slowest = heapq.nlargest(NUM_SLOWEST, [batch for part in parts for batch in part.slowest])
    return total
