"""`asyncdp trace summary`: what a recorded trace says, for the terminal."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import TraceFileError

_ROW = "{:<14} {:<16} {:>8} {:>11} {:>9} {:>9} {:>9} {:>6}"


def summarize(path: Path) -> str:
    """Format a table of a trace: per lane and kind of task its count, milliseconds and share of the time.

    Raises:
        TraceFileError: the file cannot be read, or is no trace that asyncdp wrote.
    """
    spans, num_dropped = _read(path)
    dropped = f"; {num_dropped} more spans were dropped, for more than max_events" if num_dropped else ""
    if not spans:
        return f"{path}: no tasks were recorded{dropped}"
    begin = min(span["ts"] for span in spans)
    whole = max(span["ts"] + span["dur"] for span in spans) - begin
    passes = len({span["args"]["pass"] for span in spans if "pass" in span["args"]})
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for span in spans:
        kind = span["name"] if span["cat"] == "on lane" else f"{span['name']} ({span['cat']})"
        groups[span["args"]["lane"], kind].append(span["dur"] / 1000)
    lines = [f"{path}: {passes} passes in {whole / 1000:.1f} ms{dropped}", ""]
    lines.append(_ROW.format("lane", "task", "count", "total ms", "mean", "p50", "p99", "share"))
    for (lane, kind), durations in sorted(groups.items()):
        lines.append(_line(lane, kind, sorted(durations), whole / 1000))
    return "\n".join(lines)


def _line(lane: str, kind: str, durations: list[float], whole: float) -> str:
    total = sum(durations)
    p50, p99 = (durations[int(len(durations) * share)] for share in (0.5, 0.99))
    numbers = [f"{value:.3f}" for value in (total, total / len(durations), p50, p99)]
    return _ROW.format(lane, kind, len(durations), *numbers, f"{total / whole:.0%}" if whole else "-")


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the spans of a trace, and how many more there were."""
    try:
        loaded = json.loads(path.read_text())
        spans = [event for event in loaded["traceEvents"] if event["ph"] == "X" and "lane" in event["args"]]
        return spans, int(loaded.get("otherData", {}).get("num_dropped", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceFileError(path, error) from error
