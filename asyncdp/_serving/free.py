"""The slots that run nothing, and which of them is next."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from .slots import Slot

_load = attrgetter("load")


class FreeSlots(list[Slot]):
    """Slots that run nothing; the last one is next: the one that ended last.

    Where slots share lanes, it is one whose lane has least to do.

    Args:
        slots: all there are; the first of them is next.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__(reversed(slots))
        self._share_lanes = len({slot.where for slot in slots}) < len(slots)

    @property
    def num_alike(self) -> int:
        """Over how many batches to share out what waits: one on each lane that is as free as the next."""
        if not self._share_lanes:
            return len(self)
        return len({slot.where for slot in self if slot.load == self[-1].load})

    def order(self) -> None:
        """Bring the slot to use next to the end."""
        if self._share_lanes:
            self.sort(key=_load, reverse=True)

    def bring_healthy(self) -> bool:
        """Bring one whose lane does not hang to the end; return whether there is one."""
        for position in reversed(range(len(self))):
            slot = self[position]
            if not slot.is_suspect or slot.change_lane():
                self.append(self.pop(position))
                return True
        return False
