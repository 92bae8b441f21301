"""A picture of a job: records per second and the load of every lane over time."""

from __future__ import annotations

import importlib
import importlib.util
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import JobUsageError, MissingExtraError
from ..files import whole_file
from .monitor import Sample


def check_plot(path: Path, flag: str = "--plot") -> None:
    """Fail before the job starts when its picture could not be drawn at the end.

    Raises:
        JobUsageError: the suffix is not known, or the folder is missing or read-only.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise JobUsageError(f"{flag} {path} has no known suffix", "Name a .png or .svg file.")
    check_folder_of(path, flag)
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(flag, "matplotlib", "cli")


def check_folder_of(path: Path, flag: str) -> None:
    """Fail early when a file could not be written.

    Raises:
        JobUsageError: its folder is missing or read-only.
    """
    if not path.parent.is_dir():
        raise JobUsageError(f"{flag} {path}: there is no folder {path.parent}", "Make it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise JobUsageError(f"{flag} {path}: {path.parent} is not writable", "Name a file elsewhere.")


def draw_plot(path: Path, samples: list[Sample]) -> None:
    """Draw the samples of a job into a PNG or SVG file."""
    figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(9, 5), layout="constrained")
    rate, load = figure.subplots(2, 1, sharex=True)
    spans = [(a, b) for a, b in pairwise(samples) if b.seconds > a.seconds]
    times = [after.seconds for _, after in spans]
    rate.plot(times, [(b.num_done - a.num_done) / (b.seconds - a.seconds) for a, b in spans])
    rate.set_ylabel("records per second")
    for name in samples[-1].lanes if samples else ():
        load.plot(times, lane_loads(spans, name), label=name)
    load.set(ylabel="lane busy", xlabel="seconds", ylim=(0, 1.05))
    if spans:
        load.legend(loc="lower right")
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def lane_loads(spans: list[tuple[Sample, Sample]], name: str) -> list[float]:
    """Return the part of each span of time that a lane was busy, 0 to 1.

    A lane counts a task only once it has ended, so what does not fit into a span was done in those before.
    """
    loads, uncounted = [], 0.0
    for before, after in reversed(spans):
        seconds = after.seconds - before.seconds
        uncounted += after.lanes[name] - before.lanes.get(name, 0.0)
        busy = min(seconds, uncounted)
        uncounted -= busy
        loads.append(busy / seconds)
    return loads[::-1]
