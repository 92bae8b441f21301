"""Which files a job takes as its input, and which it must not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyncdp.errors import DamagedInputError, InputError, ResumeRefusedError

needs_pipes = pytest.mark.skipif(os.name == "nt", reason="pipes with names are of POSIX")


@needs_pipes
def test_a_pipe_with_a_name_is_refused(run, work):
    """It could be read only once, by the fingerprint, so it is refused before a byte is read."""
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    os.mkfifo(work / "fifo")
    for name in (f"/dev/fd/{reader}", str(work / "fifo"), os.devnull):
        with pytest.raises(InputError, match=r"is no file on disk.*named -"):
            run(name, "models_for_tests:Lengths", columns=(), input_format="lines")
    assert os.read(reader, 10) == b"a\nb\n"
    os.close(reader)
    assert not (work / "out").exists()


def test_a_file_that_cannot_be_read_is_reported(run, work, monkeypatch):
    """A disk that fails under an input ends the job with a sentence, also while it is fingerprinted."""
    (work / "a.txt").write_text("a\n")
    opened = open

    def broken(path, *args, **kwargs):
        if Path(str(path)).name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(DamagedInputError, match=r"a.txt cannot be read: .*Permission denied"):
        run(work / "a.txt", "models_for_tests:Lengths", columns=())


@pytest.mark.parametrize("spec", ["data/**/*.txt", "data/*/*.txt"])
def test_a_pattern_that_finds_the_output_too(run, work, spec):
    """What lies in the output folder is never input, so that a resume finds the input it had."""
    (work / "data" / "in").mkdir(parents=True)
    (work / "data" / "in" / "a.txt").write_text("a\nbb\n")
    options = {"columns": (), "output": work / "data" / "out"}
    assert run(spec, "models_for_tests:Lengths", **options).num_records == 2
    (work / "data" / "out" / "notes.txt").write_text("x\n")
    again = run(spec, "models_for_tests:Lengths", resume=True, **options)
    assert (again.num_records, again.num_earlier) == (2, 2)


def test_files_that_a_shell_found_in_the_output(run, work):
    """A shell that expands the pattern names the shards too; they are left out all the same."""
    (work / "data" / "out").mkdir(parents=True)
    (work / "data" / "a.txt").write_text("a\nbb\n")
    options = {"columns": (), "output": work / "data" / "out"}
    run("data/a.txt", "models_for_tests:Lengths", **options)
    shard = next((work / "data" / "out").glob("part-*"))
    again = run(("data/a.txt", str(shard)), "models_for_tests:Lengths", resume=True, **options)
    assert (again.num_records, again.num_earlier) == (2, 2)
    with pytest.raises(InputError, match="All of the input lies in the output folder"):
        run(str(shard), "models_for_tests:Lengths", resume=True, **options)
    (work / "data" / "b.txt").write_text("c\n")
    with pytest.raises(ResumeRefusedError, match="input was"):
        run(("data/a.txt", "data/b.txt"), "models_for_tests:Lengths", resume=True, **options)
