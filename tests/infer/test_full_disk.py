"""A disk that runs full in the middle of a write: of a shard, of the journal, of the summary."""

from __future__ import annotations

import contextlib
import errno
import io
import os

import pytest

from asyncdp.errors import OutputError
from asyncdp.infer import files
from asyncdp.infer.output import log
from asyncdp.infer.output.journal import load_journal

SHAPE = {"shard_size": 10, "window": 5, "batch_size": 2}
FULL = r"No space left on device. Free some space"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


@contextlib.contextmanager
def disk_of(monkeypatch, num_bytes, name=""):
    """A disk that takes so many bytes for the files with `name` in theirs; yields how many were written.

    As on a real one, what fits is written before the write fails.
    """
    written = [0]

    class File(io.FileIO):
        def write(self, data):
            data = memoryview(data).cast("B")
            if name not in os.path.basename(self.name):
                return super().write(data)
            fitting = data[: num_bytes - written[0]]
            written[0] += super().write(fitting)
            if len(fitting) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(data)

    def open_there(path, mode):
        return io.BufferedReader(File(path)) if "r" in mode else io.BufferedWriter(File(path, mode))

    with monkeypatch.context() as patch:
        for module in (files, log):
            patch.setattr(module, "open", open_there, raising=False)
        yield written


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.95])
def test_a_disk_that_is_full_after_any_byte(run, work, numbers, monkeypatch, output_format, part):
    """Wherever a write is cut, the error says so, and a resume gives the undisturbed output."""
    path = numbers(40)
    shape = {**SHAPE, "output_format": output_format}
    with disk_of(monkeypatch, 1 << 30) as written:
        run(path, output=work / "whole", **shape)
    with disk_of(monkeypatch, int(written[0] * part)), pytest.raises(OutputError, match=FULL):
        run(path, **shape)
    run(path, resume=True, **shape)
    assert contents(work / "out") == contents(work / "whole")
    assert not list((work / "out").glob(".tmp-*"))


@pytest.mark.parametrize("num_bytes", [-30, 1, 90])
def test_a_journal_cut_while_it_grows(run, work, numbers, monkeypatch, num_bytes):
    """A line of the journal that only half fits, or its first line, costs no record and no resume."""
    path = numbers(40)
    run(path, output=work / "whole", **SHAPE)
    head = (work / "whole" / "_journal.jsonl").read_bytes().index(b"\n") + 1
    full = pytest.raises(OutputError, match=rf"_journal.jsonl cannot be written: {FULL}")
    with disk_of(monkeypatch, head + num_bytes, "_journal"), full:
        run(path, **SHAPE)
    if num_bytes > 0:
        assert (work / "out" / "_journal.jsonl").stat().st_size == head + num_bytes
    run(path, resume=True, **SHAPE)
    assert contents(work / "out") == contents(work / "whole")
    assert load_journal(work / "out") == load_journal(work / "whole")
