from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from asyncdp.errors import DamagedInputError, InputError
from asyncdp.infer.readers import FORMATS, Selection, decode_image, open_inputs


def values(path, selection=Selection(), format_name=None, start=0):  # noqa: B008
    inputs = open_inputs([str(path)], format_name, selection)
    return [record.value for record in inputs.read(start)]


TEXT_FILES = {
    "rows.jsonl": b'{"a": 1, "b": "x"}\n{"a": 2, "b": "y"}\n',
    "rows.csv": b"a,b\n1,x\n2,y\n",
    "rows.tsv": b"a\tb\n1\tx\n2\ty\n",
    "rows.txt": b"x\ny\n",
}


@pytest.mark.parametrize("name", TEXT_FILES)
def test_text_formats_give_one_record_per_line(tmp_path, name):
    """Each text format yields its entries in order, with positions from 0."""
    (tmp_path / name).write_bytes(TEXT_FILES[name])
    selection = Selection() if name.endswith("txt") else Selection(("b",))
    records = list(open_inputs([str(tmp_path / name)], None, selection).read())
    assert [record.value for record in records] == ["x", "y"]
    assert [record.position for record in records] == [0, 1]


def test_whole_entries_without_a_column(tmp_path):
    """Without --column a record is the whole entry; with two, a dict of them."""
    (tmp_path / "rows.jsonl").write_bytes(TEXT_FILES["rows.jsonl"])
    assert values(tmp_path / "rows.jsonl") == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert values(tmp_path / "rows.jsonl", Selection(("b", "a")))[0] == {"b": "x", "a": 1}


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_text(tmp_path, suffix, compress):
    """Compressed text reads like plain text, and a cut file is an error, not an early end."""
    path = tmp_path / f"rows.txt{suffix}"
    plain = b"".join(b"line %d %s\n" % (index, bytes([index % 90 + 33])) for index in range(20_000))
    path.write_bytes(compress(plain))
    assert len(values(path)) == 20_000
    path.write_bytes(compress(plain)[:-20])
    with pytest.raises(DamagedInputError, match="cannot be read"):
        values(path)


def test_zstd_text(tmp_path):
    """Zstandard files are read too, and a cut one is an error."""
    path = tmp_path / "rows.txt.zst"
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
        stream.write(b"x\ny\n" * 50_000)
    assert values(path)[:2] == ["x", "y"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedInputError, match="cannot be read"):
        values(path)


def test_broken_lines_are_bad_records(tmp_path):
    """A line that cannot be parsed is one bad record; the lines around it are read."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\nnot json\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"a": 2}\n{"a": ')
    records = list(open_inputs([str(path)], None, Selection(("a",))).read())
    assert [record.value for record in records if record.error is None] == [1, 2]
    assert [record.position for record in records if record.error] == [1, 2, 3, 5]
    assert records[1].where.endswith("rows.jsonl:2")


def test_csv_rows_of_wrong_length_are_bad_records(tmp_path):
    """A row with a field too many is distinguished from the rest; quoted line ends belong to a field."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,"x\ny"\n1,2,3\n\xff,1\n5,6\n')
    records = list(open_inputs([str(path)], None, Selection()).read())
    assert records[0].value == {"a": "1", "b": "x\ny"}
    assert [record.error is None for record in records] == [True, False, False, True]


def test_missing_column_names_what_there_is(tmp_path):
    """A record without the wanted column says which columns it has."""
    (tmp_path / "rows.jsonl").write_bytes(TEXT_FILES["rows.jsonl"])
    (record, _) = open_inputs([str(tmp_path / "rows.jsonl")], None, Selection(("c",))).read()
    assert "there is no column 'c', only 'a', 'b'" in str(record.error)


def test_id_column(tmp_path):
    """Ids come from the id column as text; what is no id makes a bad record."""
    path = tmp_path / "rows.jsonl"
    entries = [{"k": 7, "v": 1}, {"k": "b", "v": 2}, {"k": None, "v": 3}, {"k": "\ud800", "v": 4}]
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    records = list(open_inputs([str(path)], None, Selection(("v",), "k")).read())
    assert [record.id for record in records if record.error is None] == ["7", "b"]
    assert [record.position for record in records if record.error] == [2, 3]


def test_parquet_by_row_group(tmp_path):
    """Parquet gives rows in order, skips row groups before the start, and knows its length."""
    path = tmp_path / "rows.parquet"
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(range(200), pa.float32()), 2)
    pq.write_table(pa.table({"n": range(100), "v": vectors}), path, row_group_size=10)
    assert values(path, Selection(("n",)), start=57) == list(range(57, 100))
    assert open_inputs([str(path)], None, Selection()).estimate_num_records() == 100
    np.testing.assert_array_equal(values(path, Selection(("v",)))[3], [6, 7])
    with pytest.raises(InputError, match="no column 'w'"):
        values(path, Selection(("w",)))


def test_parquet_values_that_python_cannot_hold(tmp_path):
    """Text that is no UTF-8 is a bad record, by column and row; a time beyond microseconds is NumPy's."""
    path = tmp_path / "rows.parquet"
    texts = pa.array([b"ok", b"\xff\xfe", b"ok"]).view(pa.string())
    times = pa.array([0, 0, 10**18 + 1], pa.timestamp("ns"))
    pq.write_table(pa.table({"t": texts, "w": times}), path)
    records = list(open_inputs([str(path)], None, Selection()).read())
    assert [record.error is None for record in records] == [True, False, True]
    assert str(records[1].error).startswith("column 't' cannot be read: UnicodeDecodeError: ")
    assert records[1].where == f"{path} row 1"
    assert records[2].value["w"] == np.datetime64(10**18 + 1, "ns")


def test_parquet_with_a_broken_column_name(tmp_path):
    """A schema that cannot be decoded is a damaged file."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"name": [1, 2]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"name", b"n\xff\xfee"))
    with pytest.raises(DamagedInputError, match=r"rows.parquet cannot be read: UnicodeDecodeError"):
        values(path)


@pytest.mark.parametrize("name", ["rows.npz", "rows.safetensors"])
def test_ids_of_several_numbers_are_refused(tmp_path, name):
    """An id column with a whole array per row makes bad records, not an error in asyncdp."""
    columns = {"x": np.zeros((2, 3)), "k": np.zeros((2, 2), np.int64), "i": np.arange(2)}
    np.savez(tmp_path / "rows.npz", **columns)
    safetensors.numpy.save_file(columns, tmp_path / "rows.safetensors")
    records = list(open_inputs([str(tmp_path / name)], None, Selection(("x",), "k")).read())
    assert ["the id must be text or an integer" in str(record.error) for record in records] == [True, True]
    records = list(open_inputs([str(tmp_path / name)], None, Selection(("x",), "i")).read())
    assert [record.id for record in records] == ["0", "1"]


def test_paths_that_are_no_text(tmp_path):
    """An image whose name is no valid Unicode is read, but its path is no id."""
    path = tmp_path / os.fsdecode(b"\xff.png")
    Image.new("RGB", (1, 1)).save(path)
    (record,) = open_inputs([str(path)], None, Selection()).read()
    assert record.value == path
    (record,) = open_inputs([str(path)], None, Selection((), "path")).read()
    assert "is not valid Unicode text" in str(record.error)


def test_arrays(tmp_path):
    """npy, npz and safetensors give row i of each array; several arrays make dicts."""
    array = np.arange(1200, dtype=np.float32).reshape(600, 2)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "b.npz", x=array, y=array[:, 0])
    safetensors.numpy.save_file({"x": array}, tmp_path / "c.safetensors")
    np.testing.assert_array_equal(values(tmp_path / "a.npy", start=599)[0], array[599])
    np.testing.assert_array_equal(values(tmp_path / "b.npz")[5]["x"], array[5])
    assert [float(v) for v in values(tmp_path / "b.npz", Selection(("y",)))[:3]] == [0, 2, 4]
    np.testing.assert_array_equal(values(tmp_path / "c.safetensors")[300], array[300])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_as_it_goes(tmp_path, save):
    """Neither the arrays that were not asked for nor the rows of a wanted one are in memory all at once."""
    unwanted = np.zeros((4000, 500), np.float32)
    save(tmp_path / "a.npz", x=np.arange(500_000.0).reshape(4000, 125), unwanted=unwanted)
    tracemalloc.start()
    try:
        for record in open_inputs([str(tmp_path / "a.npz")], None, Selection(("x",))).read(1):
            assert record.value[1] == record.position * 125 + 1
        assert record.position == 3999
        assert tracemalloc.get_traced_memory()[1] < 2e6  # the arrays have 4 and 8 MB, a chunk 0.25 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_every_layout(tmp_path, save):
    """Arrays stored by columns, empty ones, texts and structures give the rows that numpy gives."""
    arrays = {
        "columns": np.asfortranarray(np.arange(3000.0).reshape(600, 5)),
        "narrow": np.zeros((600, 0)),
        "texts": np.array([f"t{index}" for index in range(600)]),
        "pairs": np.array([(index, 0.5) for index in range(600)], dtype=[("a", "i4"), ("b", "f8")]),
        "cubes": np.arange(2400).reshape(600, 2, 2),
    }
    save(tmp_path / "a.npz", **arrays)
    for start in (0, 399):
        read = values(tmp_path / "a.npz", start=start)
        for name, array in arrays.items():
            np.testing.assert_array_equal([value[name] for value in read], array[start:])
    assert values(tmp_path / "a.npz")[0]["cubes"].flags.writeable


def test_npz_damaged_in_the_middle(tmp_path):
    """Damage behind the first rows is reported when reading gets there, and not as an error of zipfile."""
    np.savez(tmp_path / "a.npz", x=np.zeros((2000, 100)))
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[1_000_000] ^= 1
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(DamagedInputError, match=r"a.npz cannot be read: BadZipFile: Bad CRC-32"):
        values(tmp_path / "a.npz")


def test_arrays_of_different_length_are_refused(tmp_path):
    """Rows of arrays that differ in length cannot be matched, so nothing is read."""
    np.savez(tmp_path / "b.npz", x=np.zeros(3), y=np.zeros(4))
    with pytest.raises(InputError, match=r"the same first dimension.*Name those that belong together"):
        values(tmp_path / "b.npz")
    assert values(tmp_path / "b.npz", Selection(("y",))) == [0, 0, 0, 0]


def test_pickled_arrays_are_refused(tmp_path):
    """An .npy or .npz of objects, which is a pickle, is not loaded."""
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "b.npz", x=np.array([{"a": 1}], dtype=object))
    for name in ("a.npy", "b.npz"):
        with pytest.raises(InputError, match=r"holds Python objects, which are never loaded\. Save numbers"):
            values(tmp_path / name)


def test_image_folder(tmp_path):
    """A folder of images is read in the order of names, and decodes to RGB."""
    for name, colour in (("b.png", "red"), ("a.jpg", "blue")):
        Image.new("RGB", (4, 3), colour).save(tmp_path / name)
    paths = values(tmp_path)
    assert [path.name for path in paths] == ["a.jpg", "b.png"]
    assert decode_image(paths[1]).getpixel((0, 0)) == (255, 0, 0)


def test_several_files_and_patterns(tmp_path):
    """Patterns expand in the order of names, and positions run on over files."""
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    records = list(open_inputs([str(tmp_path / "*.txt")], None, Selection()).read(1))
    assert [(record.position, record.value) for record in records] == [(1, "a2"), (2, "b1"), (3, "b2")]


def test_inputs_that_cannot_be_read_say_why(tmp_path):
    """A missing file, an unknown format and mixed formats are distinguished."""
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text("{}")
    (tmp_path / "c.what").write_text("x")
    for specs, match in [
        (["nothing.txt"], "no input at nothing.txt"),
        ([str(tmp_path / "c.what")], "format of .* is unknown"),
        ([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], "several formats"),
        (["-"], "format of standard input is unknown"),
    ]:
        with pytest.raises(InputError, match=match):
            open_inputs(specs, None, Selection())


@pytest.mark.parametrize(
    ("name", "selection", "columns"),
    [
        ("rows.csv", Selection(("a", "c")), "'a', 'b'"),
        ("rows.csv", Selection(("a",), "c"), "'a', 'b'"),
        ("rows.tsv", Selection(("c",)), "'a', 'b'"),
        ("rows.txt", Selection(("c",)), "none: leave --column"),
        ("rows.npz", Selection(("c",)), "'a'"),
        ("rows.png", Selection((), "c"), "'path'"),
    ],
)
def test_a_column_that_no_row_has_is_reported_at_once(tmp_path, name, selection, columns):
    """Where header or schema name the columns, a wrong name fails before anything is read."""
    np.savez(tmp_path / "rows.npz", a=np.zeros(2))
    (tmp_path / "rows.png").touch()
    for text, data in TEXT_FILES.items():
        (tmp_path / text).write_bytes(data)
    with pytest.raises(InputError, match=f"rows.* has no column 'c'. Its columns are {columns}"):
        open_inputs([str(tmp_path / name)], None, selection)


def test_an_empty_table_among_others_misses_nothing(tmp_path):
    """A CSV file without even a header holds no record, and no wrong column."""
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("a\n1\n")
    inputs = open_inputs([str(tmp_path)], None, Selection(("a",)))
    assert [record.value for record in inputs.read()] == ["1"]
    (tmp_path / "c.csv").write_text("a,a\n1,2\n")
    with pytest.raises(InputError, match=r"c.csv has two columns 'a'\. Rename one"):
        open_inputs([str(tmp_path)], None, Selection(("a",)))


BINARY = ["parquet", "npy", "npz", "safetensors"]


@pytest.mark.parametrize("format_name", BINARY)
def test_half_written_binary_files(tmp_path, format_name):
    """A binary file that lost its end, or holds nothing, is an error that names it."""
    path = tmp_path / f"rows.{format_name}"
    array = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    if format_name == "parquet":
        pq.write_table(pa.table({"x": array[:, 0]}), path)
    elif format_name == "npy":
        np.save(path, array)
    elif format_name == "npz":
        np.savez(path, x=array)
    else:
        safetensors.numpy.save_file({"x": array}, path)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"\0" * 100):
        path.write_bytes(part)
        with pytest.raises(DamagedInputError, match=rf"rows.{format_name} cannot be read"):
            values(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=300),
        st.text(st.sampled_from('{}[]",:\n\r\t0aé\ud800\x00'), max_size=200).map(
            lambda text: text.encode(errors="surrogatepass")
        ),
    ),
    head=st.sampled_from(
        [b"", b"PAR1", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x10\0\0\0\0\0\0\0{", b"a,b\n"]
    ),
    format_name=st.sampled_from([name for name in FORMATS if name != "images"]),
    column=st.sampled_from([(), ("a",)]),
)
def test_no_bytes_break_a_reader(tmp_path, data, head, format_name, column):
    """Whatever a file holds, a reader gives records, bad records, or an error that names the file."""
    path = tmp_path / "any"
    path.write_bytes(head + data)
    try:
        for record in open_inputs([str(path)], format_name, Selection(column)).read():
            assert record.error is None or isinstance(record.error, Exception)
    except (DamagedInputError, InputError) as error:
        text = str(error)
        assert "any" in text


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), bits=st.integers(1, 255), format_name=st.sampled_from(BINARY))
def test_a_flipped_byte_never_breaks_a_reader(tmp_path, position, bits, format_name):
    """A damaged binary file gives records or a DamagedInputError, never another exception."""
    path = tmp_path / f"rows.{format_name}"
    array = np.arange(64, dtype=np.float32).reshape(16, 4)
    if format_name == "parquet":
        pq.write_table(pa.table({"x": array[:, 0], "t": ["text"] * 16}), path)
    elif format_name == "npy":
        np.save(path, array)
    elif format_name == "npz":
        np.savez_compressed(path, x=array)
    else:
        safetensors.numpy.save_file({"x": array}, path)
    damaged = bytearray(path.read_bytes())
    damaged[position % len(damaged)] ^= bits
    path.write_bytes(damaged)
    try:
        assert len(values(path)) >= 0
    except DamagedInputError as error:
        text = str(error)
        assert "rows" in text
