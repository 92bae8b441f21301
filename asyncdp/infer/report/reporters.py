"""Progress and summary: for a terminal, for a log, for a machine."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any, TextIO

from .monitor import Monitor
from .summary import Plan, Reporter, Summary


def make_reporter(*, as_json: bool, out: TextIO | None = None) -> Reporter:
    """Choose by what the progress is written to: a terminal gets a bar, everything else plain lines."""
    if as_json:
        return JsonReporter(out or sys.stdout)
    out = out or sys.stderr
    return BarReporter() if out.isatty() else LineReporter(out)


class _PacedReporter(Reporter):
    """Passes progress on every `pause` seconds, and warnings at once."""

    pause = 30.0

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._num_warned = 0

    def progressed(self, num_records: int | None, monitor: Monitor) -> None:
        """Show new warnings, and the progress when it is time."""
        self._show_warnings(monitor)
        if (now := time.monotonic()) - self._last >= self.pause:
            self._last = now
            self._show_progress(num_records, monitor)

    def _show_warnings(self, monitor: Monitor) -> None:
        for text in monitor.warnings[self._num_warned :]:
            self._warn(text)
        self._num_warned = len(monitor.warnings)

    def _warn(self, text: str) -> None:
        raise NotImplementedError

    def _show_progress(self, num_records: int | None, monitor: Monitor) -> None:
        raise NotImplementedError


class LineReporter(_PacedReporter):
    """A plain line now and then: a log should not drown in them."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def started(self, num_records: int | None, monitor: Monitor, lanes: tuple[str, ...]) -> None:
        """Show how much there is and what runs it."""
        earlier = f", {monitor.num_earlier:,} done earlier" if monitor.num_earlier else ""
        records = "" if num_records is None else f" {num_records:,} records"
        self._print(f"running{records} on {', '.join(lanes)}{earlier}")
        self._show_warnings(monitor)

    def _show_progress(self, num_records: int | None, monitor: Monitor) -> None:
        rate, eta = pace(num_records, monitor)
        self._print(
            f"{monitor.num_all_done:,} of {_count(num_records)} records, {rate:,.1f}/s, "
            f"{_clock(eta)} left, {monitor.num_all_bad:,} bad"
        )

    def _warn(self, text: str) -> None:
        self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class JsonReporter(_PacedReporter):
    """One JSON object per line."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def started(self, num_records: int | None, monitor: Monitor, lanes: tuple[str, ...]) -> None:
        """Print the event `started`."""
        self._print("started", num_records=num_records, num_earlier=monitor.num_earlier, lanes=lanes)

    def _show_progress(self, num_records: int | None, monitor: Monitor) -> None:
        rate, eta = pace(num_records, monitor)
        done, bad = monitor.num_all_done, monitor.num_all_bad
        self._print("progress", done=done, num_records=num_records, rate=rate, eta=eta, num_bad=bad)

    def _warn(self, text: str) -> None:
        self._print("warning", text=text)

    def _print(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, "time": time.time(), **fields}), file=self._out, flush=True)


class BarReporter(_PacedReporter):
    """A bar with rate, time left, bad records and the load of every lane."""

    pause = 0.0

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("loading", total=None, text="")

    def started(self, num_records: int | None, monitor: Monitor, lanes: tuple[str, ...]) -> None:
        """Show the bar."""
        self._progress.start()
        self._progress.update(
            self._task, description="records", total=num_records, completed=monitor.num_earlier
        )

    def finished(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()

    def _show_progress(self, num_records: int | None, monitor: Monitor) -> None:
        rate, _ = pace(num_records, monitor)
        load = " ".join(f"{busy:.0%}" for busy in monitor.busy_fractions().values())
        text = f"{rate:,.1f}/s  lanes {load}  bad {monitor.num_all_bad:,}"
        self._progress.update(self._task, total=num_records, completed=monitor.num_all_done, text=text)

    def _warn(self, text: str) -> None:
        self._progress.console.print(f"[yellow]warning:[/] {text}")


def pace(num_records: int | None, monitor: Monitor) -> tuple[float, float | None]:
    """Return records per second of this run, and the seconds left where they can be estimated."""
    rate = monitor.num_done / max(monitor.seconds, 1e-9)
    left = None if num_records is None else num_records - monitor.num_all_done
    return rate, (max(left, 0) / rate if left is not None and rate else None)


def format_summary(summary: Summary, *, as_json: bool) -> str:
    """Put a summary into words, or into one line of JSON."""
    if as_json:
        return json.dumps({"event": "summary", **dataclasses.asdict(summary)})
    earlier = f" ({summary.num_earlier:,} of them earlier)" if summary.num_earlier else ""
    lanes = ", ".join(f"{name} {busy:.0%}" for name, busy in summary.lanes.items())
    stages = ", ".join(f"{name} {spent:.1f} s" for name, spent in summary.stages.items())
    where = f", listed in {summary.output}/_errors-*.jsonl" if summary.error_files else ""
    over = ", ".join(f"{count:,} {suffix}" for suffix, count in summary.passed_over.items())
    return f"""\
{summary.num_records:,} records done{earlier}
  time     {summary.seconds:.1f} s, {summary.rate:,.1f} records/s
  output   {summary.files} files in {summary.output}
  bad      {summary.num_bad:,} records{where}
  padding  {summary.padding:.1%} of the batches
  lanes    {lanes or "none"}
  stages   {stages or "none"}""" + (f"\n  ignored  files that no reader takes: {over}" if over else "")


def format_plan(plan: Plan, *, as_json: bool) -> str:
    """Put a plan into words, or into one line of JSON."""
    if as_json:
        return json.dumps({"event": "plan", **dataclasses.asdict(plan)})
    columns = ", ".join(f"{name} {kind}" for name, kind in plan.columns.items()) or "none, the input is empty"
    earlier = f"; {plan.num_earlier:,} done earlier" if plan.num_earlier else ""
    records = f"{_count(plan.num_records)} records in {plan.num_files} {plan.input_format} files"
    return f"""\
dry run: everything loads and the first batch runs; nothing was written
  input    {records}; the first {plan.num_tried} ran{earlier}
  lanes    {", ".join(plan.devices)}
  output   id, {columns}"""


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
