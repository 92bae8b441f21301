"""The class for Ray Data, called as Ray calls it: columns in and out by name, bad rows by policy."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch

pytest.importorskip("ray.data")

import pandas
import pyarrow
from ray.data.block import BlockAccessor

from asyncdp.errors import InputError, JobError, JobUsageError, RecordError
from asyncdp.ray import map_batches_class

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


class Positive(torch.nn.Module):
    """x [batch, 3] -> the sum of each row; refuses a batch with a negative number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sums [batch]."""
        if bool((x < 0).any()):
            raise ValueError("negative")
        return x.sum(1)


def rows(bad: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return four rows, of which some are refused, as Ray hands them over: not to be written to."""
    x = np.arange(12.0).reshape(4, 3)
    x[list(bad)] = -1
    x.setflags(write=False)
    return {"name": np.array(["a", "b", "c", "d"], dtype=object), "x": x}


def call(batch: Any, model: Any = Positive, **options: Any) -> Any:
    """Make the class and call an object of it."""
    return anyio.run(map_batches_class(model, columns="x", devices="cpu*2", **options)(), batch)


@pytest.mark.parametrize("kind", [dict, pyarrow.Table, pandas.DataFrame])
def test_outputs_stand_beside_the_columns_of_any_format(kind: type) -> None:
    """A batch of each format comes back in that format, its columns as they were, with the model's output."""
    batch: Any = rows()
    if kind is pyarrow.Table:
        batch = BlockAccessor.batch_to_arrow_block(batch)
    elif kind is pandas.DataFrame:
        batch = BlockAccessor.batch_to_pandas_block(batch)
        batch.index = [7, 7, 8, 9]  # of no meaning
    result = call(batch, rename={"output": "sum"})
    assert isinstance(result, kind)
    columns = result if kind is dict else BlockAccessor.for_block(result).to_numpy(["name", "x", "sum"])
    assert list(columns) == ["name", "x", "sum"]
    assert list(columns["name"]) == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(columns["x"], rows()["x"])
    np.testing.assert_array_equal(columns["sum"], [3, 12, 21, 30])


def test_several_columns_are_arguments_by_name() -> None:
    """Without a choice of columns the model gets the only one, or all of them by their names."""

    class Difference(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x - y

    both = anyio.run(map_batches_class(Difference)(), {"y": np.array([1.0, 2.0]), "x": np.array([5.0, 5.0])})
    assert both["output"].tolist() == [4, 3]
    one = anyio.run(map_batches_class(torch.nn.ReLU)(), {"y": np.array([[1.0], [-2.0]])})
    assert one["output"].tolist() == [[1], [0]]


def test_a_bad_row_raises_skips_or_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """By the policy a refused row ends the batch with its name, is left out with a warning, or says why."""
    batch = rows(bad=(2,))
    with pytest.raises(RecordError, match=r"row 2 of its batch, \{'name': 'c', .*ValueError: negative"):
        call(batch)
    with caplog.at_level(logging.WARNING, "asyncdp"):
        left = call(batch, on_error="skip")
    assert list(left["name"]) == ["a", "b", "d"]
    assert left["output"].tolist() == [3, 12, 30]
    assert "1 of 4 rows are left out, row 2 with ValueError: negative" in caplog.text
    kept = call(batch, on_error="record")
    assert list(kept["error"]) == ["", "", "ValueError: negative", ""]
    np.testing.assert_array_equal(kept["output"], [3, 12, np.nan, 30])


def test_batches_without_good_rows_have_the_columns_of_those_before() -> None:
    """The columns of a data set do not depend on which rows were bad; a batch of no rows stays as it is."""
    model = map_batches_class(Positive, columns="x", on_error="record", devices="cpu")()
    first, second, third = (anyio.run(model, rows(bad)) for bad in ((), (0, 1, 2, 3), ()))
    assert list(first) == list(second) == list(third)
    assert first["output"].dtype == second["output"].dtype
    assert all(second["error"])
    empty = {"x": np.zeros((0, 3))}
    assert anyio.run(model, empty) is empty


def test_columns_that_do_not_fit_are_refused_by_name() -> None:
    """A column that is missing, or would be there twice, and outputs that are no rows are errors."""
    with pytest.raises(InputError, match=r"no column 'x'\. They have 'y'"):
        call({"y": np.ones(3)})
    with pytest.raises(InputError, match=r"no column 'z'.* see keep="):
        call(rows(), keep=["z"])
    with pytest.raises(JobUsageError, match="two columns 'name'"):
        call(rows(), rename={"output": "name"})
    with pytest.raises(JobError, match="'output' has 3 rows for 4 records"):
        call(rows(), model="models_for_tests:Ragged", batch_size=4)


def test_mistakes_are_told_before_anything_is_sent() -> None:
    """Options that are unknown or of no use, and models that cannot be sent, fail where the class is made."""
    for options, words in (
        ({"colums": "x"}, "There is no option colums"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"on_error": "ignore"}, "--on-error ignore is unknown"),
        ({"dtype": "float16"}, "for models that are named"),
    ):
        with pytest.raises(JobUsageError, match=words):
            map_batches_class(Positive, **options)
    with pytest.raises(JobUsageError, match="no model"):
        map_batches_class(3)  # type: ignore[arg-type]
    module = Positive()
    module.lock = threading.Lock()
    with pytest.raises(JobUsageError, match=r"cannot be sent to Ray's workers: TypeError: cannot pickle"):
        map_batches_class(module)


def test_texts_go_through_the_folder_of_an_encoder(encoder_folder: Path) -> None:
    """The folder of a model takes texts and gives the vectors that a job gives, whatever the batches."""
    model = map_batches_class(str(encoder_folder), task="embed", columns="text", keep=(), devices="cpu*2")
    texts = np.array(["one", "two three four", "four one", "three"] * 3, dtype=object)
    vectors = anyio.run(model(), {"text": texts})["embedding"]
    alone = [anyio.run(model(), {"text": texts[place : place + 1]})["embedding"][0] for place in range(4)]
    assert vectors.shape == (12, 8)
    np.testing.assert_allclose(vectors, np.stack(alone * 3), atol=1e-6)
