"""The quick ways of reading, batching and stacking give exactly what the careful ones give."""

from __future__ import annotations

import importlib.util
import io
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from asyncdp.infer.batching import plan_batches
from asyncdp.infer.dtypes import InputDtypes
from asyncdp.infer.readers import Dialect, Selection, open_inputs

LINES = [
    *('{"x": 18446744073709551615}', '{"x": 18446744073709551616}', '{"x": -9223372036854775809}'),
    *('{"x": 9007199254740993.0}', '{"x": 0.1234567890123456789012345}', '{"x": -0}', '{"x": 1e400}'),
    *('{"x": "\\ud800"}', '{"x": "\\ud83d\\ude00 é"}', '{"x": 1, "x": 2}', '{"x": NaN}', '{"x": 1} 2'),
    *("", " \t", "[1]", "3", '{"y": 1}', '{"x": 1, "id": null}', '{"x": 1, "id": "é"}', '{"id": 7, "x": []}'),
    *('{"x": 1, "id": true}', '{"x": 1, "id": "\\ud800"}', '{"x": 01}', '{"x": ' + "[" * 2000, "\ufeff{}"),
]


def read(path, selection, *, allow_nan):
    inputs = open_inputs([str(path)], None, selection, dialect=Dialect(allow_nan=allow_nan))
    return [
        (record.position, record.id, repr(record.value), record.where, repr(record.error), record.kept)
        for record in inputs.read()
    ]


@pytest.mark.parametrize("allow_nan", [False, True])
@pytest.mark.parametrize("selection", [Selection(), Selection(("x",)), Selection(("x",), "id")])
def test_orjson_changes_nothing_but_the_time(tmp_path, monkeypatch, selection, allow_nan):
    """Values, refusals and their words are the same where it is not installed."""
    path = tmp_path / "in.jsonl"
    path.write_bytes("\n".join(LINES).encode() + b'\n{"x": "\xff"}\n')
    quick = read(path, selection, allow_nan=allow_nan)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quick == read(path, selection, allow_nan=allow_nan)


def test_lines_are_parsed_each_for_itself(tmp_path):
    """Lines that only together would be JSON are bad records, whatever stands beside them."""
    path = tmp_path / "in.jsonl"
    path.write_text('[1\n2]\n3\n{"x": 4\n}\n')
    found = list(open_inputs([str(path)], None, Selection()).read())
    assert [record.value for record in found if record.error is None] == [3]
    assert [record.where for record in found] == [f"{path}:{line}" for line in range(1, 6)]


@pytest.mark.parametrize("selection", [Selection(), Selection(("x",)), Selection(("x",), "id", ("kept",))])
def test_a_line_that_is_refused_changes_nothing_of_the_others(tmp_path, selection):
    """Values, ids, places and what is kept are those of a file whose lines are all well, over many blocks."""
    good = [f'{{"x": [{n}, 0.5], "id": {n}, "kept": "k{n}"}}' for n in range(6000)]
    bad = {17: "{", 3000: '{"x": 18446744073709551616', 5999: "[1"}
    paths = [tmp_path / "good.jsonl", tmp_path / "bad.jsonl"]
    paths[0].write_text("\n".join(good))
    paths[1].write_text("\n".join(bad.get(n, line) for n, line in enumerate(good)))
    wanted, found = (
        [each[:3] + each[4:] for each in read(path, selection, allow_nan=False)] for path in paths
    )
    assert [n for n, each in enumerate(found) if each[3] != "None"] == list(bad)
    assert [each for n, each in enumerate(found) if n not in bad] == [
        each for n, each in enumerate(wanted) if n not in bad
    ]


def test_lines_of_a_pipe_are_given_as_they_come(monkeypatch):
    """Records are there although their writer has written less than a block, and writes no more."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as pipe:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))
        pipe.write(b'{"x": 1}\n{"x": 2}\n{"x"')
        records = iter(open_inputs(["-"], "jsonl", Selection(("x",))).read())
        assert [next(records).value, next(records).value] == [1, 2]
        pipe.write(b": 3}\n")
        assert next(records).value == 3
        pipe.close()
        assert list(records) == []


@pytest.mark.parametrize("max_cost", [None, 1, 3, 8, 9])
def test_items_of_one_length_are_cut_as_any_others(max_cost):
    """A shorter item at the end lets the others take the way through sorting."""
    alike = list(map(list, plan_batches([4] * 10, 4, max_cost)))
    unlike = plan_batches([4] * 10 + [1], 4, max_cost)
    assert alike == [batch for batch in ([i for i in batch if i < 10] for batch in unlike) if batch]
    assert list(map(list, plan_batches([0, 0], 4, 8))) == [[0, 1]]


NUMBERS = st.one_of(
    st.integers(-5, 5),
    st.integers(2**24 - 1, 2**24 + 2),
    st.integers(2**53, 2**53 + 2),
    st.integers(2**63 - 1, 2**64),
    st.sampled_from([0.5, 1e300, -2.0, math.inf, 2.0**24]),
    st.booleans(),
)
ITEMS = st.one_of(
    st.lists(NUMBERS, min_size=1, max_size=4),
    st.lists(st.lists(NUMBERS, min_size=1, max_size=2), min_size=1, max_size=4),
    st.lists(st.lists(st.sampled_from([0.5, 1.5]), min_size=2, max_size=2), min_size=1, max_size=4),
)
DTYPES = st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32])


def outcome(function):
    try:
        tensor = function()
        return "not alike" if tensor is None else (str(tensor.dtype), tensor.tolist())
    except (ValueError, RuntimeError, TypeError, OverflowError):
        return "refused"


@given(items=ITEMS, given_dtype=DTYPES, of_model=DTYPES)
@example(items=[2**53 + 1, 0.5], given_dtype=None, of_model=torch.float64)
@example(items=[2**24 + 1, 0.5], given_dtype=None, of_model=torch.float32)
def test_stacking_at_once_gives_what_stacking_one_by_one_gives(items, given_dtype, of_model):
    """The same values, dtypes and refusals, whatever numbers are side by side."""
    dtypes = InputDtypes(
        {} if given_dtype is None else {"": given_dtype}, {} if of_model is None else {"": of_model}
    )

    def one_by_one():
        tensors = [dtypes.tensor(item) for item in items]
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ValueError("they differ in dtype")
        return torch.stack(tensors)

    at_once = outcome(lambda: dtypes.stacked(items))
    assert at_once in ("not alike", outcome(one_by_one))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8, bool])
@pytest.mark.parametrize("of_model", [torch.float32, torch.int64, None])
def test_arrays_are_stacked_at_once(dtype, of_model):
    """As one by one, and without a word on arrays that may not be written."""
    items = [np.arange(3).astype(dtype) for _ in range(2)]
    for item in items:
        item.flags.writeable = False
    dtypes = InputDtypes({}, {} if of_model is None else {"": of_model})
    together = dtypes.stacked(items)
    apart = torch.stack([dtypes.tensor(item.copy()) for item in items])
    assert (together.dtype, together.tolist()) == (apart.dtype, apart.tolist())
    assert dtypes.stacked([items[0], items[0][:2]]) is None
