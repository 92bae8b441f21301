"""A finished job becomes one data set of Lance, as a whole or not at all."""

from __future__ import annotations

import errno

import hf_folders
import pytest

from asyncdp.errors import JobUsageError, OutputError, OutputExistsError
from asyncdp.infer.output import lance_dataset
from asyncdp.infer.output.merge import merge_parts

lance = pytest.importorskip("lance")


@pytest.fixture
def parts(run, numbers, work):
    """Two parts of a job, and the columns of the whole."""
    path = numbers(10)
    options = {"shard_size": 3, "postprocess": "models_for_tests:only_total"}
    run(path, **options)
    for number in (1, 2):
        run(path, output=work / f"part{number}", shard=f"{number}/2", **options)
    return [work / "part1", work / "part2"], hf_folders.columns(work / "out")


@pytest.mark.parametrize("step", ["_write", "sync_tree", "sync_folder", None])
def test_a_merge_that_is_cut_short_is_repeated(parts, work, monkeypatch, step):
    """Whatever step fails, the data set is missing or whole; the next try makes it of all rows in order."""
    folders, wanted = parts
    target = work / "whole.lance"
    real = getattr(lance_dataset, step) if step else None

    def failing(path, *rest):
        real(path, *rest)
        raise OSError(errno.ENOSPC, "no space")

    if step:
        with monkeypatch.context() as patched:
            patched.setattr(lance_dataset, step, failing)
            with pytest.raises(OutputError, match="Free some space"):
                merge_parts(folders, target, "lance")
    if target.exists():
        assert step == "sync_folder"  # the one after the rename
    else:
        assert merge_parts(folders, target, "lance").num_records == 10
    assert lance.dataset(target).to_table().to_pydict() == wanted
    assert not list(work.glob(".*.unfinished"))
    with pytest.raises(OutputExistsError):
        merge_parts(folders, target, "lance")


def test_one_folder_and_what_is_refused(run, numbers, work, monkeypatch):
    """A job that was not split is a whole; damaged shards, formats without types and stores are told."""
    run(numbers(4), output_format="arrow", shard_size=3)
    merge_parts([work / "out"], work / "a.lance", "lance")
    assert lance.dataset(work / "a.lance").count_rows() == 4
    (work / "out" / "part-000001.arrow").write_bytes(b"")
    with pytest.raises(JobUsageError, match="missing or damaged"):
        merge_parts([work / "out"], work / "b.lance", "lance")
    run(numbers(4), output_format="jsonl", output=work / "lines")
    with pytest.raises(JobUsageError, match=r"needs types, and part-000000\.jsonl states none"):
        merge_parts([work / "lines"], work / "c.lance", "lance")
    with pytest.raises(JobUsageError, match="it needs a folder that can be renamed"):
        merge_parts([work / "out"], "memory://bucket/d.lance", "lance")
    with pytest.raises(JobUsageError, match="is unknown to merge"):
        merge_parts([work / "out"], work / "e", "npy")
    assert not list(work.glob("[b-e]*"))
