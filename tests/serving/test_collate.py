"""Collating and splitting by default."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncdp._serving.collate import Stack, unbind
from asyncdp.errors import CollateError, SplitError


def test_stack_keeps_structure() -> None:
    """Tensors and numbers are stacked leaf by leaf, whatever they are nested in."""
    batch = Stack()([{"x": torch.tensor([1.0]), "n": (1, True)}, {"x": torch.tensor([2.0]), "n": (2, False)}])
    assert torch.equal(batch["x"], torch.tensor([[1.0], [2.0]]))
    assert torch.equal(batch["n"][0], torch.tensor([1, 2]))
    assert torch.equal(batch["n"][1], torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("sample", "dtype"),
    [
        (1.5, torch.get_default_dtype()),
        (2, torch.int64),
        (True, torch.bool),
        (torch.zeros(2, dtype=torch.float64), torch.float64),
        (np.zeros(2), torch.float64),
        (np.zeros(2, dtype=np.int16), torch.int16),
        (np.float64(1.5), torch.float64),
        (np.bool_(True), torch.bool),
    ],
)
def test_dtypes_are_kept(sample: object, dtype: torch.dtype) -> None:
    """Tensors and NumPy values keep their dtype, and Python's numbers get those of torch."""
    batch = Stack()([sample, sample])
    assert batch.dtype is dtype
    assert batch.shape[0] == 2


def test_texts_become_lists() -> None:
    """Texts cannot be stacked: a batch has them as a list."""
    assert Stack()(["one", "two"]) == ["one", "two"]
    batch = Stack()([{"text": "one", "x": 1}, {"text": "two", "x": 2}])
    assert batch["text"] == ["one", "two"]
    assert batch["x"].tolist() == [1, 2]


def test_pad_fills_every_dimension() -> None:
    """Shorter tensors are filled at the end of each dimension; the dtype stays."""
    batch = Stack(pad=7)([torch.zeros(1, 2, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64)])
    assert batch.dtype is torch.int64
    assert batch.tolist() == [[[0, 0], [7, 7]], [[1, 7], [1, 7]]]


@pytest.mark.parametrize(
    ("samples", "cause"),
    [
        ([torch.zeros(1), torch.zeros(2)], r"shape: \[1\] and \[2\].*pad="),
        ([{"a": 1}, {"b": 1}], "structure"),
        (["text", 1], "a str cannot be stacked.*collate="),
        ([object(), object()], "a object cannot be stacked"),
        ([np.array("text"), np.array("more")], "can't convert np.ndarray of type numpy.str_"),
        ([torch.zeros(1), torch.zeros(1, dtype=torch.int64)], "dtype: torch.float32 and torch.int64"),
        ([1, 2.5], "dtype: torch.int64 and torch.float32"),
    ],
)
def test_unlike_samples_are_refused(samples: list[object], cause: str) -> None:
    """Samples that do not fit together are refused with cause and remedy."""
    with pytest.raises(CollateError, match=cause):
        Stack()(samples)


def test_pad_makes_only_lengths_alike() -> None:
    """Padding converts neither numbers of dimensions, nor dtypes, nor devices."""
    for other, cause in (
        (torch.zeros(1, 1), "shape"),
        (torch.zeros(2, dtype=torch.float64), "dtype: torch.float32 and torch.float64"),
        (torch.zeros(2, device="meta"), "device: cpu and meta"),
    ):
        with pytest.raises(CollateError, match=cause):
            Stack(pad=0)([torch.zeros(1), other])


def test_unbind_gives_rows() -> None:
    """Every tensor is handed out row by row; what is no tensor goes to all."""
    rows = unbind({"y": torch.arange(4).reshape(2, 2), "tag": "t"}, [None, None])
    assert [row["y"].tolist() for row in rows] == [[0, 1], [2, 3]]
    assert [row["tag"] for row in rows] == ["t", "t"]
    for nothing in (None, {}, (), (None, None)):
        assert unbind(nothing, [None, None]) == [nothing, nothing]


@pytest.mark.parametrize(
    "output", [torch.tensor(1.0), torch.zeros(3, 2), [1.0, 2.0], {"texts": ["a", "b"]}, "text", 7]
)
def test_output_needs_a_row_per_sample(output: object) -> None:
    """An output without a row for each sample is refused."""
    with pytest.raises(SplitError, match="of 2 samples"):
        unbind(output, [None, None])
