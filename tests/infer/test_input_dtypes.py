"""The dtype of what a model gets is that of the job: no batch and no neighbour decides it."""

from __future__ import annotations

import json
import struct

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from asyncdp.errors import JobUsageError, RecordError


class TellDtype(nn.Module):
    """Give what came in, as doubles, and its dtype."""

    def forward(self, x):
        return {"value": x.double().reshape(len(x), -1)[:, 0], "dtype": [str(x.dtype)] * len(x)}


class DoubleWeights(TellDtype):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))


class Tokens(nn.Module):
    """A parameter of its own beside an embedding, as many language models have."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Embedding.from_pretrained(torch.arange(4.0).unsqueeze(1))

    def forward(self, x):
        return self.embedding(x).sum((1, 2))


class TwoInputs(nn.Module):
    def forward(self, x, ids):
        return {"x": [str(x.dtype)] * len(x), "ids": [str(ids.dtype)] * len(x)}


class Row(nn.Module):
    """A linear layer over three numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1, bias=False)
        nn.init.ones_(self.linear.weight)

    def forward(self, x):
        return {"sum": self.linear(x).squeeze(1)}


HERE = "tests_of_input_dtypes"


@pytest.fixture
def job(run, work, monkeypatch):
    """Run a model of this file over JSON values of `x`, and return the rows."""
    monkeypatch.setitem(__import__("sys").modules, HERE, __import__("sys").modules[__name__])

    def job(model, values, **options):
        path = work / "in.jsonl"
        path.write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
        return rows(run, path, model, **options)

    return job


def rows(run, path, model, **options):
    out = path.parent / f"out-{path.name}-{options.get('batch_size', 32)}"
    run(path, f"{HERE}:{model}", output=out, **options)
    return pyarrow.dataset.dataset(out, format="parquet").to_table().to_pylist()


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_whole_numbers_for_a_model_of_floats(job, batch_size):
    """Rows of whole numbers are as good as rows with fractions, alone and beside them."""
    found = job("Row", [[1, 2, 3], [0.5, 1, 2], [4, 5, 6]], batch_size=batch_size)
    assert [row["sum"] for row in found] == [6, 3.5, 15]


def test_a_bad_record_does_not_take_a_good_one_along(job):
    """Halving a batch for one bad record leaves the others their dtype."""
    found = job("Row", [[0.5, 1, 1], [1, 2, 3], [1, 2], [4, 5, 6]], on_error="skip")
    assert [(row["id"], row["sum"]) for row in found] == [(0, 2.5), (1, 6), (3, 15)]


@pytest.mark.parametrize("values", [[16777217], [16777217, 0.5], [[0.5, 16777217]], [10**400], [2**70 + 1]])
def test_a_whole_number_that_float32_cannot_hold(job, values):
    """It is refused by name, alone, beside a fraction in another record, and in the same one."""
    with pytest.raises(RecordError, match=r"Record 0 .*--input-dtype|Record 0 .*too large"):
        job("TellDtype", values)


def test_input_dtype(job):
    """What the user says goes for every record."""
    found = job("TellDtype", [16777217, 0.5, 2**53], input_dtype="float64")
    assert [(row["value"], row["dtype"]) for row in found] == [
        (16777217, "torch.float64"),
        (0.5, "torch.float64"),
        (2**53, "torch.float64"),
    ]
    with pytest.raises(RecordError, match=r"Record 0 .*0.5 does not fit into int64: choose another"):
        job("TellDtype", [0.5], input_dtype="int64", batch_size=1)


@pytest.mark.parametrize(
    ("model", "value", "dtype"),
    [
        ("TellDtype", 1, "float32"),
        ("TellDtype", 0.1, "float32"),
        ("TellDtype", True, "bool"),
        ("TellDtype", 2**70, "float32"),
        ("DoubleWeights", 16777217, "float64"),
    ],
)
def test_the_model_says_which_dtype(job, model, value, dtype):
    """Numbers get the dtype of the weights; truth values are no numbers."""
    (row,) = job(model, [value])
    assert (row["value"], row["dtype"]) == (
        float(torch.tensor(float(value), dtype=getattr(torch, dtype))),
        f"torch.{dtype}",
    )


def test_an_embedding_first_expects_indices(job):
    """Token ids stay integers, for every batch size, and a fraction is no id."""
    assert [row["output"] for row in job("Tokens", [[1, 2], [3, 3]])] == [3, 6]
    with pytest.raises(RecordError, match=r"0.5 does not fit into int64"):
        job("Tokens", [[0.5, 2]], batch_size=1)


def test_an_exported_program_states_its_dtypes(run, work):
    """By the names of its inputs."""

    class Model(nn.Module):
        def forward(self, x, ids):
            return x.sum(1) + ids

    batch = torch.export.Dim("batch", min=1)
    inputs = {"x": torch.zeros(2, 2, dtype=torch.float64), "ids": torch.zeros(2, dtype=torch.int32)}
    shapes = {"x": {0: batch}, "ids": {0: batch}}
    torch.export.save(torch.export.export(Model(), (), inputs, dynamic_shapes=shapes), work / "m.pt2")
    (work / "in.jsonl").write_text('{"x": [1, 16777217], "ids": 3}\n{"x": [0.5, 1], "ids": 4}\n')
    run(work / "in.jsonl", "m.pt2", columns=("x", "ids"))
    assert pq.read_table(next((work / "out").glob("part-*")))["output"].to_pylist() == [16777221, 5.5]


def test_dtypes_by_name(run, work, job):
    """A dict's entries may differ; what is no dtype, and what has no effect, is an error."""
    path = work / "two.jsonl"
    path.write_text('{"x": 1, "ids": 3}\n')
    options = {"columns": ("x", "ids"), "input_dtype": "ids=int32, float64"}
    (row,) = rows(run, path, "TwoInputs", **options)
    assert (row["x"], row["ids"]) == ("torch.float64", "torch.int32")
    with pytest.raises(JobUsageError, match=r"'float' is no dtype\. Choose one of bool"):
        job("TellDtype", [1], input_dtype="float")
    with pytest.raises(JobUsageError, match="no effect beside --collate"):
        job("TellDtype", [1], input_dtype="float32", collate="a:b")


def test_doubles_of_numpy(run, work, job):
    """They fit a model of floats where they are not too large, and a model of doubles as they are."""
    path = work / "a.npy"
    np.save(path, np.array([0.5, 1e300]))
    with pytest.raises(RecordError, match=r"Record 1 .*1e\+300 does not fit into float32"):
        rows(run, path, "TellDtype", columns=())
    assert [row["value"] for row in rows(run, path, "DoubleWeights", columns=(), batch_size=2)] == [
        0.5,
        1e300,
    ]
    np.save(path, np.array([2**24 + 1, 3]))
    assert rows(run, path, "DoubleWeights", columns=(), batch_size=3)[0]["dtype"] == "torch.int64"
    with pytest.raises(RecordError, match=r"16777217 does not fit into float32"):
        rows(run, path, "TellDtype", columns=(), batch_size=4, input_dtype="float32")


def test_names_that_only_some_records_have(job):
    """A key that the first record of a batch lacks is not dropped from the others."""
    with pytest.raises(RecordError, match=r"Record 1 .*unexpected keyword argument 'more'"):
        job("TellDtype", [{"x": 1}, {"x": 1, "more": 2}])


def test_rounded_fractions():
    """A fraction gets the nearest value, which is what float32 is for."""
    from asyncdp.infer.dtypes import InputDtypes

    rounded = InputDtypes({}, {"": torch.float32}).tensor([0.1, 1e38])
    assert rounded.tolist() == [struct.unpack("f", struct.pack("f", value))[0] for value in (0.1, 1e38)]
