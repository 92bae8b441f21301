"""What a file states is checked against what it holds: no record is lost without a word."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asyncdp.errors import DamagedInputError
from asyncdp.infer.readers import Selection, open_inputs


def values(path, start=0):
    return [record.value for record in open_inputs([str(path)], None, Selection()).read(start)]


def thrift_row_counts(data):
    """Return where the footer of a Parquet file of 6 rows states them: file, row group, column chunks."""
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return [i + 1 for i in range(begin, len(data) - 8) if data[i : i + 2] == b"\x16\x0c"]


@pytest.mark.parametrize("stated", [0, 3, 7])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_parquet_footer_that_disagrees_with_itself(tmp_path, stated, place):
    """Whichever number of rows is wrong, of the file, a row group or a column, nothing is read."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": pa.array(range(6), pa.int32())}), path, write_statistics=False)
    data = bytearray(path.read_bytes())
    places = thrift_row_counts(data)
    assert len(places) == 3
    data[places[place]] = 2 * stated  # zigzag
    path.write_bytes(data)
    with pytest.raises(DamagedInputError, match=rf"a.parquet cannot be read: .*\b{stated}\b"):
        values(path)


def test_parquet_counts_of_lists_nulls_and_structs(tmp_path):
    """A list has several values per row, a null and a struct's field one: these are no contradictions."""
    path = tmp_path / "a.parquet"
    rows = [{"l": [1, 2], "n": None, "s": {"a": 1}}, {"l": [], "n": 2, "s": {"a": None}}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert values(path) == rows


def test_arrays_behind_the_one_of_the_header(tmp_path):
    """Two arrays saved into one file: numpy reads the first, and the second would be lost."""
    with open(tmp_path / "a.npy", "wb") as file:
        np.save(file, np.zeros(3))
        np.save(file, np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", (tmp_path / "a.npy").read_bytes())
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DamagedInputError, match=r"goes on for 152 bytes behind the array"):
            values(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(tmp_path):
    """The second array of a name would hide the first."""
    np.save(tmp_path / "x.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for _ in range(2):
            archive.write(tmp_path / "x.npy", "x.npy")
    with pytest.raises(DamagedInputError, match="two of its arrays have the same name"):
        values(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_a_second_stream_that_is_damaged(tmp_path, suffix, compress):
    """Compressed files may be joined; damage at the start of the second is no end of the file."""
    path = tmp_path / f"a.txt{suffix}"
    first, second = compress(b"one\n"), compress(b"two\n")
    path.write_bytes(first + second)
    assert values(path) == ["one", "two"]
    path.write_bytes(first + bytes(8))  # padding, as tape drives and block devices leave it
    assert values(path) == ["one"]
    for damaged in (b"?" + second[1:], second[:3], second[:-2], b"text"):
        path.write_bytes(first + damaged)
        with pytest.raises(DamagedInputError, match="cannot be read"):
            values(path)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (b'1,a\n2,"b\n3,c\n4,d\n', 3),  # to the end of the file
        (b'1,a\n2,"b\n3,c\n4,"d"\n5,e\n', 3),  # to the next quote
        (b'1,"a""\n', 2),
        (b'1,a\n2,"' + b"b\n" * (9 << 20), 3),  # beyond the largest field
    ],
)
def test_a_quote_that_is_not_closed(tmp_path, rows, line):
    """The rows behind it cannot be told apart: the file is damaged, at the line where the quote opens."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"n,t\n" + rows)
    with pytest.raises(DamagedInputError, match=rf"a.csv cannot be read: a quote .* in line {line} "):
        values(path)


def test_line_ends_in_quotes_stay_as_they_are(tmp_path):
    """A quoted field's CRLF, CR and LF are part of it; a row is told by its first line."""
    path = tmp_path / "a.csv"
    path.write_bytes(b'n,t\r\n1,"a\r\nb\rc\nd"\r\n2,"x\r\ny",z\r\n3,"w"\r\n')
    records = list(open_inputs([str(path)], None, Selection()).read())
    assert [record.value for record in records] == [
        {"n": "1", "t": "a\r\nb\rc\nd"},
        None,
        {"n": "3", "t": "w"},
    ]
    assert records[1].where == f"{path}:5"
    assert "3 fields, in the lines 5 to 6, but the header has 2" in str(records[1].error)


def test_a_file_that_holds_other_rows_than_it_states(tmp_path):
    """Whatever format: the rows that were read are counted against the rows that were announced."""
    np.save(tmp_path / "a.npy", np.zeros(3))
    np.save(tmp_path / "b.npy", np.zeros(2))
    inputs = open_inputs([str(tmp_path / "a.npy"), str(tmp_path / "b.npy")], None, Selection())
    np.save(tmp_path / "a.npy", np.zeros(5))
    with pytest.raises(DamagedInputError, match=r"a.npy cannot be read: it states 3 rows, but has 5"):
        list(inputs.read(1))
