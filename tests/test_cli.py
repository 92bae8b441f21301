from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet
import pytest
import typer
from typer.testing import CliRunner

from asyncdp import cli
from asyncdp.cli.app import app

MODELS = Path(__file__).parent / "infer"

FROZEN = {
    "infer": """
        inputs model output/o weights input-format query encoding delimiter quote=" allow-nan=False
        first-frame=False output-format=parquet column id-column keep rename where sample
        sample-seed=0 limit devices
        batch-size=32 max-batch-cost window=1024 shard-size=4096 order=input preprocess collate postprocess
        workers=1 worker-processes=False input-dtype dtype autocast compile=False on-error=stop max-errors
        shard ray ray-actors ray-resources resume=False allow-unsafe-pickle=False task prompt prompt-name
        truncate-dim precision calibration aggregation max-new-tokens temperature top-k top-p seed stop cache
        language timestamps chunk-seconds num-beams config print-config=False dry-run=False plot json=False
    """,
    "report": "output picture html",
    "merge": "parts output/o output-format",
    "devices": "spec",
    "trace summary": "file",
}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder from which the models of the tests can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(MODELS))
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"x": [float(i), 0.0, 1.0]}) + "\n" for i in range(20))
    )
    return tmp_path


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def infer(*args, model="models_for_tests:Sums"):
    return invoke(
        "infer", "in.jsonl", "--model", model, "-o", "out", "--column", "x", "--devices", "cpu", *args
    )


def described(parameter):
    is_option = parameter.param_type_name == "option"
    names = [name.lstrip("-") for name in parameter.opts] if is_option else []
    names = sorted(names, key=len, reverse=True) or [parameter.name]
    default = parameter.default() if callable(parameter.default) else parameter.default
    shown = is_option and isinstance(default, str | int | bool)
    return "/".join(names) + (f"={default}" if shown else "")


def flattened(commands):
    found = {}
    for name, command in commands.items():
        inner = flattened(getattr(command, "commands", {}))
        found |= {f"{name} {part}": entry for part, entry in inner.items()} or {name: command}
    return found


def test_the_command_line_is_frozen():
    """Commands, options and defaults only change on purpose, together with this test."""
    commands = flattened(typer.main.get_command(app).commands)
    assert list(commands) == list(FROZEN)
    for name, expected in FROZEN.items():
        found = [described(parameter) for parameter in commands[name].params]
        assert found == expected.split()


@pytest.mark.parametrize("columns", [80, 100])
def test_help_fits_one_screen(columns):
    """The longest help has an example, the exit codes, and one line per option even on 80 columns."""
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["infer", "--help"], terminal_width=columns)
    lines = result.output.splitlines()
    assert "Example:  asyncdp infer" in result.output
    assert "130 interrupted" in " ".join(result.output.split())
    assert len(lines) <= 84
    assert max(map(len, lines)) <= columns


def test_exit_code_0_and_the_summary(work):
    """A job without trouble ends with 0 and says what it did."""
    result = infer()
    assert result.exit_code == 0, result.output
    assert "20 records done" in result.output
    assert pyarrow.dataset.dataset(work / "out", format="parquet").count_rows() == 20
    assert json.loads((work / "out" / "_summary.json").read_text())["num_records"] == 20


def test_exit_code_1_names_the_record(work):
    """A refused record ends with 1 and one line on it, no traceback."""
    result = infer(model="models_for_tests:Picky")
    assert result.exit_code == 1
    assert re.search(r"^error: Record 13 \(in.jsonl:14\) was refused", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "args",
    [
        ["infer", "nothing.jsonl", "--model", "models_for_tests:Sums", "-o", "out"],
        ["infer", "in.jsonl", "--model", "nothing", "-o", "out"],
        ["infer", "in.jsonl", "--model", "models_for_tests:Sums", "-o", "out", "--devices", "cuda:9"],
        ["infer", "in.jsonl", "--model", "models_for_tests:Sums", "-o", "in.jsonl"],
        ["infer", "in.jsonl", "--model", "models_for_tests:Sums", "-o", "out", "--batch-size", "x"],
        ["infer", "in.jsonl", "--model", "models_for_tests:Sums", "-o", "out", "--plot", "a.jpg"],
        ["infer", "in.jsonl", "-o", "out"],
        ["devices", "toaster"],
        ["merge", "nowhere", "-o", "out"],
    ],
)
def test_exit_code_2_before_anything_runs(work, args):
    """What cannot start as asked ends with 2, a reason, and nothing on disk."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    ("name", "code", "begins"),
    [
        ("cut.parquet", 1, False),
        ("cut.csv.gz", 1, True),  # behind its header
        ("gone.parquet", 2, False),
        ("short.csv", 2, False),
        ("notes.md", 2, False),
    ],
)
def test_exit_codes_of_inputs_that_cannot_be_read(work, name, code, begins):
    """A damaged file is a failure, whenever it is found; one that was asked for in a wrong way is usage."""
    pyarrow.parquet.write_table(pyarrow.table({"x": [1.0] * 9}), work / "whole.parquet")
    (work / "cut.parquet").write_bytes((work / "whole.parquet").read_bytes()[:-9])
    (work / "cut.csv.gz").write_bytes(gzip.compress(b"x\n1\n")[:-9])
    (work / "short.csv").write_text("y\n1\n")
    (work / "notes.md").write_text("x\n")
    result = invoke("infer", name, "--model", "models_for_tests:Sums", "-o", "out", "--column", "x")
    assert (result.exit_code, result.stderr.count("error: ")) == (code, 1), result.output
    assert (work / "out").exists() == begins


def test_exit_code_3_for_bad_records(work):
    """A job that left records out ends with 3, also when it is resumed and finds nothing to do."""
    assert infer("--on-error", "skip", model="models_for_tests:Picky").exit_code == 3
    result = infer("--on-error", "skip", "--resume", model="models_for_tests:Picky")
    assert (result.exit_code, "20 of them earlier" in result.output) == (3, True)


SILENT = ["-", "--input-format", "lines", "--model", "models_for_tests:Lengths"]
LONG = ["in.jsonl", "--model", "models_for_tests:Slow", "--column", "x", "--batch-size", "1"]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "args", "message"),
    [(signal.SIGINT, SILENT, "start again"), (signal.SIGTERM, LONG, "--resume continues")],
)
def test_exit_code_130_when_interrupted(work, number, args, message):
    """A signal ends the job soon, with 130 and the way to go on, even while standard input is silent."""
    command = [sys.executable, "-m", "asyncdp.cli", "infer", *args, "--devices", "cpu", "-o", "out", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(MODELS)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as job:
        assert json.loads(job.stdout.readline())["event"] == "started"
        job.send_signal(number)
        _, errors = job.communicate(timeout=20)
    assert job.returncode == 130
    assert message in errors


def test_an_error_does_not_wait_for_standard_input(work):
    """A job that fails ends at once, though the writer of its input neither writes nor closes it."""
    command = [sys.executable, "-m", "asyncdp.cli", "infer", *SILENT, "--devices", "cpu", "-o", "out"]
    command += ["--json", "--preprocess", "models_for_tests:refuse_b", "--window", "1", "--batch-size", "1"]
    environment = {**os.environ, "PYTHONPATH": str(MODELS)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as job:
        job.stdin.write("a\nb\n")
        job.stdin.flush()
        try:
            assert job.wait(timeout=20) == 1
        finally:
            job.kill()
        assert "Record 1 (standard input:2) was refused" in job.stderr.read()
        assert json.loads(job.stdout.read().splitlines()[-1])["code"] == 1


LOADING = """
import threading

def model():
    print("loading", flush=True)
    threading.Event().wait()
"""

READING = """
import sys, threading, types, torch

class Silent:
    def readline(self, limit=-1):
        print("reading", flush=True)
        threading.Event().wait()

    read = read1 = peek = readline

def model():
    sys.stdin = types.SimpleNamespace(buffer=Silent())
    return torch.nn.Identity()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("code", "args", "sign"),
    [(LOADING, ["in.jsonl"], "loading"), (READING, ["-", "--input-format", "lines", "--dry-run"], "reading")],
    ids=["loading", "dry run"],
)
def test_exit_code_130_at_any_time(work, code, args, sign):
    """A signal ends the command with 130 also while the model loads, and a dry run of a silent input."""
    (work / "slow.py").write_text(code)
    command = [sys.executable, "-m", "asyncdp.cli", "infer", *args, "--model", "slow:model", "-o", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == f"{sign}\n"
        job.send_signal(signal.SIGTERM)
        try:
            assert job.wait(timeout=20) == 130
        finally:
            job.kill()
        assert job.stderr.read().startswith("interrupted")
    assert not (work / "out").exists()


def test_worker_processes_of_the_command(work):
    """Worker processes start up as children of `python -m asyncdp.cli`, which they import again."""
    command = [sys.executable, "-m", "asyncdp.cli", "infer", "in.jsonl", "--model", "models_for_tests:Sums"]
    command += ["--worker-processes", "--column", "x", "-o", "out", "--devices", "cpu"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(MODELS)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "20 records done" in done.stdout) == (0, True), done.stderr


def test_standard_input(work):
    """Records may come from a pipe; such a job cannot be resumed, and says so."""
    command = [sys.executable, "-m", "asyncdp.cli", "infer", "-", "--input-format", "lines"]
    command += ["--model", "models_for_tests:Lengths", "-o", "out", "--devices", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(MODELS)}
    subprocess.run(command, input=b"a\nbb\n", env=environment, check=True, capture_output=True)
    table = pyarrow.dataset.dataset(work / "out", format="parquet").to_table()
    assert table["output"].to_pylist() == [1, 2]
    resumed = invoke(*command[3:], "--resume")
    assert (resumed.exit_code, "second time" in resumed.stderr) == (2, True)


def test_dry_run(work):
    """A dry run shows the plan and writes nothing."""
    result = infer("--dry-run")
    assert result.exit_code == 0
    assert "id, total float32[], double float32[3]" in result.output
    assert not (work / "out").exists()


def test_json_lines(work):
    """With --json every line of output is an object, the summary last."""
    events = [json.loads(line)["event"] for line in infer("--json").stdout.splitlines()]
    assert events == ["started", "summary"]
    (error,) = map(json.loads, infer("--json").stdout.splitlines())
    assert (error["event"], error["code"]) == ("error", 2)


@pytest.mark.parametrize(("name", "head"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_plot(work, name, head):
    """The picture of a job is a real file of the kind its suffix names."""
    assert infer("--plot", name).exit_code == 0
    assert (work / name).read_bytes().startswith(head)


def test_merge(work):
    """Parts made with --shard join into one folder."""
    for part in ("1/2", "2/2"):
        assert infer("--shard", part, "--shard-size", 6, "-o", f"part{part[0]}").exit_code == 0
    result = invoke("merge", "part1", "part2", "-o", "whole")
    assert result.exit_code == 0, result.output
    assert pyarrow.dataset.dataset(work / "whole", format="parquet").count_rows() == 20


def test_devices_says_what_there_is():
    """Lanes, memory, kernels with a reason, and peer access are shown."""
    result = invoke("devices", "cpu*3")
    assert result.exit_code == 0
    assert "cpu: 3 lanes" in result.output
    assert re.search(r"kernels: torch \(.+\)", result.output)
    assert "peer access" in result.output


def test_missing_packages_name_the_extra(monkeypatch):
    """Without the cli extra the command says how to install it."""
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=re.escape("pip install 'asyncdp[cli]'")):
        cli.main()


def test_importing_the_library_does_not_import_the_command_line():
    """`import asyncdp` leaves typer, rich and pyarrow alone."""
    code = "import asyncdp, sys; print([m for m in ('typer', 'rich', 'pyarrow') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
