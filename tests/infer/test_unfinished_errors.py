"""A job that gives up after too many bad records stores all of them for inspection."""

from __future__ import annotations

import json
import threading

import anyio
import pytest
from fake_engine import FakeEngine, options
from models_for_tests import Lengths

from asyncdp.errors import TooManyBadRecordsError
from asyncdp.infer import pipeline as pipeline_module
from asyncdp.infer.batching import Window
from asyncdp.infer.pipeline import Pipeline
from asyncdp.infer.records import Record, Records
from asyncdp.infer.report.monitor import Monitor
from asyncdp.infer.steps import EachValue, Steps, default_collate, length_of, same


def test_the_records_of_an_unfinished_block_are_stored(run, work, numbers):
    """They are in a file of their own until a resume stores them with their block."""
    path, left = numbers(20, bad=[3, 4, 17]), work / "out" / "_errors-unfinished.jsonl"
    with pytest.raises(TooManyBadRecordsError, match=r"3 records .* in _errors-\*\.jsonl"):
        run(path, on_error="record", max_errors=2, shard_size=10)
    texts = [file.read_text() for file in left.parent.glob("_errors-*")]
    stored = [json.loads(line) for text in texts for line in text.splitlines()]
    assert sorted(entry["position"] for entry in stored) == [3, 4, 17]
    assert all("JSONDecodeError" in entry["traceback"] for entry in stored)
    assert left.exists()
    run(path, on_error="record", max_errors=3, shard_size=10, resume=True)
    assert sorted(file.name for file in left.parent.glob("_errors-*")) == [
        "_errors-000000.jsonl",
        "_errors-000001.jsonl",
    ]


def test_records_that_are_skipped_leave_no_file(run, work, numbers):
    """Records are stored only with --on-error record."""
    with pytest.raises(TooManyBadRecordsError):
        run(numbers(5, bad=[3]), on_error="skip", max_errors=0)
    assert not list((work / "out").glob("_errors-*"))


def test_a_block_that_waits_for_the_writer_is_not_forgotten(anyio_backend, monkeypatch):
    """Its bad records are stored too, though no stage has it when the job gives up."""
    given_up, written = threading.Event(), []

    class GivenUp(TooManyBadRecordsError):
        def __init__(self, *args):
            super().__init__(*args)
            given_up.set()

    def write(index, num_records, rows, failures):
        given_up.wait(10)
        written.extend(failure.position for failure in failures)

    monkeypatch.setattr(pipeline_module, "TooManyBadRecordsError", GivenUp)
    broken = ValueError("broken")
    records = [Record(position, position, "x", "here", broken if position else None) for position in range(5)]
    windows = (Window(record.position, Records.of([record]), 1) for record in records)
    steps = Steps(EachValue(same), default_collate, same, length_of)
    chosen = options(batch_size=1, shard_size=1, workers=5, on_error="record", max_errors=3)
    pipeline = Pipeline(FakeEngine(Lengths(), num_lanes=1), steps, chosen, write, Monitor())
    with pytest.raises(TooManyBadRecordsError):
        anyio.run(pipeline.run, windows, backend=anyio_backend)
    assert sorted({*written, *(failure.position for failure in pipeline.failures_left())}) == [1, 2, 3, 4]
