"""What a job depends on, and what it does not: places and times, once parts of it ran on other machines."""

from __future__ import annotations

import os
import shutil

import pytest
import safetensors.torch
import torch

from asyncdp.errors import ResumeRefusedError
from asyncdp.infer import fingerprint
from asyncdp.infer.output.merge import merge_parts

SHAPE = {"shard_size": 5, "window": 5, "batch_size": 5}


@pytest.fixture
def large(monkeypatch):
    """Make every file count as a large one, of which samples are read."""
    monkeypatch.setattr(fingerprint, "WHOLE_BELOW", 1)


def copied(path, folder):
    """Copy a file as scp does: the contents, with a time of its own."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / path.name)
    os.utime(folder / path.name, ns=(1, 1))
    return folder / path.name


@pytest.fixture
def weights(work):
    """Weights of models_for_tests:linear."""
    path = work / "w.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, path)
    return path


def test_parts_of_other_machines_merge(run, work, numbers, weights, large):
    """Copies of large inputs and weights have times of their own, in folders of their own."""
    path = numbers(15)
    model = "models_for_tests:linear"
    run(path, model, weights=str(weights), shard="1/2", output=work / "one", **SHAPE)
    there = {"weights": str(copied(weights, work / "there")), "output": work / "two"}
    run(copied(path, work / "there"), model, shard="2/2", **there, **SHAPE)
    assert merge_parts([work / "two", work / "one"], work / "whole").num_records == 15
    assert merge_parts([work / "one", work / "two"], work / "whole").num_records == 15
    again = run(path, model, weights=str(weights), resume=True, output=work / "whole", **SHAPE)
    assert again.num_earlier == 15


def test_a_large_file_that_was_touched_is_another_input(run, numbers, large):
    """Only samples of it are compared, so a resume on the same machine goes by its time as well."""
    path = numbers(5)
    run(path)
    assert run(path, resume=True).num_earlier == 5
    os.utime(path, ns=(1, 1))
    with pytest.raises(ResumeRefusedError, match=r"times of large files was .*numbers.jsonl"):
        run(path, resume=True)


def test_the_time_of_a_small_file_does_not_matter(run, numbers):
    """All of its bytes are compared."""
    path = numbers(5)
    run(path)
    os.utime(path, ns=(1, 1))
    assert run(path, resume=True).num_earlier == 5


def test_parts_of_other_inputs_do_not_merge(run, work, numbers, large):
    """Large files with other contents are still another job."""
    run(numbers(15), shard="1/2", output=work / "one", **SHAPE)
    run(numbers(16), shard="2/2", output=work / "two", **SHAPE)
    with pytest.raises(ResumeRefusedError, match="input was"):
        merge_parts([work / "one", work / "two"], work / "whole")


def test_a_model_in_a_file_is_known_by_its_contents(run, work, numbers):
    """An exported program may lie elsewhere when a job goes on, but must be the same one."""
    rows = torch.export.Dim("rows", min=1, max=1024)
    for name, width in (("a", 2), ("b", 4)):
        program = torch.export.export(
            torch.nn.Linear(3, width), (torch.zeros(2, 3),), dynamic_shapes=({0: rows},)
        )
        torch.export.save(program, work / f"{name}.pt2")
    run(numbers(5), "a.pt2")
    moved = copied(work / "a.pt2", work / "there").rename(work / "there" / "moved.pt2")
    assert run(numbers(5), str(moved), resume=True).num_earlier == 5
    with pytest.raises(ResumeRefusedError, match="model file was"):
        run(numbers(5), "b.pt2", resume=True)
