"""What a job leaves behind when the disk, the power or a person ends it."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset
import pytest

from asyncdp.errors import JobUsageError, OutputError, ResumeRefusedError
from asyncdp.infer import files
from asyncdp.infer.output.merge import merge_parts

pytestmark = pytest.mark.usefixtures("anyio_backend")

SHAPE = {"shard_size": 10, "window": 5, "batch_size": 2}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


@contextlib.contextmanager
def failing_disk(monkeypatch, number, code):
    """Make the n-th flush to the disk, and all after it, fail with an error number."""
    flush, calls = os.fsync, iter(range(1, 10_000))

    def broken(descriptor):
        if next(calls) >= number:
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", broken)
        yield


@pytest.mark.parametrize("number", [1, 3, 4, 9, 16])
def test_a_full_disk_loses_no_finished_block(run, work, numbers, monkeypatch, number):
    """Wherever the disk runs full, the error says so and a resume gives the undisturbed output."""
    path = numbers(60)
    run(path, output=work / "whole", **SHAPE)
    full = pytest.raises(OutputError, match=r"No space left on device. Free some space")
    with failing_disk(monkeypatch, number, errno.ENOSPC), full:
        run(path, **SHAPE)
    run(path, resume=True, **SHAPE)
    assert contents(work / "out") == contents(work / "whole")


def test_a_read_only_output_is_reported(run, numbers, monkeypatch):
    """A folder that cannot be written, or made, is an error with a remedy; at best before anything loads."""
    read_only = pytest.raises(OutputError, match=r"Read-only file system. Make the folder writable")
    with failing_disk(monkeypatch, 1, errno.EROFS), read_only:
        run(numbers(3))
    with pytest.raises(JobUsageError, match=r"cannot be written: .* Name a folder"):
        run(numbers(3), output=Path("/proc/nothing/here"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(JobUsageError, match="read-only or belongs to another user"):
        run(numbers(3), "never_imported:Model", output=Path("elsewhere"))


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be flushed there")
def test_a_new_output_folder_is_on_the_disk(run, work, numbers, monkeypatch):
    """The names of all folders that the job made are flushed, so that none is lost in a power loss."""
    flush, flushed = os.fsync, []

    def noted(descriptor):
        status = os.fstat(descriptor)
        flushed.append((status.st_dev, status.st_ino))
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", noted)
    run(numbers(3), output=Path("a/b/out"))
    for parent in (work, work / "a", work / "a" / "b", work / "a" / "b" / "out"):
        assert (parent.stat().st_dev, parent.stat().st_ino) in flushed, parent


class Killed(BaseException):
    """Ends a job where it stands, without the cleaning up that an error sees."""


def test_a_kill_during_the_first_write_of_the_journal(run, work, numbers, monkeypatch):
    """Any job may use a folder with nothing but a half-written journal; other files still prevent that."""

    def killed(*names):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(Killed):
            run(numbers(5))
    left = {path.name for path in (work / "out").iterdir()} - {".lock"}
    assert left == {".tmp-_journal.jsonl"}
    assert run(numbers(5), resume=True).num_records == 5
    (work / "other").mkdir()
    (work / "other" / ".tmp-_journal.jsonl").touch()
    assert run(numbers(5), output=work / "other").num_records == 5
    (work / "mine").mkdir()
    (work / "mine" / ".tmp-mine").touch()
    with pytest.raises(ResumeRefusedError, match="no journal of a job"):
        run(numbers(5), output=work / "mine", resume=True)
    assert (work / "mine" / ".tmp-mine").exists()


@pytest.mark.parametrize(("code", "remedy"), [(errno.EFBIG, "ulimit -f"), (errno.EIO, "Check the disk")])
def test_the_remedy_fits_the_cause(run, numbers, monkeypatch, code, remedy):
    """The remedy depends on why the disk refused."""
    with failing_disk(monkeypatch, 3, code), pytest.raises(OutputError, match=f"{remedy}.*--resume"):
        run(numbers(3))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # that of the script
def test_killed_at_random_moments(tmp_path):
    """SIGKILL at random moments, resumed each time: every output is the undisturbed one, byte by byte."""
    script = Path(__file__).parents[2] / "scripts" / "kill_infer.py"
    command = [sys.executable, str(script), "--kills", "6", "--records", "1500"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every output identical" in done.stdout


def test_parts_merge_into_the_whole(run, work, numbers):
    """Three machines' parts give, merged, the very files of one undivided run."""
    path = numbers(95)
    run(path, output=work / "whole", **SHAPE)
    parts = [work / f"part{index}" for index in (1, 2, 3)]
    for index, part in enumerate(parts, 1):
        run(path, output=part, shard=f"{index}/3", **SHAPE)
    merged = merge_parts(parts, work / "merged")
    assert (merged.num_records, merged.num_bad) == (95, 0)
    assert contents(work / "merged") == contents(work / "whole")
    table = pyarrow.dataset.dataset(work / "merged", format="parquet").to_table()
    assert table["id"].to_pylist() == list(range(95))


def test_merge_checks_completeness(run, work, numbers):
    """A missing part, one of another job, a damaged shard: each is named, and nothing is merged."""
    path = numbers(60)
    for index in (1, 2):
        run(path, output=work / f"part{index}", shard=f"{index}/2", **SHAPE)
    run(path, output=work / "other", shard="2/2", **{**SHAPE, "batch_size": 3})
    with pytest.raises(JobUsageError, match="missing: 2/2"):
        merge_parts([work / "part1"], work / "merged")
    with pytest.raises(ResumeRefusedError, match="batch_size"):
        merge_parts([work / "part1", work / "other"], work / "merged")
    (work / "part2" / "part-000001.parquet").write_bytes(b"x")
    with pytest.raises(JobUsageError, match=r"part-000001.parquet is missing or damaged"):
        merge_parts([work / "part1", work / "part2"], work / "merged")
    assert not (work / "merged" / "part-000001.parquet").exists()
    with pytest.raises(ResumeRefusedError, match="There is no folder nowhere"):
        merge_parts([work / "part1", Path("nowhere")], work / "merged")


def test_a_part_of_few_blocks(run, work, numbers):
    """With more parts than blocks some parts have nothing to do, and the merge is whole."""
    path = numbers(15)
    parts = [work / f"part{index}" for index in (1, 2, 3)]
    counts = [
        run(path, output=part, shard=f"{index}/3", **SHAPE).num_records for index, part in enumerate(parts, 1)
    ]
    assert counts == [10, 5, 0]
    assert merge_parts(parts, work / "merged").num_records == 15
