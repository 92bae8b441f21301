"""A resumed job begins where it has something to do, however much input lies before."""

from __future__ import annotations

import pyarrow.dataset
import pytest

from asyncdp.errors import RecordError
from asyncdp.infer.output.journal import load_journal
from asyncdp.infer.readers.text import JsonlReader


@pytest.fixture
def files(numbers, work):
    """Five files of ten records; the last but one has a record that `Picky` refuses."""
    (work / "in").mkdir()
    for index in range(5):
        numbers(14 if index == 3 else 10, name=f"in/{index}.jsonl")
    return work / "in"


def test_files_before_the_first_open_shard_are_not_read_again(run, files, work, monkeypatch):
    """Files that do not state their number of rows are counted once, and the journal knows it."""
    options = {"batch_size": 2, "shard_size": 4, "window": 4, "devices": "cpu"}
    with pytest.raises(RecordError, match="Record 43"):
        run(files, "models_for_tests:Picky", **options)
    known = load_journal(work / "out").file_rows
    assert known.items() <= {0: 10, 1: 10, 2: 10, 3: 14, 4: 10}.items()
    assert {0, 1} <= known.keys()
    opened = []
    rows = JsonlReader.rows

    def note(reader, file, *args):
        opened.append(file.path.name)
        return rows(reader, file, *args)

    monkeypatch.setattr(JsonlReader, "rows", note)
    summary = run(files, "models_for_tests:Picky", **options, resume=True, on_error="skip")
    assert opened[0] >= "2.jsonl"
    assert (summary.num_records, summary.num_bad) == (54, 1)
    ids = pyarrow.dataset.dataset(work / "out", format="parquet").to_table()["id"].to_pylist()
    assert sorted(ids) == [index for index in range(54) if index != 43]


def test_the_journal_forgets_no_count(run, files, work, monkeypatch):
    """A second resume knows what the first run counted, also where its shards are gone."""
    options = {"shard_size": 4, "window": 4, "batch_size": 4}
    run(files, **options)
    before = load_journal(work / "out").file_rows
    assert before.keys() >= {0, 1, 2, 3}
    (work / "out" / "part-000012.parquet").unlink()
    run(files, **options, resume=True)
    after = load_journal(work / "out").file_rows
    assert before.items() <= after.items()
