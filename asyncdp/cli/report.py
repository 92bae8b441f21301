"""What `asyncdp report` shows."""

from __future__ import annotations

from pathlib import Path

from ..infer.places import place_of
from ..infer.report.history import samples_of
from ..infer.report.overview import format_overview, look_at
from ..infer.report.page import write_page
from ..infer.report.plot import check_folder_of, check_plot, draw_plot


def show_report(folder: str, picture: Path | None, html: Path | None) -> str:
    """Return what there is to say of a job; draw and write what was asked for."""
    if picture is not None:
        check_plot(picture, "--picture")
    if html is not None:
        check_folder_of(html, "--html")
    overview = look_at(place_of(folder))
    if picture is not None:
        draw_plot(picture, samples_of(overview.points))
    if html is not None:
        write_page(html, overview)
    return format_overview(overview)
