"""Collating and splitting by default."""

from __future__ import annotations

import pytest
import torch

from asyncdp._serving.steps import Stack, unbind
from asyncdp.errors import CollateError, SplitError


def test_stack_keeps_structure() -> None:
    """Tensors and numbers are stacked leaf by leaf, whatever they are nested in."""
    batch = Stack()([{"x": torch.tensor([1.0]), "n": (1, True)}, {"x": torch.tensor([2.0]), "n": (2, False)}])
    assert torch.equal(batch["x"], torch.tensor([[1.0], [2.0]]))
    assert torch.equal(batch["n"][0], torch.tensor([1, 2]))
    assert torch.equal(batch["n"][1], torch.tensor([True, False]))


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
        (["text", "more"], "a str cannot be stacked.*collate="),
    ],
)
def test_unlike_samples_are_refused(samples: list[object], cause: str) -> None:
    """Samples that do not fit together are refused with cause and remedy."""
    with pytest.raises(CollateError, match=cause):
        Stack()(samples)


def test_pad_needs_like_dimensions() -> None:
    """Padding makes lengths alike, not numbers of dimensions."""
    with pytest.raises(CollateError, match="shape"):
        Stack(pad=0)([torch.zeros(1), torch.zeros(1, 1)])


def test_unbind_gives_rows() -> None:
    """Every tensor is handed out row by row; what is no tensor goes to all."""
    rows = unbind({"y": torch.arange(4).reshape(2, 2), "tag": "t"}, [None, None])
    assert [row["y"].tolist() for row in rows] == [[0, 1], [2, 3]]
    assert [row["tag"] for row in rows] == ["t", "t"]
    assert unbind({}, [None, None]) == [{}, {}]


@pytest.mark.parametrize("output", [torch.tensor(1.0), torch.zeros(3, 2)])
def test_output_needs_a_row_per_sample(output: torch.Tensor) -> None:
    """An output that cannot be told apart by samples is refused."""
    with pytest.raises(SplitError, match="of 2 samples"):
        unbind(output, [None, None])
