"""A job as one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

from ..files import write_whole
from .history import samples_of
from .overview import Overview, facts_of
from .plot import lane_loads
from .reporters import format_clock

Series = Mapping[str, Sequence[tuple[float, float]]]

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a00", "#666666")
_LEAST_SPAN = 0.9  # seconds
_WIDTH, _HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 12, 12, 28

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1.5rem; }
dt { opacity: .7; } dd { margin: 0; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
table { border-collapse: collapse; } th, td { padding: .15rem .8rem .15rem 0; text-align: right; }
th:last-child, td:last-child { text-align: left; } tr { border-bottom: 1px solid var(--line); }
.legend span { margin-right: 1.2rem; } .legend i { display: inline-block; width: 1em; height: .3em; }
"""


def write_page(path: Path, overview: Overview) -> None:
    """Write the page of a job.

    Raises:
        OutputError: the disk does not take it.
    """
    write_whole(path, make_page(overview).encode())


def make_page(overview: Overview) -> str:
    """Return the page of a job."""
    title = f"{overview.folder.absolute().name}: {overview.state}"
    listed = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts_of(overview).items())
    charts = _charts(overview) if overview.points else "<p>The job noted nothing of its course.</p>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><dl>{listed}</dl>{charts}"
        f"</body></html>\n"
    )


def _charts(overview: Overview) -> str:
    samples = samples_of(overview.points)
    memory = zip(samples, overview.points, strict=True)
    held = [(sample.seconds, point.memory / 2**20) for sample, point in memory if point.memory]
    if len(samples) > 2 and samples[-1].seconds - samples[-2].seconds < _LEAST_SPAN:
        del samples[-2]  # a rate over the last moment alone says nothing
    spans = [(a, b) for a, b in pairwise(samples) if b.seconds > a.seconds]
    ends = [after.seconds for _, after in spans]
    rates = [max(0, b.num_done - a.num_done) / (b.seconds - a.seconds) for a, b in spans]
    loads = {name: lane_loads(spans, name) for name in samples[-1].lanes}
    return "".join(
        [
            _lines("Records per second", {"": list(zip(ends, rates, strict=True))}),
            _lines(
                "Load of the lanes",
                {name: list(zip(ends, values, strict=True)) for name, values in loads.items()},
                top=1.0,
            ),
            _lines("Memory, MiB", {"": held}),
            _bars("Batches by number of records", {f"≤ {n:,}": count for n, count in overview.sizes.items()}),
            _bars("Seconds by stage", overview.stages),
            _slowest(overview),
        ]
    )


def _lines(title: str, series: Series, top: float | None = None) -> str:
    """Return a chart of lines over time in seconds."""
    right = max((x for line in series.values() for x, _ in line), default=0.0) or 1.0
    top = top or max((y for line in series.values() for _, y in line), default=0.0) or 1.0

    def place(x: float, y: float) -> str:
        across = _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)
        return f"{across:.1f},{_HEIGHT - _BOTTOM - min(y / top, 1) * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    drawn = [
        f'<polyline fill="none" stroke="{_COLORS[index % len(_COLORS)]}" stroke-width="1.5" '
        f'points="{" ".join(place(x, y) for x, y in line)}"><title>{escape(name)}</title></polyline>'
        for index, (name, line) in enumerate(series.items())
    ]
    for part in (0.0, 0.5, 1.0):
        y = _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)
        drawn.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="var(--line)"/>')
        drawn.append(_text(_LEFT - 6, y + 4, f"{top * part:,.4g}", "end"))
        across = _LEFT + part * (_WIDTH - _LEFT - _RIGHT)
        drawn.append(
            _text(
                across, _HEIGHT - 8, format_clock(right * part), ("start", "middle", "end")[round(part * 2)]
            )
        )
    legend = "".join(
        f'<span><i style="background:{_COLORS[index % len(_COLORS)]}"></i> {escape(name)}</span>'
        for index, name in enumerate(series)
        if name
    )
    return _figure(title, drawn, _HEIGHT) + (f'<p class="legend">{legend}</p>' if legend else "")


def _bars(title: str, values: Mapping[str, float]) -> str:
    """Return a chart of a bar per value."""
    largest = max(values.values(), default=0.0) or 1.0
    drawn = []
    for index, (name, value) in enumerate(values.items()):
        y = _TOP + 24 * index
        width = value / largest * (_WIDTH - 2 * _LEFT - 120)
        drawn.append(f'<rect x="{_LEFT + 50}" y="{y}" width="{width:.1f}" height="16" fill="{_COLORS[0]}"/>')
        drawn.append(_text(_LEFT + 44, y + 13, name, "end"))
        drawn.append(_text(_LEFT + 56 + width, y + 13, f"{value:,.4g}"))
    return _figure(title, drawn, _TOP + 24 * len(values) + 6)


def _slowest(overview: Overview) -> str:
    rows = "".join(
        f"<tr><td>{batch.seconds:.3f}</td><td>{batch.num_records:,}</td><td>{batch.cost:,}</td>"
        f"<td>{escape(batch.where)}</td></tr>"
        for batch in overview.slowest
    )
    return (
        "<h2>Slowest records</h2><p>Each stands for its batch, whose longest record it is. The seconds are "
        "those from handing the batch to the lanes to its outputs.</p>"
        "<table><tr><th>seconds</th><th>records</th>"
        f"<th>length</th><th>record</th></tr>{rows}</table>"
    )


def _figure(title: str, drawn: Sequence[str], height: float) -> str:
    inner = "".join(drawn)
    return (
        f'<h2>{escape(title)}</h2><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{inner}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
