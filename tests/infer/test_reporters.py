"""What a person, a log and a machine get to see."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdp.infer import ShardFinished, Started, Warned
from asyncdp.infer.report.monitor import Monitor, Sample
from asyncdp.infer.report.reporters import JsonReporter, LineReporter, make_reporter


@pytest.fixture
def monitor():
    """A job that did 50 of 110 records in ten seconds, after ten that were done earlier."""
    monitor = Monitor(num_earlier=10, num_done=50, num_bad=2, memory=300 << 20)
    monitor.samples = [Sample(0.0, 0, {"cpu:0": 1.0}), Sample(10.0, 50, {"cpu:0": 6.0})]
    monitor.started -= 10.0
    return monitor


def test_pace_counts_this_run_only(monitor):
    """Records done earlier change neither rate nor time left."""
    progress = monitor.progress(110)
    assert progress.rate == pytest.approx(5.0, rel=0.01)
    assert progress.seconds_left == pytest.approx(10.0, rel=0.01)
    assert monitor.progress(None).seconds_left is None


def test_lane_load_is_a_part_of_the_time(monitor):
    """A lane busy for five of ten seconds shows one half; progress tells of the last seconds only."""
    assert monitor.busy_fractions() == {"cpu:0": pytest.approx(0.5)}
    monitor.samples += [Sample(10.0 + second, 50, {"cpu:0": 6.0}) for second in range(1, 20)]
    assert monitor.progress(110).lanes == {"cpu:0": 0.0}


def test_lines_are_paced_and_warnings_are_not(monitor, monkeypatch):
    """A log gets a line every few seconds, but each warning at once."""
    out = io.StringIO()
    reporter = LineReporter(out)
    reporter.report(Started(110, 10, ("cpu:0",)))
    reporter.report(Warned("out of memory"))
    reporter.report(monitor.progress(110))
    monkeypatch.setattr(reporter, "_last", -1e9)
    reporter.report(monitor.progress(110))
    reporter.report(ShardFinished(0, 50, 2))
    assert out.getvalue().splitlines() == [
        "running 110 records on cpu:0, 10 done earlier",
        "warning: out of memory",
        "60 of 110 records, 5.0/s, 0m10s left, 2 bad, lanes 50%, 300 MiB",
    ]


def test_json_events(monitor, monkeypatch):
    """A machine gets one object per line."""
    out = io.StringIO()
    reporter = JsonReporter(out)
    reporter.report(Started(None, 10, ("cpu:0",)))
    reporter.report(Warned("careful"))
    monkeypatch.setattr(reporter, "_last", -1e9)
    reporter.report(monitor.progress(110))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["started", "warning", "progress"]
    assert (events[2]["done"], events[2]["num_bad"]) == (60, 2)


def test_bad_records_of_earlier_runs_count(monitor):
    """Progress counts the bad records of earlier runs, as it counts their records."""
    monitor.num_earlier_bad = 3
    assert monitor.progress(110).num_bad == 5


def test_a_pipe_gets_lines():
    """What is no terminal gets no bar."""
    assert isinstance(make_reporter(as_json=False, out=io.StringIO()), LineReporter)


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals of POSIX")
def test_a_terminal_gets_a_bar(tmp_path):
    """On a terminal the progress is a bar with count, rate and lanes, and stdout stays clean."""
    (tmp_path / "in.txt").write_text("x\n" * 30)
    command = [sys.executable, "-m", "asyncdp.cli", "infer", "in.txt", "--model", "models_for_tests:Lengths"]
    terminal, child = os.openpty()
    job = subprocess.Popen(
        [*command, "-o", "out", "--devices", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=child,
    )
    output, _ = job.communicate(timeout=40)
    os.close(child)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert job.returncode == 0
    assert "30/30" in shown
    assert "lanes" in shown
    assert output.decode().startswith("30 records done")
