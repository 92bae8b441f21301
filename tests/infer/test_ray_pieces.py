"""Pieces of an input, read by themselves, are the input, and little is read that belongs to others."""

from __future__ import annotations

import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncdp.errors import DamagedInputError
from asyncdp.infer.readers import Selection, open_inputs
from asyncdp.infer.readers.pieces import Planner, Reading
from asyncdp.infer.readers.text import TextReader
from asyncdp.infer.where import Subset, Where


def cut(specs, size, selection=None, subset=None, wanted=lambda block: True, **options):
    """Return the planner of some files, its pieces by block, and how they are read."""
    selection = selection or Selection()
    inputs = open_inputs([str(spec) for spec in specs], None, selection, subset=subset, **options)
    planner = Planner(inputs, size, wanted)
    pieces = dict(planner.pieces())
    reading = Reading(inputs.format_name, selection, inputs.files[0].dialect, inputs.sample)
    return planner, pieces, reading


def whole(specs, selection=None, subset=None):
    """Return all records, and the number of their positions."""
    inputs = open_inputs([str(spec) for spec in specs], None, selection or Selection(), subset=subset)
    return list(inputs.read()), inputs.num_records_read


def check(specs, size, selection=None, subset=None):
    """Fail unless the pieces, sent to another machine, give the records of the whole."""
    planner, pieces, reading = cut(specs, size, selection, subset)
    expected, num_records = whole(specs, selection, subset)
    sent = pickle.loads(pickle.dumps((pieces, reading)))
    found = {block: list(piece.read(sent[1])) for block, piece in sent[0].items()}
    parts = [part for block in sorted(found) for part in found[block]]
    assert str([record for part in parts for record in part]) == str(expected)
    assert all(some[0].span.start == block * size for block, some in found.items())
    assert planner.num_records == num_records == sum(len(part.span) for part in parts)
    return pieces


TEXTS = {
    "lines.txt": b"one\r\n\n\ntwo\nthree",
    "marked.txt": b"\xef\xbb\xbffirst\nsecond\n",
    "empty.txt": b"",
    "bad.txt": b"good\n\xff\xfe bad\ngood\n",
}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_texts_are_cut_at_lines(tmp_path, size):
    """Lines of several files, blank ones and those of no encoding among them, are found by their places."""
    paths = []
    for name, text in TEXTS.items():
        (tmp_path / name).write_bytes(text)
        paths.append(tmp_path / name)
    pieces = check(paths, size)
    assert all(piece.records is None for piece in pieces.values())


FIELDS = st.text(st.sampled_from('ab",\n\r é'), max_size=4).filter(lambda text: "\r" not in text)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.tuples(FIELDS, FIELDS), max_size=7), min_size=1, max_size=3), st.integers(1, 5))
def test_tables_are_cut_between_rows(tmp_path, tables, size):
    """A row of CSV with line ends in quotes is one row, wherever a piece begins."""
    paths = []
    for index, rows in enumerate(tables):
        path = tmp_path / f"{index}.csv"
        quoted = [",".join('"' + field.replace('"', '""') + '"' for field in row) for row in rows]
        path.write_text("\n".join(["a,b", *quoted, ""]), newline="")
        paths.append(path)
    check(paths, size)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("size", [3, 7])
def test_objects_with_conditions_are_cut_as_they_are_read(tmp_path, suffix, size):
    """Samples, conditions and limits choose the same records; compressed files are read once, here."""
    paths = [tmp_path / f"{index}.{suffix}" for index in range(3)]
    for path in paths:
        rows = [{"x": index, "text": "t" * index} for index in range(10)]
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
        else:
            text = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
            path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    where = Where.of("x > 4")
    for selection, subset in [
        (Selection(("text",), keep=("x",)), Subset()),
        (Selection(("text",), where=where), Subset(where)),
        (Selection(("text",)), Subset(sample=0.5)),
        (Selection(("text",)), Subset(limit=17)),
        (Selection(("text",)), Subset(limit=14)),
    ]:
        pieces = check(paths, size, selection, subset)
        assert all((piece.records is not None) == suffix.endswith("gz") for piece in pieces.values())


def test_finished_files_are_not_read_again(tmp_path, monkeypatch):
    """A resumed job that knows the rows of a text goes over it without reading it."""
    paths = [tmp_path / f"{index}.txt" for index in range(3)]
    for path in paths:
        path.write_text("a\n" * 10)
    inputs = open_inputs(list(map(str, paths)), None, Selection())
    inputs.file_rows.update({0: 10, 1: 10})
    read, marks = [], TextReader.marks
    monkeypatch.setattr(TextReader, "marks", lambda *args: read.append(args[1].path) or marks(*args))
    found = dict(Planner(inputs, 4, lambda block: block >= 5).pieces())
    assert [(block, piece.first, piece.num_records) for block, piece in found.items()] == [
        (5, 20, 4),
        (6, 24, 4),
        (7, 28, 2),
    ]
    assert read == paths[2:]


def test_a_piece_of_a_file_that_was_cut_short_ends_the_job(tmp_path):
    """Fewer rows than were planned are damage, not the end."""
    path = tmp_path / "lines.txt"
    path.write_text("a\n" * 6)
    _, pieces, reading = cut([path], 4)
    path.write_text("a\n" * 5)
    assert [len(records) for records in pieces[0].read(reading)] == [4]
    with pytest.raises(DamagedInputError, match="had 6 rows, and now has 5"):
        list(pieces[1].read(reading))
