"""Outputs of Arrow and SQLite: what others read of them; faults, parts and stores change no byte of them."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import errno
import itertools
import json
import sqlite3

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest

from asyncdp.errors import JobError, OutputError
from asyncdp.infer import files
from asyncdp.infer.output.merge import merge_parts
from asyncdp.infer.output.writers import write_shard
from asyncdp.infer.readers import Selection, open_inputs

SHAPE = {"shard_size": 10, "window": 5, "batch_size": 2}
SINGLE = {"shard_size": 1, "window": 1, "batch_size": 1, "devices": "cpu", "columns": ()}
SINGLE |= {"collate": "models_for_tests:records_of"}
ECHO = "models_for_tests:Echo"
FORMATS = ["arrow", "sqlite"]
ODD_NAN = np.array([0x7FC00123, 0xFF800000, 0x80000000], np.uint32).view(np.float32)
COLUMNS = {
    "x": pa.array([[1.0, 2.0, 3.0]] * 3, pa.list_(pa.float32())),
    "bits": pa.array(ODD_NAN),
    "half": pa.array(np.array([1, 0.5, np.inf], np.float16)),
    "at": pa.array([1, None, -(2**62)], pa.timestamp("ns", "Europe/Berlin")),
    "seconds": pa.array([1, None, 2**40], pa.timestamp("s")),
    "took": pa.array([datetime.timedelta(1), None, datetime.timedelta(0)]),
    "category": pa.array(["a", None, "b"]).dictionary_encode(),
    "nested": pa.array([[{"a": [b"\0"]}], [], None]),
    "big": pa.array([2**64 - 1, 0, None], pa.uint64()),
}


@pytest.fixture
def records(work):
    """Write dicts as JSONL; the model gives them back."""

    def records(*entries):
        (work / "in.jsonl").write_text("".join(json.dumps({"record": entry}) + "\n" for entry in entries))
        return work / "in.jsonl"

    return records


def contents(place):
    fs, root = fsspec.core.url_to_fs(str(place))
    fs.invalidate_cache()
    names = [name for name in fs.find(root) if "/part-" in name]
    return {name.rpartition("/")[2]: fs.cat_file(name) for name in names}


@pytest.fixture(params=["disk", "memory", "s3"])
def place(request, work):
    """A folder on a disk or in a store."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{work.name}"
    return str(work / "there") if request.param == "disk" else f"memory://outputs/{work.name}"


def table(folder):
    return pyarrow.dataset.dataset(folder, format="arrow").to_table()


def same(column, expected):
    """Whether two columns hold the same types and, NaN included, the same bits."""
    if pa.types.is_floating(expected.type):
        return [array.to_numpy().tobytes() for array in column.chunks] == [
            piece.to_numpy().tobytes() for piece in pieces(expected, column)
        ]
    if pa.types.is_dictionary(expected.type):  # the numbers of the categories are the shard's own
        return column.type == expected.type and column.to_pylist() == expected.to_pylist()
    return column.type == expected.type and column.combine_chunks().equals(expected)


def pieces(expected, column):
    starts = [0, *itertools.accumulate(map(len, column.chunks))]
    return [expected.slice(start, stop - start) for start, stop in itertools.pairwise(starts)]


def test_arrow_keeps_every_type_bit_for_bit(run, work):
    """From a file of Arrow to shards, by asyncdp's own reader from these to others, and to pyarrow."""
    with pa.ipc.new_file(work / "in.arrow", pa.table(COLUMNS).schema) as writer:
        writer.write_table(pa.table(COLUMNS))
    keep = tuple(name for name in COLUMNS if name != "x")
    options = {"keep": keep, "output_format": "arrow", "shard_size": 2, "batch_size": 1}
    run(work / "in.arrow", **options)
    run(work / "out", columns=("double",), output=work / "again", **options)
    for folder in (work / "out", work / "again"):
        found = table(folder)
        assert [name for name in keep if not same(found[name], COLUMNS[name])] == []
    assert found["double"].to_pylist() == [[4.0, 8.0, 12.0]] * 3
    assert found["double"].type == pa.list_(pa.float32(), 3)


def test_datasets_reads_a_folder_of_arrow(run, work, numbers):
    """By the folder's name alone: files of the job itself are no rows."""
    datasets = pytest.importorskip("datasets")
    run(numbers(25), output_format="arrow", **SHAPE)
    rows = datasets.load_dataset(str(work / "out"), cache_dir=str(work / "cache"), split="train")
    assert rows["id"][:] == list(range(25))
    assert rows[7]["double"] == [14.0, 2.0, 0.0]


def test_types_of_arrow_widen_as_those_of_parquet(run, work, records):
    """Shards before are written again, also by a merge; what has no common type is refused by name."""
    path = records({"a": 1, "b": ["x"]}, {"a": 0.5}, {"c": {"d": None}}, {"c": {"e": 1}})
    for output_format in ("parquet", "arrow"):
        parts = [work / f"{output_format}{index}" for index in (1, 2)]
        for index, part in enumerate(parts, 1):
            run(path, ECHO, output=part, shard=f"{index}/2", output_format=output_format, **SINGLE)
        merge_parts(parts, work / output_format)
        run(path, ECHO, output=work / f"whole-{output_format}", output_format=output_format, **SINGLE)
    assert contents(work / "arrow") == contents(work / "whole-arrow")
    assert len({str(pa.ipc.open_file(shard).schema) for shard in (work / "arrow").glob("part-*")}) == 1
    expected = pyarrow.dataset.dataset(work / "parquet", format="parquet").to_table()
    assert table(work / "arrow").cast(expected.schema).equals(expected)
    either = r"column 'a' is (int64, then string .* record 1|string, then int64 .* record 0)\b"  # ends first
    with pytest.raises(JobError, match=either):
        run(records({"a": 1}, {"a": "x"}), ECHO, output_format="arrow", **SINGLE)


def rows_of(shard):
    """The columns and rows of a shard of SQLite, as any program reads them."""
    with contextlib.closing(sqlite3.connect(f"{shard.as_uri()}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        answer = connection.execute("SELECT * FROM records")
        return [name for name, *_ in answer.description], answer.fetchall()


def test_what_sqlite_holds(tmp_path):
    """Numbers, texts and bytes as they are, arrays as their bytes, all else as JSON or ISO text."""
    day = datetime.date(2024, 1, 31)
    columns = {
        "vector": np.array([[1, -0.0], [np.nan, np.inf]], ">f4"),
        "half": np.array([0.5, np.nan], np.float16),
        "large": np.array([2**63 - 1, -(2**63)]),
        "flag": np.array([True, False]),
        'q"uote': ["5", "a\0ü"],
        "any": [5, 0.1],
        "bytes": [b"\xff\0", None],
        "times": np.array(["2024-01-31T00:00:00", "NaT"], "datetime64[s]"),
        "day": [day, decimal.Decimal("1.50")],
        "scalar": [pa.scalar(7, pa.int8()), pa.scalar([1.5, None])],
        "json": [{"a": [float("nan"), "é"]}, [1, (2,)]],
    }
    path = tmp_path / "part-000000.sqlite"
    with open(path, "wb") as file:
        write_shard("sqlite", file, [0, "b"], columns)
    names, (first, second) = rows_of(path)
    assert names == ["id", *columns]
    vectors = [np.frombuffer(row[1], "<f4").tobytes() for row in (first, second)]
    assert vectors == [row.astype("<f4").tobytes() for row in columns["vector"]]
    iso = ["2024-01-31T00:00:00", "2024-01-31"]
    assert first[2:] == (0.5, 2**63 - 1, 1, "5", 5, b"\xff\0", iso[0], iso[1], 7, '{"a": [null, "é"]}')
    assert second[2:8] == (None, -(2**63), 0, "a\0ü", 0.1, None)
    assert second[9:] == ("1.50", "[1.5, null]", "[1, [2]]")
    assert (first[0], second[0]) == (0, "b")


def test_columns_of_sqlite_are_those_of_the_job(run, work, records):
    """A key that is missing is null, in other shards and in other parts; a further job reads them."""
    path, options = records({"b": 1, "a": [2]}, {"b": "3"}, {"c": 0.1}), {**SINGLE, "output_format": "sqlite"}
    run(path, ECHO, **options)
    parts = [work / "one", work / "two"]
    for index, part in enumerate(parts, 1):
        run(path, ECHO, output=part, shard=f"{index}/2", **options)
    merge_parts(parts, work / "whole")
    assert contents(work / "out") == contents(work / "whole")
    found = [rows_of(shard) for shard in sorted((work / "out").glob("part-*"))]
    assert [names for names, _ in found] == [["id", "a", "b", "c"]] * 3
    expected = [(0, "[2]", 1, None), (1, None, "3", None), (2, None, None, 0.1)]
    assert [row for _, rows in found for row in rows] == expected
    inputs = open_inputs([str(work / "out")], None, Selection(("b", "c")))
    assert [tuple(record.value.values()) for record in inputs.read()] == [(1, None), ("3", None), (None, 0.1)]


def test_columns_that_sqlite_cannot_tell_apart(run, work, records):
    """The error names them; the shard before stays as it was, and a resume ends the same way."""
    path = records({"a": 1}, {"A": 2})
    for _ in range(2):
        with pytest.raises(JobError, match=r"'a'.*duplicate column name.*--rename"):
            run(path, ECHO, resume=True, output_format="sqlite", **SINGLE)
    (shard,) = (work / "out").glob("part-*")
    assert len(rows_of(shard)[0]) == 2


@pytest.mark.parametrize("output_format", FORMATS)
def test_faults_parts_and_stores_change_no_byte(run, work, numbers, place, monkeypatch, output_format):
    """A full disk, shards that vanish or are damaged, parts and a merge: all is as in one calm run."""
    path, options = numbers(45), {"output_format": output_format, **SHAPE}
    run(path, output=work / "whole", **options)
    whole = contents(work / "whole")
    assert sorted(whole) == [f"part-{index:06d}.{output_format}" for index in range(5)]

    def failing(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    run(path, output=place, **options)
    fs, root = fsspec.core.url_to_fs(place)
    with fs.open(f"{root}/part-000001.{output_format}", "wb") as damaged:
        damaged.write(b"x" * len(whole[f"part-000001.{output_format}"]))
    fs.rm_file(f"{root}/part-000003.{output_format}")
    with monkeypatch.context() as patch:
        patch.setattr(files, "put", failing)
        patch.setattr(files.os, "replace", failing)
        with pytest.raises(OutputError, match="No space left"):
            run(path, output=place, resume=True, **options)
    assert run(path, output=place, resume=True, **options).num_earlier == 25
    assert contents(place) == whole

    parts = [work / "one", work / "two"]
    for index, part in enumerate(parts, 1):
        run(path, output=part, shard=f"{index}/2", **options)
    merge_parts(parts, f"{place}-merged")
    assert contents(f"{place}-merged") == whole
