"""Columns that an output format can hold, and clear words about those that it cannot."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch

from asyncdp.errors import JobError
from asyncdp.infer.blocks import BlockRows
from asyncdp.infer.output.writers import write_shard
from asyncdp.infer.records import Record, Records
from asyncdp.infer.steps import to_columns


def written(format_name, columns, ids=None):
    file = io.BytesIO()
    count = len(next(iter(columns.values())))
    write_shard(format_name, file, list(range(count)) if ids is None else ids, columns)
    file.seek(0)
    return file


REFUSED = {
    "parquet": [[1, "text"], [object(), 1], ["\ud800", "a"], [torch.zeros(2), torch.zeros(2)], [2**70, 1]],
    "arrow": [[1, "text"], [object(), 1], ["\ud800", "a"], [torch.zeros(2), torch.zeros(2)], [2**70, 1]],
    "jsonl": [[b"bytes", b"b"], [{1, 2}, 1], ["\ud800", "a"], [torch.zeros(2), 1], [{("a",): 1}, 1]],
    "sqlite": [[2**63, 1], ["\ud800", "a"], [torch.zeros(2), 1], [[b"a"], 1], [1j, 1], [{1, 2}, 1]],
    "npy": [["text", "a"], [[1], [1, 2]], [None, 1]],
    "safetensors": [["text", "a"], [[1], [1, 2]], np.array([1 + 2j, 3])],
}


@pytest.mark.parametrize(
    ("format_name", "values"), [(name, values) for name, several in REFUSED.items() for values in several]
)
def test_what_a_format_cannot_hold(format_name, values):
    """The error names the column and what to do; it is never the library's own."""
    columns = {"fine": np.zeros(2), "odd": values}
    with pytest.raises(JobError, match=r"Column 'odd' .*--postprocess"):
        written(format_name, columns)


def test_what_each_format_holds():
    """Numbers of any shape everywhere; texts, lists and missing values in parquet and jsonl."""
    numbers = {"x": np.arange(6.0).reshape(2, 3), "n": np.arange(2)}
    mixed = {**numbers, "t": ["a", None], "v": [[1], [1, 2]], "d": [{"a": 1}, {"a": 2}]}
    assert pq.read_table(written("parquet", mixed)).to_pylist()[1]["d"] == {"a": 2}
    assert [json.loads(line)["v"] for line in written("jsonl", mixed)] == [[1], [1, 2]]
    assert np.load(written("npy", numbers))["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    loaded = safetensors.numpy.load(written("safetensors", numbers, ["a", "b"]).read())
    assert loaded["n"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.array(["neg", "neg"]), np.array(["positive", "neg"])),
        (np.array([b"a", b"a"]), np.array([b"ab", b"a"])),
        (np.array(["neg", 1], dtype=object), np.array(["positive", 2], dtype=object)),
        (np.array([["a", "b"], ["a", "b"]]), np.array([["abc", "b"], ["a", "b"]])),
    ],
)
def test_arrays_of_texts_may_differ_in_width(first, second):
    """NumPy's text types depend on the longest text of a batch, and must not make two schemas of it."""
    rows = BlockRows(0)
    for start, output in ((0, first), (2, second)):
        records = Records.of([Record(position, position, None, "") for position in (start, start + 1)])
        rows.add(records, to_columns({"label": output}, 2))
    assert rows.finish()[1]["label"] == [*first.tolist(), *second.tolist()]


def test_times_stay_arrays():
    """Arrays of times keep their type, which parquet has too."""
    times = np.array(["2024-01-01", "2024-01-02"], dtype="datetime64[ns]")
    assert to_columns({"t": times}, 2)["t"].dtype == times.dtype
    assert pq.read_table(written("parquet", {"t": times}))["t"].to_numpy().tolist() == times.tolist()
