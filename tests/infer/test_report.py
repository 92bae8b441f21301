"""`asyncdp report`: what an output folder tells of its job."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from asyncdp.cli.app import app
from asyncdp.errors import RecordError
from asyncdp.infer.report.history import PROGRESS_NAME, read_points
from asyncdp.infer.report.overview import look_at
from asyncdp.infer.report.page import make_page


def report(*args):
    return CliRunner().invoke(app, ["report", *map(str, args)])


@pytest.fixture
def point(run, numbers, work):
    """The last point of a finished job in the folder `out`."""
    run(numbers(40), batch_size=8, shard_size=16)
    return read_points(work / "out")[-1]


def note(work, point):
    with open(work / "out" / PROGRESS_NAME, "a") as file:
        file.write(json.dumps(dataclasses.asdict(point)) + "\n")


def test_a_finished_job(point, work):
    """Its records, shards, batches and the slowest of them are told."""
    result = report("out")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("out: done\n  records  40 of 40, 0 bad\n  shards   3, ")
    assert "5 of up to 8\n" in result.output
    assert "numbers.jsonl:" in result.output


def test_figures_are_those_of_all_runs(run, numbers, work):
    """A failed run tells why; after a resume the batches and the time of both count."""
    path = numbers(40)
    with pytest.raises(RecordError):
        run(path, "models_for_tests:Picky", batch_size=4, shard_size=4, devices="cpu", window=4)
    overview = look_at(work / "out")
    assert overview.state.startswith("RecordError: Record 13")
    assert overview.num_done == 4 * overview.num_shards < 40
    run(path, "models_for_tests:Picky", batch_size=4, shard_size=4, window=4, resume=True, on_error="skip")
    overview = look_at(work / "out")
    assert (overview.state, overview.num_done, overview.num_bad) == ("done", 40, 1)
    assert len(overview.last_of_runs) == 2
    assert overview.seconds == pytest.approx(sum(point.seconds for point in overview.last_of_runs))
    assert "in 2 runs" in report("out").output


def test_a_running_job(point, work):
    """It runs while its process does; the last line counts, though its shards are not finished yet."""
    note(work, dataclasses.replace(point, run=point.run + 9, state="running", num_done=50, num_records=100))
    overview = look_at(work / "out")
    assert (overview.state, overview.num_done) == ("running", 50)


def test_a_killed_job(point, work):
    """A process that is gone without a last word has stopped; half a line of it is passed over."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    journal = work / "out" / "_journal.jsonl"
    head, block, *_ = journal.read_text().splitlines(keepends=True)
    journal.write_text(head + block)
    note(work, dataclasses.replace(point, run=point.run + 9, state="running", num_done=50, pid=dead.pid))
    with open(work / "out" / PROGRESS_NAME, "a") as file:
        file.write('{"run": 1, "ho')
    overview = look_at(work / "out")
    # Whichever shard was the first to be finished.
    assert (overview.state, overview.num_done) == (
        "stopped",
        json.loads(block.partition(" ")[2])["num_records"],
    )


def test_a_job_of_another_machine_runs_while_it_is_heard_of(point, work):
    """Where its process cannot be seen, the time of its last line decides."""
    elsewhere = dataclasses.replace(point, host="elsewhere", state="running")
    assert elsewhere.is_live
    assert not dataclasses.replace(elsewhere, run=point.run - 3600).is_live


def test_a_folder_without_notes_is_told_by_its_journal(point, work):
    """As one that `merge` made, or an earlier version."""
    (work / "out" / PROGRESS_NAME).unlink()
    assert report("out").output.startswith("out: done\n  records  40, 0 bad\n")
    assert report("out", "--html", "page.html", "--picture", "load.svg").exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "no folder nowhere"),
        (["."], "no journal"),
        (["out", "--html", "gone/page.html"], "no folder gone"),
        (["out", "--picture", "load.gif"], "--picture load.gif has no known suffix"),
    ],
)
def test_mistakes_end_with_2(point, args, message):
    """A folder of no job, and files that cannot be written."""
    result = report(*args)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_shows_in_a_browser(run, numbers, work):
    """All charts are drawn, nothing is loaded or run, and names of files are no markup."""
    run(numbers(40, name="<script>document.title=1<script>.jsonl"), batch_size=8)
    assert report("out", "--html", "page.html", "--picture", "load.png").exit_code == 0
    text = (work / "page.html").read_text()
    assert not re.search(r"<script|src=|href=|url\(|@import", text)
    assert (work / "load.png").read_bytes().startswith(b"\x89PNG")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={work / 'profile'}",
    ]
    shown = subprocess.run(
        [*command, "--dump-dom", f"file://{work / 'page.html'}"], capture_output=True, text=True, check=True
    ).stdout
    assert "<title>out: done</title>" in shown
    assert "document.title=1" in shown
    assert shown.count("<svg") == 5
    assert re.findall(r'points="(?:[\d.]+,[\d.]+ ?)+"', shown)
    for title in (
        "Records per second",
        "Load of the lanes",
        "Batches by number of records",
        "Slowest records",
    ):
        assert f"<h2>{title}</h2>" in shown


def test_a_page_without_a_course(point, work):
    """A job that noted nothing still has its figures."""
    (work / "out" / PROGRESS_NAME).unlink()
    assert "40, 0 bad" in make_page(look_at(work / "out"))
