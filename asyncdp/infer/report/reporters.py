"""Progress and summary: for a terminal, for a log, for a machine."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any, Self, TextIO

from .events import Event, Progress, Started, Warned
from .summary import Plan, Summary

_MOST_LOADS = 16


def make_reporter(*, as_json: bool, out: TextIO | None = None) -> Reporter:
    """Choose by what the progress is written to: a terminal gets a bar, everything else plain lines."""
    if as_json:
        return JsonReporter(out or sys.stdout)
    out = out or sys.stderr
    return BarReporter() if out.isatty() else LineReporter(out)


class Reporter:
    """Shows the events of a job to a person or a machine; progress only every `pause` seconds."""

    pause = 5.0

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def report(self, event: Event) -> None:
        """Show an event, unless it is progress and too soon."""
        if isinstance(event, Progress):
            if (now := time.monotonic()) - self._last < self.pause:
                return
            self._last = now
        self._show(event)

    def _show(self, event: Event) -> None:
        raise NotImplementedError


class LineReporter(Reporter):
    """A plain line now and then: a log should not drown in them."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def _show(self, event: Event) -> None:
        text = _line(event)
        if text is not None:
            print(text, file=self._out, flush=True)


class JsonReporter(Reporter):
    """One JSON object per line."""

    pause = 30.0

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def _show(self, event: Event) -> None:
        fields = _json_fields(event)
        if fields is not None:
            print(json.dumps({**fields, "time": time.time()}), file=self._out, flush=True)


class BarReporter(Reporter):
    """A bar with rate, time left, bad records, memory and the load of every lane."""

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

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, event: Event) -> None:
        if isinstance(event, Started):
            self._progress.start()
            self._progress.update(
                self._task, description="records", total=event.num_records, completed=event.num_earlier
            )
        elif isinstance(event, Progress):
            text = f"{event.rate:,.1f}/s  {_state(event)}"
            self._progress.update(self._task, total=event.num_records, completed=event.num_done, text=text)
        elif isinstance(event, Warned):
            self._progress.console.print("[yellow]warning:[/] ", end="")
            self._progress.console.print(event.text, markup=False)


def _line(event: Event) -> str | None:
    """Return what a log says of an event."""
    if isinstance(event, Started):
        earlier = f", {event.num_earlier:,} done earlier" if event.num_earlier else ""
        records = "" if event.num_records is None else f" {event.num_records:,} records"
        return f"running{records} on {_names(event.lanes)}{earlier}"
    if isinstance(event, Progress):
        return (
            f"{event.num_done:,} of {format_count(event.num_records)} records, {event.rate:,.1f}/s, "
            f"{format_clock(event.seconds_left)} left, {_state(event)}"
        )
    return f"warning: {event.text}" if isinstance(event, Warned) else None


def _state(event: Progress) -> str:
    memory = "" if event.memory is None else f", {event.memory >> 20:,} MiB"
    nodes = "" if event.nodes is None else f"{format_nodes(event.nodes)}, "
    return f"{event.num_bad:,} bad, {nodes}lanes {_load(list(event.lanes.values()))}{memory}"


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_LOADS:,} more" if len(names) > _MOST_LOADS else ""
    return ", ".join(names[:_MOST_LOADS]) + more


def _load(busy: list[float]) -> str:
    if len(busy) > _MOST_LOADS:
        return f"{sum(busy) / len(busy):.0%} (from {min(busy):.0%} to {max(busy):.0%})"
    return " ".join(f"{part:.0%}" for part in busy) or "idle"


def format_nodes(number: int) -> str:
    """Return a number of nodes in words."""
    return f"{number:,} node{'' if number == 1 else 's'}"


def _json_fields(event: Event) -> dict[str, Any] | None:
    """Return what a line of JSON holds of an event."""
    if isinstance(event, Started):
        return {"event": "started", **dataclasses.asdict(event)}
    if isinstance(event, Progress):
        fields = dataclasses.asdict(event)
        return {
            "event": "progress",
            "done": fields.pop("num_done"),
            "eta": fields.pop("seconds_left"),
            **fields,
        }
    return {"event": "warning", "text": event.text} if isinstance(event, Warned) else None


def format_summary(summary: Summary, *, as_json: bool) -> str:
    """Put a summary into words, or into one line of JSON."""
    if as_json:
        return json.dumps({"event": "summary", **dataclasses.asdict(summary)})
    earlier = f" ({summary.num_earlier:,} of them earlier)" if summary.num_earlier else ""
    lanes = ", ".join(f"{name} {busy:.0%}" for name, busy in summary.lanes.items())
    if len(summary.lanes) > _MOST_LOADS:
        lanes = f"{len(summary.lanes):,}, {_load(list(summary.lanes.values()))}"
    stages = ", ".join(f"{name} {spent:.1f} s" for name, spent in summary.stages.items())
    where = f", listed in {summary.output}/_errors-*.jsonl" if summary.error_files else ""
    tokens = f", {summary.token_rate:,.1f} tokens/s" if summary.num_tokens else ""
    over = ", ".join(f"{count:,} {suffix}" for suffix, count in summary.passed_over.items())
    return f"""\
{summary.num_records:,} records done{earlier}
  time     {summary.seconds:.1f} s, {summary.rate:,.1f} records/s{tokens}
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
    records = f"{format_count(plan.num_records)} records in {plan.num_files} {plan.input_format} files"
    return f"""\
dry run: everything loads and the first batch runs; nothing was written
  input    {records}; the first {plan.num_tried} ran{earlier}
  lanes    {", ".join(plan.devices)}
  output   id, {columns}"""


def format_count(number: int | None) -> str:
    """Return a number of records in words."""
    return "an unknown number of" if number is None else f"{number:,}"


def format_clock(seconds: float | None) -> str:
    """Return a duration in words."""
    if seconds is None:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
