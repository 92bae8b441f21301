"""Text in other encodings, JSON that is none, and text that no file can hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from asyncdp.errors import DamagedInputError, InputError, JobUsageError, RecordError
from asyncdp.infer.readers import Dialect, Selection, open_inputs
from asyncdp.infer.report.monitor import Monitor

ECHO = {"model": "models_for_tests:Echo", "collate": "models_for_tests:records_of", "columns": ()}


def values(path, **dialect):
    inputs = open_inputs([str(path)], None, Selection(), dialect=Dialect(**dialect))
    return [record.value if record.error is None else record.error for record in inputs.read()]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_byte_order_marks_are_obeyed(tmp_path, encoding, suffix):
    """Whatever text format: the characters, line ends and positions are right."""
    texts = {"txt": "žluťoučký\r\n漢\n", "csv": 'a,b\r\n"ž\r\n",漢\r\n', "jsonl": '{"a": "ž漢"}\n[1]'}
    expected = {"txt": ["žluťoučký", "漢"], "csv": [{"a": "ž\r\n", "b": "漢"}], "jsonl": [{"a": "ž漢"}, [1]]}
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(texts[suffix].encode(encoding))
    assert values(path) == expected[suffix]


@pytest.mark.parametrize(
    "encoding", ["utf-16-le", "utf-16-be", "cp1252", "shift_jis", "gb18030", "cp037", "utf-7"]
)
def test_an_encoding_that_is_named(tmp_path, encoding):
    """Line ends in it may be other bytes than in ASCII, and there may be many lines."""
    text = "a b" if encoding == "cp037" else {"cp1252": "é"}.get(encoding, "表")
    (tmp_path / "a.txt").write_bytes((f"{text}\n" * 40_000).encode(encoding))
    assert values(tmp_path / "a.txt", encoding=encoding) == [text] * 40_000


def test_a_mark_within_the_file_is_text(tmp_path):
    """Only the first character of a file is a mark."""
    (tmp_path / "a.txt").write_text("a\n\ufeffb\n", encoding="utf-16")
    assert values(tmp_path / "a.txt") == ["a", "\ufeffb"]


def test_text_in_an_encoding_that_must_be_named(tmp_path):
    """It is refused at the start, not row by row or as characters that nobody wrote."""
    for name in ("a.txt", "a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes("ab,c\nd,e\n".encode("utf-16-le"))
        with pytest.raises(InputError, match=r"NULs in its first line\. Name its encoding, .*--encoding"):
            values(tmp_path / name)
    (tmp_path / "b.csv").write_bytes("Größe,b\n1,2\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"The header of .*b.csv is no UTF-8\. Name its encoding"):
        values(tmp_path / "b.csv")
    assert values(tmp_path / "b.csv", encoding="cp1252") == [{"Größe": "1", "b": "2"}]


def test_utf_16_that_is_cut(tmp_path):
    """A file that ends within a character is damaged."""
    (tmp_path / "a.txt").write_bytes("abc\n".encode("utf-16")[:-3] + b"\xd8")
    with pytest.raises(DamagedInputError, match=r"a.txt cannot be read: UnicodeDecodeError"):
        values(tmp_path / "a.txt")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_json(tmp_path, number):
    """Python reads and writes numbers that JSON does not have: only if that is wanted."""
    (tmp_path / "a.jsonl").write_text(f'{{"x": [{number}]}}\n{{"x": 1}}\n')
    first, second = values(tmp_path / "a.jsonl")
    assert f"{number} is no JSON: give --allow-nan" in str(first)
    assert second == {"x": 1}
    (value,) = values(tmp_path / "a.jsonl", allow_nan=True)[0]["x"]
    assert not math.isfinite(value)


def not_finite(output):
    return {
        "a": np.array([math.nan, math.inf], np.float32),
        "b": [[1.5, math.nan], {"c": np.float32("-inf")}],
    }


def test_json_output_is_json(run, work, monkeypatch):
    """NaN and infinity are null, at any depth."""
    import models_for_tests

    monkeypatch.setattr(models_for_tests, "not_finite", not_finite, raising=False)
    (work / "a.txt").write_text("a\nb\n")
    functions = {"postprocess": "models_for_tests:not_finite", "columns": ()}
    run(work / "a.txt", "models_for_tests:Lengths", output_format="jsonl", **functions)
    lines = (work / "out" / "part-000000.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"id": 0, "a": None, "b": [1.5, None]},
        {"id": 1, "a": None, "b": {"c": None}},
    ]


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_an_output_that_is_no_unicode(run, work, output_format):
    """Its record is refused by name, and with skip or record the job and its resume go on."""
    entries = [{"t": "a"}, {"t": "\ud800"}, {"t": "b"}]
    (work / "in.jsonl").write_text("".join(json.dumps({"record": entry}) + "\n" for entry in entries))
    with pytest.raises(RecordError, match=r"Record 1 .*column 't' of the output holds no valid Unicode"):
        run(work / "in.jsonl", output_format=output_format, **ECHO)
    summary = run(work / "in.jsonl", output_format=output_format, on_error="record", resume=True, **ECHO)
    assert (summary.num_records, summary.num_bad) == (3, 1)


def test_tables_of_other_dialects(run, work):
    """Delimiter and quote can be named; a header that looks as if it had another one is told."""
    path = work / "a.csv"
    path.write_text("t;n\n'a;b';1\n")
    assert values(path, delimiter=";", quote="'") == [{"t": "a;b", "n": "1"}]
    monitor = Monitor()
    run(path, "models_for_tests:Lengths", monitor, columns=("t;n",), on_error="skip")
    assert any("has one column 't;n': name what separates" in text for text in monitor.warnings)
    for options, match in (
        ({"delimiter": ";;"}, "--delimiter ';;' is no single character"),
        ({"quote": ""}, "--quote '' is no single character"),
        ({"encoding": "latin-99"}, "--encoding latin-99 is unknown"),
    ):
        with pytest.raises(JobUsageError, match=match):
            run(path, "models_for_tests:Lengths", output=work / "other", **options)
