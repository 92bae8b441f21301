"""Ids and kept columns come out as they went in, and values that Python cannot hold are no bad records."""

from __future__ import annotations

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from asyncdp.errors import InputError, JobError, JobUsageError
from asyncdp.infer.readers import Selection, open_inputs

COLUMNS = {
    "x": pa.array([[1.0, 2, 3]] * 2, pa.list_(pa.float32(), 3)),
    "at": pa.array([1, 10**18 + 1], pa.timestamp("ns", "Europe/Rome")),
    "day": pa.array([-(10**6), 10**7], pa.date32()),
    "big": pa.array([decimal.Decimal("1" * 60), None], pa.decimal256(76, 2)),
    "u": pa.array([2**64 - 1, 0], pa.uint64()),
    "took": pa.array([1, -1_500_000_000], pa.duration("ns")),
    "time": pa.array([1, None], pa.time64("ns")),
    "small": pa.array([1, None], pa.int8()),
    "text": pa.array(["a", "b"]).dictionary_encode(),
    "nested": pa.array([{"t": [1]}, {"t": None}], pa.struct([("t", pa.list_(pa.timestamp("ns")))])),
    "numbers": pa.array([[1], None], pa.list_(pa.int16())),
    "blob": pa.array([b"\xff" * 16, b"\0" * 16], pa.binary(16)),
}
SUMS = "models_for_tests:Sums"


@pytest.fixture
def path(work):
    pq.write_table(pa.table(COLUMNS), work / "in.parquet")
    return work / "in.parquet"


def table(work):
    return pyarrow.dataset.dataset(work / "out", format="parquet").to_table()


@pytest.mark.parametrize("name", ["at", "day", "big", "took"])
def test_an_id_of_arrow_comes_out_bit_for_bit(run, work, name):
    """With the type that it has in the input."""
    columns = {
        **COLUMNS,
        "big": pa.array([decimal.Decimal("1" * 60), decimal.Decimal(0)], pa.decimal256(76, 2)),
    }
    pq.write_table(pa.table(columns), work / "in.parquet")
    run(work / "in.parquet", SUMS, id_column=name)
    assert table(work)["id"].combine_chunks().equals(columns[name])


def test_every_type_is_kept(run, work, path):
    """A column that no function touches goes from Parquet to Parquet as Arrow."""
    names = tuple(name for name in COLUMNS if name != "x")
    run(path, SUMS, keep=names, batch_size=1)
    found = table(work)
    for name in names:
        expected = COLUMNS[name]
        column = found[name].combine_chunks()
        if name == "text":  # read back as plain text or as a dictionary
            column, expected = column.cast("string"), expected.cast("string")
        assert column.equals(expected), name


@pytest.mark.parametrize("output_format", ["parquet", "jsonl", "arrow", "sqlite"])
@pytest.mark.parametrize("width", [(), (2,)])
def test_texts_of_arrays_are_kept_however_wide(run, work, width, output_format):
    """An array of texts is as wide as its longest, so that batches and shards differ in dtype."""
    texts = np.array([["a" * (1 + index), "b"] for index in range(6)])
    texts = texts if width else texts[:, 0]
    np.savez(work / "in.npz", x=np.ones((6, 3), np.float32), text=texts)
    run(
        work / "in.npz",
        SUMS,
        columns=("x",),
        keep=("text",),
        batch_size=2,
        shard_size=4,
        output_format=output_format,
    )
    if output_format == "parquet":
        assert table(work)["text"].to_pylist() == texts.tolist()
    if output_format == "jsonl":
        lines = [
            line
            for part in sorted((work / "out").glob("part-*.jsonl"))
            for line in part.read_text().splitlines()
        ]
        assert [json.loads(line)["text"] for line in lines] == texts.tolist()


def test_values_that_python_cannot_hold(path):
    """They are NumPy's where a function gets them, at any depth; the others are Python's."""
    first, second = (record.value for record in open_inputs([str(path)], None, Selection()).read())
    assert second["at"] == np.datetime64(10**18 + 1, "ns")
    assert type(first["at"]) is np.datetime64
    assert [first["day"], second["day"]] == [np.datetime64(-(10**6), "D"), np.datetime64(10**7, "D")]
    assert (first["big"], second["big"]) == (decimal.Decimal("1" * 60), None)
    assert (first["u"], first["took"], second["time"]) == (2**64 - 1, np.timedelta64(1, "ns"), None)
    assert first["nested"] == {"t": [np.datetime64(1, "ns")]}
    assert second["nested"] == {"t": None}


def test_json_has_iso_text(run, work, path):
    """For ids, and for values of every kind that JSON has no word for."""
    names = ("day", "big", "u", "took", "time", "small", "nested")
    run(path, SUMS, keep=names, id_column="at", output_format="jsonl")
    first, second = map(json.loads, (work / "out" / "part-000000.jsonl").read_text().splitlines())
    assert second["id"] == "2001-09-09T01:46:40.000000001Z"
    assert first == {
        **first,
        "day": "-0768-02-04",
        "u": 2**64 - 1,
        "took": "PT0.000000001S",
        "time": "PT0.000000001S",
        "small": 1,
        "nested": {"t": ["1970-01-01T00:00:00.000000001"]},
    }
    assert decimal.Decimal(first["big"]) == decimal.Decimal("1" * 60)
    assert (second["took"], second["big"], second["time"]) == ("-PT1.5S", None, None)


def times(output):
    count = len(output["total"])
    return {
        "when": np.arange(count).astype("datetime64[ns]"),
        "day": [datetime.date(2024, 2, 29)] * count,
        "span": [datetime.timedelta(hours=1)] * count,
        "gap": np.full(count, np.timedelta64("NaT", "s")),
        "unsigned": [2**64 - 1] * count,
    }


@pytest.fixture
def postprocess(monkeypatch):
    import models_for_tests

    monkeypatch.setattr(models_for_tests, "times", times, raising=False)
    return "models_for_tests:times"


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_times_that_a_function_returns(run, work, path, postprocess, output_format):
    """Parquet has types for them, JSON has ISO text and null."""
    run(path, SUMS, postprocess=postprocess, output_format=output_format)
    if output_format == "parquet":
        row = table(work).select(["day", "span", "unsigned"]).to_pylist()[0]
        assert table(work)["when"].type == pa.timestamp("ns")
        assert (row["day"], row["span"]) == (datetime.date(2024, 2, 29), datetime.timedelta(hours=1))
    else:
        row = json.loads((work / "out" / "part-000000.jsonl").read_text().splitlines()[0])
        assert (row["when"], row["gap"]) == ("1970-01-01T00:00:00.000000000", None)
        assert (row["day"], row["span"]) == ("2024-02-29", "PT3600S")
    assert row["unsigned"] == 2**64 - 1


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "npz", "safetensors"])
def test_columns_of_other_formats_are_kept(run, work, suffix):
    """Text, JSON values and arrays too, under another name where one is given."""
    path, x = work / f"in.{suffix}", np.arange(6, dtype=np.float32).reshape(2, 3)
    if suffix == "csv":
        path.write_text("x,k\n1,a\n2,b\n")
    elif suffix == "jsonl":
        path.write_text('{"x": [0, 1, 2], "k": {"a": [1]}}\n{"x": [3, 4, 5], "k": {"a": [2]}}\n')
    elif suffix == "npz":
        np.savez(path, x=x, k=x[:, :2])
    else:
        safetensors.torch.save_file({"x": torch.from_numpy(x), "k": torch.tensor([1, 2])}, path)
    model = "models_for_tests:Lengths" if suffix == "csv" else SUMS
    run(path, model, keep=("k",), rename=("k=key",))
    expected = {
        "csv": ["a", "b"],
        "jsonl": [{"a": [1]}, {"a": [2]}],
        "npz": [[0, 1], [3, 4]],
        "safetensors": [1, 2],
    }
    assert table(work)["key"].to_pylist() == expected[suffix]


def test_names_of_output_columns(run, work, path):
    """The model's columns can be renamed; two of one name, and a name that is not there, are errors."""
    run(path, SUMS, rename=("total=score",))
    assert table(work).column_names == ["id", "score", "double"]
    pq.write_table(pa.table({"x": COLUMNS["x"], "total": [1, 2]}), path)
    with pytest.raises(JobError, match=r"two columns 'total'\. Give one another name: --rename"):
        run(path, SUMS, keep=("total",), output=work / "two")
    run(path, SUMS, keep=("total",), rename=("total=known",), output=work / "three")
    assert pq.read_table(work / "three" / "part-000000.parquet").column_names == [
        "id",
        "known",
        "total",
        "double",
    ]
    with pytest.raises(JobError, match=r"no column 'totl' to rename\. The output has 'total', 'double'"):
        run(path, SUMS, rename=("totl=a",), output=work / "four")
    with pytest.raises(JobUsageError, match="--rename total names no two columns"):
        run(path, SUMS, rename=("total",), output=work / "five")
    with pytest.raises(InputError, match="has no column 'price'"):
        run(path, SUMS, keep=("price",), output=work / "six")


def test_two_columns_of_one_name(work):
    """In a Parquet file that has them the second would hide the first."""
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), work / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet has two columns 'a'"):
        open_inputs([str(work / "a.parquet")], None, Selection())


def test_decimals_are_numbers(run, work):
    """For a model too, where its dtype holds them."""
    kind = pa.list_(pa.decimal128(20, 2), 3)
    pq.write_table(pa.table({"x": pa.array([[decimal.Decimal("0.25"), 1, 2]], kind)}), work / "in.parquet")
    run(work / "in.parquet", SUMS)
    assert table(work)["total"].to_pylist() == [3.25]
