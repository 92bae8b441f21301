"""Progress and summary: for a terminal, for a log, for a machine."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from .monitor import Monitor
from .summary import Plan, Reporter, Summary

_LOG_SECONDS = 30.0


def make_reporter(*, as_json: bool, out: TextIO | None = None) -> Reporter:
    """Chooses by what the progress is written to: a terminal gets a bar, all else plain lines."""
    if as_json:
        return JsonReporter(out or sys.stdout)
    out = out or sys.stderr
    return BarReporter() if out.isatty() else LineReporter(out)


class _Paced:
    """Passes progress on now and then; warnings at once."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._last = clock()
        self._num_warned = 0

    def due(self) -> bool:
        now = self._clock()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True

    def new_warnings(self, monitor: Monitor) -> list[str]:
        new = monitor.warnings[self._num_warned :]
        self._num_warned = len(monitor.warnings)
        return new


class LineReporter:
    """A plain line now and then: a log should not drown in them."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._paced = _Paced(_LOG_SECONDS)

    def started(self, num_records: int | None, monitor: Monitor, lanes: tuple[str, ...]) -> None:
        """Says how much there is and what runs it."""
        earlier = f", {monitor.num_earlier:,} done earlier" if monitor.num_earlier else ""
        records = "" if num_records is None else f" {num_records:,} records"
        self._say(f"running{records} on {', '.join(lanes)}{earlier}")
        self._warn(monitor)

    def progressed(self, num_records: int | None, monitor: Monitor) -> None:
        """Says how far it is."""
        self._warn(monitor)
        if self._paced.due():
            rate, eta = pace(num_records, monitor)
            done = monitor.num_earlier + monitor.num_done
            self._say(
                f"{done:,} of {_count(num_records)} records, {rate:,.1f}/s, "
                f"{_clock(eta)} left, {monitor.num_earlier_bad + monitor.num_bad:,} bad"
            )

    def finished(self) -> None:
        """Has nothing to close."""

    def _warn(self, monitor: Monitor) -> None:
        for text in self._paced.new_warnings(monitor):
            self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class JsonReporter:
    """One JSON object per line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._paced = _Paced(_LOG_SECONDS)

    def started(self, num_records: int | None, monitor: Monitor, lanes: tuple[str, ...]) -> None:
        """Event ``started``."""
        self._say("started", num_records=num_records, num_earlier=monitor.num_earlier, lanes=lanes)

    def progressed(self, num_records: int | None, monitor: Monitor) -> None:
        """Events ``warning`` and ``progress``."""
        for text in self._paced.new_warnings(monitor):
            self._say("warning", text=text)
        if self._paced.due():
            rate, eta = pace(num_records, monitor)
            done = monitor.num_earlier + monitor.num_done
            bad = monitor.num_earlier_bad + monitor.num_bad
            self._say("progress", done=done, num_records=num_records, rate=rate, eta=eta, num_bad=bad)

    def finished(self) -> None:
        """Has nothing to close."""

    def _say(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, "time": time.time(), **fields}), file=self._out, flush=True)


class BarReporter:
    """A bar with rate, time left, bad records and the load of every lane."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("loading", total=None, told="")
        self._paced = _Paced(0.0)

    def started(self, num_records: int | None, monitor: Monitor, lanes: tuple[str, ...]) -> None:
        """Shows the bar."""
        self._progress.start()
        self._progress.update(
            self._task, description="records", total=num_records, completed=monitor.num_earlier
        )

    def progressed(self, num_records: int | None, monitor: Monitor) -> None:
        """Moves the bar."""
        for text in self._paced.new_warnings(monitor):
            self._progress.console.print(f"[yellow]warning:[/] {text}")
        rate, _ = pace(num_records, monitor)
        load = " ".join(f"{busy:.0%}" for busy in monitor.busy_fractions().values())
        self._progress.update(
            self._task,
            total=num_records,
            completed=monitor.num_earlier + monitor.num_done,
            told=f"{rate:,.1f}/s  lanes {load}  bad {monitor.num_earlier_bad + monitor.num_bad:,}",
        )

    def finished(self) -> None:
        """Leaves the bar as it is."""
        self._progress.stop()


def pace(num_records: int | None, monitor: Monitor) -> tuple[float, float | None]:
    """Returns records per second of this run, and the seconds left when that can be told."""
    rate = monitor.num_done / max(monitor.seconds, 1e-9)
    left = None if num_records is None else num_records - monitor.num_earlier - monitor.num_done
    return rate, (max(left, 0) / rate if left is not None and rate else None)


def tell_summary(summary: Summary, *, as_json: bool) -> str:
    """Puts a summary into words, or into one line of JSON."""
    if as_json:
        return json.dumps({"event": "summary", **dataclasses.asdict(summary)})
    earlier = f" ({summary.num_earlier:,} of them earlier)" if summary.num_earlier else ""
    lanes = ", ".join(f"{name} {busy:.0%}" for name, busy in summary.lanes.items())
    stages = ", ".join(f"{name} {spent:.1f} s" for name, spent in summary.stages.items())
    told = f", told in {summary.output}/_errors-*.jsonl" if summary.error_files else ""
    lines = [
        f"{summary.num_records:,} records done{earlier}",
        f"  time     {summary.seconds:.1f} s, {summary.rate:,.1f} records/s",
        f"  output   {summary.files} files in {summary.output}",
        f"  bad      {summary.num_bad:,} records{told}",
        f"  padding  {summary.padding:.1%} of the batches",
        f"  lanes    {lanes or 'none'}",
        f"  stages   {stages or 'none'}",
    ]
    return "\n".join(lines)


def tell_plan(plan: Plan, *, as_json: bool) -> str:
    """Puts a plan into words, or into one line of JSON."""
    if as_json:
        return json.dumps({"event": "plan", **dataclasses.asdict(plan)})
    columns = ", ".join(f"{name} {kind}" for name, kind in plan.columns.items()) or "none, the input is empty"
    earlier = f"; {plan.num_earlier:,} done earlier" if plan.num_earlier else ""
    return "\n".join(
        [
            "dry run: everything loads and the first batch runs; nothing was written",
            f"  input    {_count(plan.num_records)} records in {plan.num_files} {plan.input_format} files; "
            f"the first {plan.num_tried} ran{earlier}",
            f"  lanes    {', '.join(plan.devices)}",
            f"  output   id, {columns}",
        ]
    )


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
