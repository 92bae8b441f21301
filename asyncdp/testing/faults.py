"""What can go wrong on a fake device."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from .._checks import as_seconds


class FaultKind(enum.Enum):
    """What goes wrong with one task."""

    RAISE = "raise"
    DELAY = "delay"
    HANG = "hang"
    LOSE = "lose"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong with one task; made by the four class methods."""

    kind: FaultKind
    error: BaseException | None = None
    seconds: float = 0.0

    @classmethod
    def raising(cls, error: BaseException) -> Fault:
        """Make a fault by which the task raises `error` instead of running."""
        return cls(FaultKind.RAISE, error=error)

    @classmethod
    def delay(cls, seconds: float) -> Fault:
        """Make a fault by which the task takes `seconds` of virtual time longer.

        Raises:
            ValueError: `seconds` is negative, or no number.
        """
        return cls(FaultKind.DELAY, seconds=as_seconds("seconds", seconds))

    @classmethod
    def hang(cls) -> Fault:
        """Make a fault by which the task does not complete until `FakeDevice.release`."""
        return cls(FaultKind.HANG)

    @classmethod
    def lose(cls) -> Fault:
        """Make a fault by which the device is lost while it runs the task."""
        return cls(FaultKind.LOSE)
