"""What driver and actors tell each other."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import traceback
from typing import NamedTuple

from ...errors import AsyncDPError
from ..fingerprint import ModelPrint
from ..options import InferOptions
from ..readers.pieces import Reading
from ..report.monitor import Monitor, SlowBatch


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that an actor needs before it can run blocks.

    Attributes:
        folder: working folder of the driver, which relative paths start from.
        paths: where the driver finds modules.
        versions: of the packages that make the outputs.
    """

    options: InferOptions
    reading: Reading
    folder: str
    paths: tuple[str, ...]
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


class Opened(NamedTuple):
    """An actor has loaded the model.

    Attributes:
        lanes: names of its lanes.
        print: what the outputs depend on, as found on its node.
        checks_inputs: whether nothing but the dtypes of the input's columns decides what the model gets.
    """

    lanes: tuple[str, ...]
    print: ModelPrint
    checks_inputs: bool


class Tried(NamedTuple):
    """The first batch has run: the columns that came out, and the number of records."""

    columns: dict[str, str]
    num_records: int


class PackedError(NamedTuple):
    """An exception that an actor returns, since what it raises Ray would take for a mistake in the actor."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> PackedError:
        """Pack an exception; one of another package may not let itself be sent, so that its text goes."""
        if isinstance(error, AsyncDPError):
            return cls(error)
        return cls(RuntimeError("".join(traceback.format_exception(error))))

    def unpack(self, node: str | None = None) -> Exception:
        """Return the exception.

        Args:
            node: name of the node to tell of.
        """
        if node is not None:
            self.error.args = (f"On node {node}: {self.error}",)
        return self.error


@dataclasses.dataclass
class Counts:
    """What an actor has done since it began."""

    num_done: int = 0
    num_bad: int = 0
    num_batches: int = 0
    num_tokens: int = 0
    cost: int = 0
    padding: int = 0
    last_error: str = ""
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    sizes: dict[int, int] = dataclasses.field(default_factory=dict)
    slowest: list[SlowBatch] = dataclasses.field(default_factory=list)
    lane_seconds: tuple[float, ...] = ()
    """Seconds that each lane was busy."""

    @classmethod
    def of(cls, monitor: Monitor, lane_seconds: tuple[float, ...]) -> Counts:
        """Take what a monitor has counted."""
        names = ("num_done", "num_bad", "num_batches", "num_tokens", "cost", "padding", "last_error")
        same = {name: getattr(monitor, name) for name in names}
        return cls(
            **same,
            stages=dict(monitor.stages),
            sizes=dict(monitor.sizes),
            slowest=list(monitor.slowest),
            lane_seconds=lane_seconds,
        )


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide what comes out."""
    return {name: importlib.metadata.version(name) for name in ("asyncdp", "torch")}
