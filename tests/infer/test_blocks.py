"""How the outputs of batches become the rows of one block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdp.errors import JobError
from asyncdp.infer.blocks import BlockRows
from asyncdp.infer.records import Record, Records


def batch(positions):
    records = Records.of([Record(position, f"r{position}", None, "") for position in positions])
    column = np.array([[position, -position] for position in positions], dtype=np.int64)
    return records, {"x": column, "t": list(positions)}


@given(st.permutations(range(100, 130)), st.integers(1, 9), st.sets(st.integers(100, 129), max_size=29))
def test_rows_go_to_their_places(order, batch_size, refused):
    """Whatever order batches end in, rows are in input order, and refused records leave no gap."""
    rows = BlockRows(100)
    kept = [position for position in order if position not in refused]
    for start in range(0, len(kept), batch_size):
        rows.add(*batch(kept[start : start + batch_size]))
    ids, columns = rows.finish()
    assert ids == [f"r{position}" for position in sorted(kept)]
    np.testing.assert_array_equal(columns["x"], [[position, -position] for position in sorted(kept)])
    assert columns["t"] == sorted(kept)
    assert len(rows) == len(kept)


def test_rows_may_stay_as_they_come():
    """Without a first position the rows are those of the batches one after the other, however many."""
    rows = BlockRows()
    for start in (3000, 0, 1500):
        rows.add(*batch(list(range(start, start + 1500))))
    _, columns = rows.finish()
    assert columns["t"] == [*range(3000, 4500), *range(1500), *range(1500, 3000)]


@pytest.mark.parametrize(
    "columns", [{"x": np.zeros((1, 3), np.int64), "t": [1]}, {"x": np.zeros((1, 2)), "t": [1]}, {"t": [1]}]
)
def test_batches_must_have_one_schema(columns):
    """Another shape, type or name of a column is an error that names both."""
    rows = BlockRows(0)
    rows.add(*batch([0]))
    with pytest.raises(JobError, match=r"differ between batches: .*int64\[2\].*, then "):
        rows.add(batch([1])[0], columns)
