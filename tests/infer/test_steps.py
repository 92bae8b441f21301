"""From values to model arguments, and from outputs to columns."""

from __future__ import annotations

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from asyncdp.errors import JobError
from asyncdp.infer.model.models import InferenceModule
from asyncdp.infer.steps import arguments_of, default_collate, length_of, to_columns

Pair = namedtuple("Pair", "mean spread")


def test_collate_makes_float32_and_int64():
    """Numbers of JSON become tensors of torch's default types, double arrays too."""
    assert default_collate([1.5, 2.5]).dtype == torch.float32
    assert default_collate([1, 2]).dtype == torch.int64
    assert default_collate([[1.0], [2.0]]).shape == (2, 1)
    assert default_collate([np.zeros(3), np.ones(3)]).dtype == torch.float32


def test_a_chosen_dtype_stays():
    """A tensor keeps its dtype, doubles too; of other numbers only doubles change theirs."""
    assert default_collate([torch.zeros(3, dtype=torch.float64)]).dtype == torch.float64
    assert default_collate([torch.zeros(3, dtype=torch.float16)]).dtype == torch.float16
    assert default_collate([np.zeros(3, np.int8)]).dtype == torch.int8
    assert default_collate([np.float64(1.5)]).dtype == torch.float32


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(True, torch.bool), (1, torch.int64), (1.5, torch.float32), (1j, torch.complex64)],
)
def test_numbers_of_python_get_the_default_dtypes(number, dtype):
    """A number becomes what torch.tensor makes of it, whatever the rest of its batch is."""
    assert default_collate([number]).dtype == torch.tensor(number).dtype == dtype


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"a": 1}, ((), {"a": 1})),
        (UserDict(a=1), ((), {"a": 1})),
        ((1, 2), ((1, 2), {})),
        (Pair(1, 2), ((Pair(1, 2),), {})),
        ([1, 2], (([1, 2],), {})),
        (1, ((1,), {})),
    ],
)
def test_a_batch_as_arguments(batch, expected):
    """A mapping is keyword arguments, a tuple positional ones, anything else the only argument.

    A tokenizer returns a mapping of its own class; a named tuple is one structure, as for `engine.map`.
    """
    assert arguments_of(batch) == expected


def test_collate_of_dicts_and_texts():
    """Dicts become keyword arguments, texts one list."""
    assert default_collate([{"a": 1.0, "b": 2}, {"a": 3.0, "b": 4}])["b"].tolist() == [2, 4]
    assert default_collate(["x", "y"]) == (["x", "y"],)


@pytest.mark.parametrize("items", [[[1.0], [1.0, 2.0]], [[1.0, "x"]], [None]])
def test_what_does_not_stack(items):
    """Items of different shape, or that are no numbers, are a ValueError that says so."""
    with pytest.raises(ValueError, match="do not stack"):
        default_collate(items)


@pytest.mark.parametrize(
    ("item", "length"),
    [
        ("four", 4),
        ([1, 2], 2),
        (torch.zeros(5, 2), 5),
        (torch.zeros(()), 1),
        (3.0, 1),
        ({"a": [1], "b": "xyz"}, 3),
    ],
)
def test_lengths(item, length):
    """The length of an item is what padding would grow with."""
    assert length_of(item) == length


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (torch.zeros(2, 3), ["output"]),
        ({"a": torch.zeros(2), "b": np.zeros(2)}, ["a", "b"]),
        (Pair(torch.zeros(2), torch.zeros(2)), ["mean", "spread"]),
        ((torch.zeros(2), torch.zeros(2)), ["output_0", "output_1"]),
        ([{"label": "x"}, {"label": "y"}], ["label"]),
        (["x", "y"], ["output"]),
    ],
)
def test_columns_of_every_kind_of_output(output, names):
    """Tensors, mappings, tuples and lists all become columns with a row per record."""
    columns = to_columns(output, 2)
    assert list(columns) == names
    assert all(len(values) == 2 for values in columns.values())


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (torch.zeros(3), "has 3 rows for 2 records"),
        (torch.zeros(()), "has no rows"),
        ({"id": torch.zeros(2)}, "named 'id'"),
        ({}, "gives no output"),
    ],
)
def test_outputs_that_are_no_columns(output, match):
    """What cannot be written as rows is an error before anything is written."""
    with pytest.raises(JobError, match=match):
        to_columns(output, 2)


def test_inputs_are_cast_wherever_they_are():
    """With a dtype, floating-point tensors in lists, tuples and dicts are cast, and integers are not."""

    class Teller(nn.Module):
        def forward(self, x, pair, named):
            return [tensor.dtype for tensor in (x, pair[0], named["a"])]

    module = InferenceModule(Teller(), torch.bfloat16, None, False)
    floats = torch.zeros(2)
    assert module(floats, (torch.zeros(2, dtype=torch.int64),), named={"a": floats}) == [
        torch.bfloat16,
        torch.int64,
        torch.bfloat16,
    ]
