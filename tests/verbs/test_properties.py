"""What holds for any tree, size, dimension and number of lanes."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections import OrderedDict
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import asyncdp
from asyncdp._replicas.copies import buckets
from asyncdp._runtime.schedule import split_sizes

from .test_scatter import Frozen, Point, Sub, same

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

plain = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3))


def tensors(num_rows: int, dim: int) -> st.SearchStrategy[Tensor]:
    """Tensors with `num_rows` along `dim`."""

    def build(before: list[int], after: list[int], dtype: torch.dtype) -> Tensor:
        # Exactly |dim| dimensions before it, or after it, so that it is found under this number.
        shape = [*before[:dim], num_rows, *after] if dim >= 0 else [*before, num_rows, *after[: -dim - 1]]
        return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)

    size = st.integers(1, 3)
    dtypes = st.sampled_from([torch.float32, torch.int64, torch.complex64, torch.bool, torch.bfloat16])
    return st.builds(
        build, st.lists(size, min_size=2, max_size=2), st.lists(size, min_size=2, max_size=2), dtypes
    )


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Every kind of container there is."""
    several = st.lists(children, max_size=3)
    named = st.dictionaries(st.text("abc", min_size=1, max_size=2), children, max_size=3)
    return st.one_of(
        several,
        several.map(tuple),
        named,
        named.map(OrderedDict),
        named.map(Sub),
        st.builds(Point, children, children),
        st.builds(Frozen, children, st.text(max_size=2)),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Any, int, int]:
    """A tree, the dimension it can be split on, and a number of lanes."""
    dim = draw(st.integers(-2, 2))
    leaves = st.one_of(tensors(draw(st.integers(0, 9)), dim), plain)
    return draw(st.recursive(leaves, containers, max_leaves=8)), dim, draw(st.integers(1, 5))


@quick
@given(batches())
def test_gather_undoes_scatter(batch: tuple[Any, int, int]) -> None:
    """Scatter then gather is the identity for every tree, dimension, length and number of lanes."""
    tree, dim, num_lanes = batch
    shards = asyncdp.scatter(tree, f"cpu*{num_lanes}", dim=dim)
    assert 1 <= len(shards) <= num_lanes
    assert same(asyncdp.gather(shards, "cpu", dim=dim), tree)


@quick
@given(st.integers(0, 1000), st.integers(1, 20))
def test_split_sizes_are_balanced(num_rows: int, num_lanes: int) -> None:
    """Sizes add up, differ by one at most, and only a batch without rows has an empty shard."""
    sizes = split_sizes(num_rows, num_lanes)
    assert sum(sizes) == num_rows
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == max(1, min(num_rows, num_lanes))


@quick
@given(st.lists(st.integers(1, 40), max_size=20), st.integers(4, 400))
def test_buckets_hold_everything_once(lengths: list[int], max_bytes: int) -> None:
    """Buckets keep the reverse order, lose nothing, and are over their size only with a lone tensor."""
    parameters = [torch.empty(length) for length in lengths]
    found = buckets(parameters, max_bytes)
    assert [id(each) for bucket in found for each in bucket] == [id(each) for each in reversed(parameters)]
    for bucket in found:
        assert len(bucket) == 1 or sum(each.numel() * 4 for each in bucket) <= max_bytes


@settings(quick, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    num_rows=st.integers(1, 9),
    num_lanes=st.integers(1, 4),
    dim=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
def test_gradients_of_a_pass(sizes: list[int], num_rows: int, num_lanes: int, dim: int, seed: int) -> None:
    """Values and gradients through data_parallel are the single-device ones, in float64."""
    torch.manual_seed(seed)
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    module = nn.Sequential(*layers).double()
    twin = copy.deepcopy(module)
    shape = (num_rows, 3, sizes[0]) if dim == 0 else (3, num_rows, sizes[0])
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found = asyncio.run(asyncdp.data_parallel(module, x, f"cpu*{num_lanes}", dim=dim))
    expected = twin(y)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
