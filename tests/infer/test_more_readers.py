"""Arrow, folders of `datasets`, WebDataset, SQLite and DuckDB: right values, and damage that is named."""

from __future__ import annotations

import base64
import io
import sqlite3
import tarfile

import numpy as np
import pyarrow as pa
import pytest

from asyncdp.errors import DamagedInputError, InputError
from asyncdp.infer.readers import Dialect, Selection, open_inputs
from asyncdp.infer.where import Subset, Where


def records(path, columns=(), start=0, stop=None, query=None, **options):
    where = Where.of(options.pop("where")) if "where" in options else None
    selection = Selection(columns, where=where, **options)
    inputs = open_inputs(
        [str(path)], None, selection, dialect=Dialect(query=query), subset=Subset(where) if where else None
    )
    return list(inputs.read(start, stop))


def values(path, columns=(), **options):
    return [record.value for record in records(path, columns, **options)]


def write_arrow(path, *, stream, batches=4, compression=None):
    table = pa.table({"n": range(100), "t": pa.array(range(100), pa.timestamp("ns"))})
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=100 // batches)
    return path


@pytest.mark.parametrize("stream", [True, False])
def test_arrow(tmp_path, stream):
    """Files and streams, any piece of them, with a condition; kept columns stay Arrow's."""
    path = write_arrow(tmp_path / "rows.arrow", stream=stream, compression="zstd")
    assert values(path, ("n",)) == list(range(100))
    assert values(path, ("n",), start=20, stop=60) == list(range(20, 60))
    assert values(path, ("n",), where="n > 95 or n == 3") == [3, 96, 97, 98, 99]
    assert records(path, ("n",), keep=("t",))[7].kept["t"] == pa.scalar(7, pa.timestamp("ns"))
    with pytest.raises(InputError, match="no column 'm'"):
        values(path, ("m",))


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_that_is_cut_anywhere(tmp_path, stream):
    """Also between two batches, where Arrow itself sees a shorter stream."""
    whole = write_arrow(tmp_path / "rows.arrow", stream=stream).read_bytes()
    for end in range(0, len(whole), 97 if len(whole) > 2000 else 13):
        (tmp_path / "cut.arrow").write_bytes(whole[:end])
        with pytest.raises(DamagedInputError, match=r"cut.arrow cannot be read"):
            values(tmp_path / "cut.arrow")


def test_a_stream_of_an_old_release(tmp_path):
    """Before Arrow 0.15 another mark ended a stream; one that lacks it is cut."""
    path = tmp_path / "old.arrows"
    table = pa.table({"x": [1, 2]})
    options = pa.ipc.IpcWriteOptions(use_legacy_format=True)
    with pa.ipc.new_stream(path, table.schema, options=options) as writer:
        writer.write_table(table)
    assert values(path) == [{"x": 1}, {"x": 2}]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedInputError, match="no end mark"):
        values(path)


# Schemas of one column, as Arrow writes them: its functions for Python cannot make these types.
SPANS = {
    "month_interval": (
        "/////3AAAAAQAAAAAAAKAAwABgAFAAgACgAAAAABBAAMAAAACAAIAAAABAAIAAAABAAAAAEAAAAUAAAAEAAUAAgABgAHAAwA"
        "AAAQABAAAAAAAAELEAAAABwAAAAEAAAAAAAAAAQAAABzcGFuAAAAAAQABAAEAAAA"
    ),
    "day_time_interval": (
        "/////3gAAAAQAAAAAAAKAAwABgAFAAgACgAAAAABBAAMAAAACAAIAAAABAAIAAAABAAAAAEAAAAUAAAAEAAUAAgABgAHAAwA"
        "AAAQABAAAAAAAAELEAAAABwAAAAEAAAAAAAAAAQAAABzcGFuAAAGAAgABgAGAAAAAAABAAAAAAA="
    ),
}


@pytest.mark.parametrize("kind", SPANS)
def test_types_that_arrow_does_not_give_to_python(tmp_path, kind):
    """Such a column is named at the start, and no record is lost; the others can be read."""
    span = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(SPANS[kind]))).field("span")
    for field in (span, pa.field("span", pa.list_(span.type))):
        path = tmp_path / "odd.arrow"
        with pa.ipc.new_file(path, pa.schema([pa.field("x", pa.int64()), field])):
            pass
        with pytest.raises(InputError, match=f"column 'span' is of type .*{kind}.*Choose others"):
            values(path)
        assert values(path, ["x"]) == []


def test_a_feather_file(tmp_path):
    """Of version 2, which is an Arrow file."""
    feather = pytest.importorskip("pyarrow.feather")
    feather.write_feather(pa.table({"n": [1, 2]}), str(tmp_path / "rows.feather"))
    assert values(tmp_path / "rows.feather", ("n",)) == [1, 2]


def test_a_folder_that_datasets_saved(tmp_path):
    """Its own files in order, not those that the library leaves beside; a folder of splits names them."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"n": list(range(10)), "s": [str(n) for n in range(10)]})
    data.save_to_disk(str(tmp_path / "one"), num_shards=3)
    write_arrow(tmp_path / "one" / "cache-0123.arrow", stream=True)
    assert values(tmp_path / "one", ("n",)) == list(range(10))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(InputError, match=r"holds several splits. Name one: .*two/train"):
        values(tmp_path / "two")
    assert values(tmp_path / "two" / "test", ("s",))[-1] == "9"


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_webdataset(tmp_path):
    """Neighbours of one name are a record; what cannot be decoded is a bad one."""
    members = [
        ("a/1.txt", b"one"),
        ("a/1.cls", b"3"),
        ("a/1.seg.npy", npy(np.arange(3))),
        ("a/1.jpg", b"\xff\xd8"),
    ]
    members += [("a/2.json", b'{"k": [1]}'), ("b/2.json", b"no"), ("b/3.txt", b"x"), ("b/3.txt", b"y")]
    path = write_tar(tmp_path / "s.tar", members)
    found = records(path)
    first = found[0].value
    assert (first["__key__"], first["txt"], first["cls"], first["jpg"]) == ("a/1", "one", 3, b"\xff\xd8")
    assert first["seg.npy"].tolist() == [0, 1, 2]
    assert found[1].value == {"__key__": "a/2", "json": {"k": [1]}}
    assert [record.error is None for record in found] == [True, True, False, False]
    assert next(record.id for record in records(path, ("txt",), id_column="__key__")) == "a/1"


def test_webdataset_that_is_cut_anywhere(tmp_path):
    """Also between two members, where the library sees a shorter archive."""
    whole = write_tar(tmp_path / "s.tar", [(f"{n}.txt", b"text" * 200) for n in range(3)]).read_bytes()
    end_of_data = 3 * (512 + 1024)
    for end in range(0, end_of_data + 1, 256):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        with pytest.raises(DamagedInputError, match=r"cut.tar cannot be read"):
            values(tmp_path / "cut.tar")


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "rows.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE rows (n INTEGER, s TEXT, f REAL, b BLOB)")
        rows = [(n, None if n == 3 else str(n), n / 4, bytes([n % 256])) for n in range(3000)]
        connection.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", rows)
    connection.close()
    return path


def test_sqlite(database):
    """The only table, or a query; values of its own types."""
    rows = values(database)
    assert len(rows) == 3000
    assert rows[3] == {"n": 3, "s": None, "f": 0.75, "b": b"\x03"}
    assert values(database, ("n",), query="SELECT n FROM rows WHERE n % 1000 = 7 ORDER BY n DESC") == [
        2007,
        1007,
        7,
    ]
    assert values(database, ("n",), where="f > 749") == [2997, 2998, 2999]
    with pytest.raises(InputError, match=r"the query 'SELECT x' fails: no such column: x"):
        values(database, query="SELECT x")
    with pytest.raises(InputError, match="two columns 'n'"):
        values(database, query="SELECT n, n FROM rows")


def test_damaged_and_odd_databases(database, tmp_path):
    """A cut file is named; a text that is no UTF-8 is a bad record; several tables need a query."""
    (tmp_path / "cut.db").write_bytes(database.read_bytes()[:-8192])
    (tmp_path / "no.db").write_bytes(b"no database at all" * 100)
    for name in ("cut.db", "no.db"):
        with pytest.raises(DamagedInputError, match=f"{name} cannot be read"):
            values(tmp_path / name)
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO rows VALUES (1, CAST(X'ff41' AS TEXT), 0, NULL)")
        connection.execute("CREATE TABLE other (a)")
    connection.close()
    with pytest.raises(
        InputError, match=r"holds 2 tables, not one. Give a --query over them: 'rows', 'other'"
    ):
        values(database)
    bad = records(database, query="SELECT * FROM rows WHERE n = 1")
    assert [record.error is None for record in bad] == [True, False]


def test_duckdb(tmp_path):
    """A query over a file of any kind it reads, named `input`, or over the tables of its own file."""
    duckdb = pytest.importorskip("duckdb")
    (tmp_path / "rows.csv").write_text("a,b\n1,x\n2,y\n3,z\n")
    inputs = open_inputs(
        [str(tmp_path / "rows.csv")],
        "duckdb",
        Selection(("c",)),
        dialect=Dialect(query="SELECT a * 10 AS c FROM input WHERE b <> 'y' ORDER BY a"),
    )
    assert [record.value for record in inputs.read()] == [10, 30]
    path = tmp_path / "rows.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE t AS SELECT range AS n FROM range(5000)")
    assert values(path, ("n",)) == list(range(5000))
    assert values(path, ("n",), where="n >= 4998") == [4998, 4999]
    with pytest.raises(InputError, match="the query 'SELECT' fails"):
        values(path, query="SELECT")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DamagedInputError, match=r"rows.duckdb cannot be read"):
        values(path)
