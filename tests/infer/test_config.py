"""Options have the same names in Python, on the command line and in a file."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncdp.cli.app import app
from asyncdp.errors import JobUsageError
from asyncdp.infer import InferOptions, read_config
from asyncdp.infer.config import format_config, make_options

GIVEN = {"inputs": "a.jsonl", "model": "m:f", "output": "out"}


def infer(*args):
    return CliRunner().invoke(app, ["infer", *map(str, args)])


def test_values_get_the_types_of_the_options():
    """One text stands for a list of one, and paths may be paths."""
    options = make_options({**GIVEN, "model": Path("m.pt2"), "column": "x", "keep": ["a", "b"], "window": 9})
    assert options == InferOptions(
        ("a.jsonl",), "m.pt2", Path("out"), columns=("x",), keep=("a", "b"), window=9
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batchsize": 3}, "no option batchsize.*mean batch_size?"),
        ({"columms": "x"}, "no option columms.*mean column?"),
        ({"batch_size": "3"}, "batch_size is '3'.*whole number"),
        ({"batch_size": True}, "batch_size is True.*whole number"),
        ({"resume": 1}, "resume is 1.*true or false"),
        ({"column": ["x", 3]}, "column is .*list of texts"),
        ({"column": "x", "columns": "y"}, "columns is given twice"),
        ({"output": None}, "output is None.*path"),
        ({"batch_size": 0}, "--batch-size is 0"),
    ],
)
def test_mistakes_are_told_with_the_name(given, message):
    """An unknown name names the nearest one, a wrong value the right kind."""
    with pytest.raises(JobUsageError, match=message):
        make_options({**GIVEN, **given})


@pytest.mark.parametrize("missing", GIVEN)
def test_what_is_needed_is_asked_for(missing):
    """A job has an input, a model and an output."""
    with pytest.raises(JobUsageError, match=f"{missing} is missing"):
        make_options({name: value for name, value in GIVEN.items() if name != missing})


def test_a_printed_config_is_read_as_the_same_options(tmp_path):
    """Whatever is in the texts; every option is in it, as a comment where it has no value."""
    options = make_options({**GIVEN, "quote": "'", "id_column": '"\\\x7f', "rename": ["é=ü", "#=\t"]})
    options = dataclasses.replace(options, resume=True, max_errors=3)
    (tmp_path / "job.toml").write_text(text := format_config(options))
    assert make_options(read_config(tmp_path / "job.toml")) == options
    for field in dataclasses.fields(InferOptions):
        assert field.name in text or field.name == "columns"


@pytest.mark.parametrize("text", ["batch_size = ", "\xff"])
def test_a_file_that_is_no_toml_is_refused(tmp_path, text):
    """With the place of the mistake, and code 2 on the command line."""
    (tmp_path / "job.toml").write_bytes(text.encode("latin-1"))
    result = infer("--config", tmp_path / "job.toml")
    assert (result.exit_code, "is no TOML" in result.stderr) == (2, True)
    assert infer("--config", tmp_path / "none.toml").exit_code == 2


def test_flags_count_more_than_the_file(work, numbers):
    """The command line takes the file's options, and its own flags instead where they are given."""
    numbers(10)
    (work / "job.toml").write_text(
        'inputs = ["numbers.jsonl"]\nmodel = "models_for_tests:Sums"\noutput = "out"\n'
        'columns = ["x"]\ndevices = "cpu"\nshard-size = 5\nbatch_size = 3\n'
    )
    printed = infer("--config", "job.toml", "--batch-size", 32, "-o", "there", "--print-config")
    assert printed.exit_code == 0, printed.output
    shown = tomllib.loads(printed.output)
    assert (shown["batch_size"], shown["shard_size"], shown["output"]) == (32, 5, "there")
    assert (shown["column"], shown["window"]) == (["x"], 1024)
    result = infer("--config", "job.toml")
    assert result.exit_code == 0, result.output
    assert len(list((work / "out").glob("part-*"))) == 2


def test_an_unknown_name_in_the_file_is_refused(work):
    """Nothing runs, and the nearest name is told."""
    (work / "job.toml").write_text('inputs = "a.jsonl"\nmodell = "m:f"\n')
    result = infer("--config", "job.toml")
    assert result.exit_code == 2
    assert "Did you mean model?" in result.stderr
