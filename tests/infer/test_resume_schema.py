"""All shards of an output have the same columns, however often a job was resumed or split."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from asyncdp.errors import JobError
from asyncdp.infer.output.merge import merge_parts

SINGLE = {"shard_size": 1, "window": 1, "batch_size": 1}


def shards(folder):
    return sorted(folder.glob("part-*"))


def test_resuming_again_and_again_never_mixes_columns(run, work, numbers):
    """A model of another width for every record fails however often it is resumed, as it does at once."""
    path = numbers(3)
    for _ in range(4):
        with pytest.raises(JobError, match=r"differ between batches.*shard that begins with record [012]\b"):
            run(path, "models_for_tests:Shapeless", resume=True, **SINGLE)
    assert len({str(pq.read_schema(shard)) for shard in shards(work / "out")}) == 1


def test_outputs_that_differ_within_a_shard_name_a_record(run, numbers):
    """The error says where in the input the difference begins."""
    with pytest.raises(JobError, match=r"float32\[\d+\].* in the batch with record [01]\b"):
        run(numbers(2), "models_for_tests:Shapeless", batch_size=1)


def test_parts_of_other_columns_do_not_merge(run, work, numbers):
    """Parts whose models gave other columns are refused, and nothing is written."""
    path, parts = numbers(2), [work / "one", work / "two"]
    for index, part in enumerate(parts, 1):
        run(path, "models_for_tests:Shapeless", shard=f"{index}/2", output=part, **SINGLE)
    with pytest.raises(JobError, match=r"float32\[1\].*then.*float32\[2\].*begins with record 1\b"):
        merge_parts(parts, work / "merged")
    assert not shards(work / "merged")
