"""Every example of docs/infer.md runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import hf_folders
import pytest
from typer.testing import CliRunner

from asyncdp.cli.app import app

TEXT = (Path(__file__).parents[2] / "docs" / "infer.md").read_text()
COMMANDS = re.findall(r"^\$ asyncdp (.+)$", TEXT, re.MULTILINE)
PYTHON = re.findall(r"``python\n(.+?)``", TEXT, re.DOTALL)


@pytest.fixture
def work(tmp_path, monkeypatch, encoder_folder, s3, s3_server):
    """A folder, and a bucket, with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "task.py").write_text(PYTHON[0])
    (tmp_path / "job.toml").write_text(re.findall(r"``toml\n(.+?)``", TEXT, re.DOTALL)[0])
    (tmp_path / "rows.csv").write_text("a,b,c\n" + "1,2,3\n4,5,6\n" * 3)
    (tmp_path / "texts.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    (tmp_path / "minilm").symlink_to(encoder_folder)
    s3_server().put(str(tmp_path / "texts.jsonl"), f"{s3}/texts/texts.jsonl")
    s3_server().put(str(encoder_folder), f"{s3}/minilm", recursive=True)
    (tmp_path / "reviews.csv").write_text("text,stars\na fox,5\ndogs,1\n")
    (tmp_path / "questions.jsonl").write_text('{"question": "Who met Bob?"}\n')
    hf_folders.bert(tmp_path / "sentiment", "BertForSequenceClassification", num_labels=2)
    hf_folders.gpt2(tmp_path / "qwen")
    return tmp_path


@pytest.mark.timeout(180)  # fourteen jobs, two of them with a server
def test_every_command_of_the_docs_runs(work):
    """All commands, in order, end with 0 and leave the shards they promise."""
    assert len(COMMANDS) == 15
    for command in COMMANDS:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, (command, result.output)
    assert sorted(path.name for path in (work / "whole").glob("part-*")) == [
        f"part-00000{index}.parquet" for index in range(3)
    ]


def test_the_python_of_the_docs_runs(work):
    """The Python examples run as they stand."""
    (command,) = (command for command in COMMANDS if "kept --resume" in command)
    result = CliRunner().invoke(app, shlex.split(command.replace("kept --resume", "out")))
    assert result.exit_code == 0, result.output
    names: dict[str, object] = {}
    exec(PYTHON[1], names)
    assert names["table"].num_rows == 6
    exec(PYTHON[2], names)
    assert len((work / "second" / "part-000000.jsonl").read_text().splitlines()) == 6


def test_the_docs_know_the_exit_codes():
    """The table of exit codes names every code there is."""
    from asyncdp.cli import running

    codes = {getattr(running, name) for name in dir(running) if name.startswith("EXIT_")} | {0}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)}
