"""The rules of putting outputs together."""

from __future__ import annotations

import asyncio
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import asyncdp
from asyncdp.errors import AsyncDPError, GatherError

from .test_scatter import Frozen, Point, same

ONE = torch.ones(2)
# Word for word what torch.nn.parallel says.
SCALARS = (
    "Was asked to gather along dimension 0, but all input tensors were scalars; "
    "will instead unsqueeze and return a vector."
)


@pytest.mark.parametrize(
    ("outputs", "whole"),
    [
        ([ONE, ONE * 2], torch.tensor([1.0, 1, 2, 2])),
        ([(ONE, None), (ONE, None)], (torch.ones(4), None)),
        ([[], []], []),
        ([{"b": ONE, "a": 3}, {"a": 3, "b": ONE}], {"b": torch.ones(4), "a": 3}),
        ([OrderedDict(b=ONE, a=()), OrderedDict(b=ONE, a=())], OrderedDict(b=torch.ones(4), a=())),
        ([Point(ONE, "x"), Point(ONE, "x")], Point(torch.ones(4), "x")),
        ([Frozen(ONE, "x"), Frozen(ONE, "x")], Frozen(torch.ones(4), "x")),
        ([ONE.shape, ONE.shape], ONE.shape),
        ([None, None], None),
        ([torch.zeros(0, 3), torch.zeros(2, 3)], torch.zeros(2, 3)),
        ([ONE], ONE),
        ([[ONE, 3]], [ONE, 3]),
    ],
)
def test_nested_outputs(outputs: list[Any], whole: Any) -> None:
    """Contract 3: tensors are concatenated, equal values returned once, the types kept."""
    assert same(asyncdp.gather(outputs, "cpu"), whole)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_scalars_become_a_vector(num_shards: int, dim: int) -> None:
    """Contract 13: scalars give a vector in lane order, with the warning of torch.nn.parallel."""
    with pytest.warns(UserWarning, match="scalars") as caught:
        found = asyncdp.gather([torch.tensor(float(each)) for each in range(num_shards)], "cpu", dim=dim)
    assert found.tolist() == [float(each) for each in range(num_shards)]
    assert {str(each.message) for each in caught} == {SCALARS}


def test_scalars_of_a_pass_become_a_vector() -> None:
    """Contract 13: a module that returns its loss gives one loss per lane, in order."""
    import asyncio

    with pytest.warns(UserWarning, match="Was asked to gather along dimension 0"):
        found = asyncio.run(asyncdp.data_parallel(Sum(), torch.arange(6.0), "cpu*3"))
    assert found.tolist() == [1.0, 5.0, 9.0]


class Sum(torch.nn.Module):
    """Reduces its shard to a scalar."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ([], "there are none"),
        ([(ONE,), [ONE]], "shard 0 returned"),
        ([{"a": ONE}, {"b": ONE}], "shard 1"),
        ([{"a": 1}, {"a": 2}], "['a'] is 1 in one shard and 2 in another"),
        ([ONE, None], "None in another"),
        ([[3], [ONE]], "[0] is 3 in one shard"),
        ([torch.ones(2, 3), torch.ones(2, 4)], "sizes [2, 3], [2, 4] do not fit together along dim 0"),
        ([torch.tensor(1.0), ONE], "sizes [], [2]"),
        ([object(), object()], "<object object"),
    ],
)
def test_outputs_must_fit(outputs: list[Any], words: str) -> None:
    """Contract: outputs of other structure, size or value are a ValueError that shows both."""
    with pytest.raises(GatherError) as caught:
        asyncdp.gather(outputs, "cpu")
    assert isinstance(caught.value, ValueError)
    assert words in str(caught.value)


def test_packed_outputs_are_refused() -> None:
    """Two PackedSequences are not joined into nonsense."""
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    with pytest.raises(AsyncDPError, match="PackedSequence"):
        asyncdp.gather([packed, packed], "cpu")


@pytest.mark.parametrize("dim", [1, -1])
def test_dimension(dim: int) -> None:
    """Outputs are put together along the dimension asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = asyncdp.gather([torch.zeros(2, 1), torch.ones(2, 3)], "cpu", dim=dim)
    assert found.tolist() == [[0, 1, 1, 1]] * 2


def test_packed_inputs_reach_their_modules() -> None:
    """parallel_apply splits nothing, so it hands a PackedSequence over as it is."""
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])

    async def main() -> list[Any]:
        return await asyncdp.parallel_apply([nn.LSTM(2, 4), nn.Identity()], [packed, packed])

    outputs = asyncio.run(main())
    assert outputs[0][0].data.shape == (5, 4)
    assert torch.equal(outputs[1].data, packed.data)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("convert", [Tensor.to_sparse_csr, Tensor.to_sparse_csc])
def test_what_torch_cannot_concatenate_is_named(convert: Any) -> None:
    """Of tensors in a layout that torch cannot concatenate the error says so, and what to return instead."""
    rows = convert(torch.eye(2))
    with pytest.raises(GatherError, match=r"concatenate torch.sparse_cs. .* Return tensor.to_sparse_coo"):
        asyncdp.gather([rows, rows], "cpu")
    coo = asyncdp.gather([rows.to_sparse_coo()] * 2, "cpu")
    assert torch.equal(coo.to_dense(), torch.eye(2).repeat(2, 1))


@pytest.mark.parametrize("others", [[2], [2, 3, 4], [2, 4], []])
def test_sizes_that_do_not_fit_are_told(others: list[int]) -> None:
    """Tensors of other sizes outside the dimension, or of more or fewer dimensions, are a GatherError."""
    with pytest.raises(GatherError, match=r"sizes \[5, 3\], .* do not fit together along dim 0"):
        asyncdp.gather([torch.zeros(5, 3), torch.zeros(others)], "cpu")
    with pytest.raises(GatherError, match="along dim 2"):
        asyncdp.gather([torch.zeros(5, 3)] * 2, "cpu", dim=2)
