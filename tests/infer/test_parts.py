"""A part of a job reads its own piece of the input, and nothing is lost or doubled between the parts."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from asyncdp.errors import ResumeRefusedError
from asyncdp.infer.output.merge import merge_parts
from asyncdp.infer.readers import Selection, open_inputs

SHAPE = {"shard_size": 100, "window": 50, "batch_size": 25}


@pytest.fixture
def folder(work):
    """Eight files of Parquet with ten row groups of 50 rows each."""
    data = work / "data"
    data.mkdir()
    dice = np.random.default_rng(0)
    for index in range(8):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(dice.random(1500)), 3)
        table = pa.table({"x": vectors, "text": [dice.bytes(1500).hex() for _ in range(500)]})
        pq.write_table(table, data / f"{index}.parquet", row_group_size=50)
    return data


def num_bytes_read():
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs the kernel's count of bytes read")
def test_a_part_reads_its_own_row_groups(run, work, folder):
    """One part of eight reads at most a fifth of the bytes, fingerprint and footers included."""
    whole = sum(path.stat().st_size for path in folder.iterdir())
    options = {"columns": ("x", "text"), "preprocess": "models_for_tests:x_of", **SHAPE}
    run(folder, output=work / "warm", **options)  # what is imported meanwhile is not counted below
    before = num_bytes_read()
    run(folder, output=work / "part", shard="3/8", **options)
    assert num_bytes_read() - before < 0.2 * whole


@pytest.mark.parametrize("num_parts", [2, 9])
def test_parts_of_a_counted_input_merge_into_the_whole(run, work, folder, num_parts):
    """Its parts are neighbouring blocks, none for some, and give the very files of an undivided run."""
    shape = {"shard_size": 540, "window": 180, "batch_size": 90}  # eight blocks, whose ends are in row groups
    run(folder, output=work / "whole", **shape)
    parts = [work / f"part{index}" for index in range(num_parts)]
    counts = [
        run(folder, output=part, shard=f"{index}/{num_parts}", **shape).num_records
        for index, part in enumerate(parts, 1)
    ]
    assert sum(counts) == 4000
    assert max(counts) - min(counts) <= 540
    assert merge_parts(parts, work / "merged").num_records == 4000
    contents = [
        {path.name: path.read_bytes() for path in (work / name).glob("part-*")}
        for name in ("whole", "merged")
    ]
    assert contents[0] == contents[1]
    # The merged folder counts as that of an undivided job.
    assert run(folder, output=work / "merged", resume=True, **shape).num_earlier == 4000


def test_a_part_with_a_gap_reads_only_the_gap(run, work, folder):
    """A shard that got lost is written again, from the files that hold its records alone."""
    run(folder, output=work / "out", **SHAPE)
    expected = pyarrow.dataset.dataset(work / "out", format="parquet").to_table()
    (work / "out" / "part-000013.parquet").unlink()
    assert run(folder, output=work / "out", resume=True, **SHAPE).num_earlier == 3900
    assert pyarrow.dataset.dataset(work / "out", format="parquet").to_table() == expected


def test_a_changed_input_of_a_part_is_seen(run, work, folder):
    """A part compares samples and times, so that it need not read what belongs to others."""
    run(folder, output=work / "part", shard="1/4", **SHAPE)
    assert run(folder, output=work / "part", shard="1/4", resume=True, **SHAPE).num_earlier == 1000
    os.utime(folder / "7.parquet", ns=(1, 1))
    with pytest.raises(ResumeRefusedError, match=r"times of sampled files was .*7.parquet"):
        run(folder, output=work / "part", shard="1/4", resume=True, **SHAPE)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (499, 501), (1234, 3210), (3999, 4000)])
def test_any_piece_of_an_input(folder, start, stop):
    """The records from one position to another are what they are in the whole input."""
    inputs = open_inputs([str(folder)], None, Selection(("x",)))
    whole = [(record.position, record.value.tolist()) for record in inputs.read()]
    piece = [(record.position, record.value.tolist()) for record in inputs.read(start, stop)]
    assert piece == whole[start:stop]
