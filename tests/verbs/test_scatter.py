"""The rules of splitting a batch."""

from __future__ import annotations

from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import asyncdp
from asyncdp.errors import LengthMismatchError, UnsplittableError


@pytest.mark.parametrize(
    ("num_rows", "num_lanes", "sizes"),
    [
        (9, 4, [3, 2, 2, 2]),
        (8, 4, [2, 2, 2, 2]),
        (2, 4, [1, 1]),
        (0, 4, [0]),
        (1, 1, [1]),
        (7, 2, [4, 3]),
    ],
)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_shards_are_balanced(num_rows: int, num_lanes: int, sizes: list[int], dim: int) -> None:
    """Contract 1: shards differ by one row at most, and no lane gets an empty one needlessly."""
    x = torch.randn(num_rows, num_rows, 2).movedim(2, 1) if dim != 1 else torch.randn(3, num_rows)
    shards = asyncdp.scatter(x, f"cpu*{num_lanes}", dim=dim)
    assert [shard.shape[dim] for shard in shards] == sizes
    assert torch.equal(torch.cat(shards, dim), x)


Point = namedtuple("Point", "x y")


@dataclass
class Record:
    """A dataclass whose constructor must not run again."""

    rows: Tensor
    name: str = field(default="record", init=False)
    made: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.made.append(1)


@dataclass(frozen=True)
class Frozen:
    """A dataclass that lets nobody set its fields."""

    rows: Tensor
    label: str


class Pair(tuple[Any, Any]):
    """A tuple that is made from two arguments."""

    def __new__(cls, one: Any, other: Any) -> Pair:
        return super().__new__(cls, (one, other))


class Batch(list[Any]):
    """A list that is made from several arguments."""

    def __init__(self, *entries: Any) -> None:
        super().__init__(entries)


class Sub(dict[str, Any]):
    """A subclass of dict, as libraries use them for batches."""


X = torch.arange(5.0)
SHARED = object()


@pytest.mark.parametrize(
    ("tree", "first"),
    [
        (X, X[:3]),
        ((X, 1), (X[:3], 1)),
        ([X, None, "text"], [X[:3], None, "text"]),
        ({"x": X, "empty": {}}, {"x": X[:3], "empty": {}}),
        (OrderedDict(b=X, a=()), OrderedDict(b=X[:3], a=())),
        (Point(X, [X]), Point(X[:3], [X[:3]])),
        (Frozen(X, "a"), Frozen(X[:3], "a")),
        (Sub(x=X), Sub(x=X[:3])),
        (Pair(X, X.shape), Pair(X[:3], X.shape)),
        (Batch(X, "text"), Batch(X[:3], "text")),
        (defaultdict(list, x=X), defaultdict(list, x=X[:3])),
        (UserDict(x=X), UserDict(x=X[:3])),
        ([X, Counter(a=2)], [X[:3], Counter(a=2)]),
        ([X, torch.tensor(3.0)], [X[:3], torch.tensor(3.0)]),
        ([X, SHARED], [X[:3], SHARED]),
        (
            [X, X.long(), X.bool(), X.to(torch.complex64)],
            [t[:3] for t in (X, X.long(), X.bool(), X * 1j * 0 + X)],
        ),
        (torch.max(torch.stack([X, X]), 0), torch.return_types.max((X[:3], torch.zeros(3).long()))),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_nested_inputs(tree: Any, first: Any) -> None:
    """Contract 3: tensors inside any container are split, the rest repeated, the types kept."""
    shards = asyncdp.scatter(tree, "cpu*2")
    assert len(shards) == 2
    assert same(shards[0], first)


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal, types included."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        return bool(torch.equal(one, other))
    if isinstance(one, (dict, UserDict)):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Frozen):
        return same(one.rows, other.rows) and one.label == other.label
    return bool(one is other or one == other)


def test_dataclass_is_rebuilt_without_its_constructor() -> None:
    """Contract 3: the shards of a dataclass have its fields; `__post_init__` does not run for them."""
    record = Record(X)
    record.name = "named"
    shards = asyncdp.scatter(record, "cpu*2")
    assert [shard.rows.tolist() for shard in shards] == [[0, 1, 2], [3, 4]]
    assert [(type(shard), shard.name, shard.made) for shard in shards] == [(Record, "named", [1])] * 2


@pytest.mark.parametrize("tree", [(), [], {}, None, 3, "text", [torch.tensor(1.0)], SimpleNamespace(x=X)])
def test_nothing_to_split_is_repeated(tree: Any) -> None:
    """Inputs without rows go to every lane as they are."""
    assert asyncdp.scatter(tree, "cpu*3") == [tree] * 3


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ((torch.zeros(4), torch.zeros(3)), ["inputs[0] has 4", "inputs[1] has 3", "dim 0"]),
        (
            {"ids": torch.zeros(4), "mask": [torch.zeros(5, 2)]},
            ["inputs['ids'] has 4", "inputs['mask'][0] has 5"],
        ),
    ],
)
def test_lengths_must_agree(tree: Any, words: list[str]) -> None:
    """Contract 2: tensors of different length are refused, both named with their lengths."""
    with pytest.raises(LengthMismatchError) as caught:
        asyncdp.scatter(tree, "cpu*2")
    assert isinstance(caught.value, ValueError)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("nest", [lambda packed: packed, lambda packed: [{"x": (packed,)}]])
def test_packed_sequence_is_refused(nest: Any) -> None:
    """A PackedSequence, whose rows lie scattered, is a TypeError that says to pack inside forward."""
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    with pytest.raises(UnsplittableError, match="pack inside forward"):
        asyncdp.scatter(nest(packed), "cpu*2")


def test_shards_on_the_same_device_are_views() -> None:
    """Splitting copies nothing where nothing has to move."""
    x = torch.randn(4, 3)
    storage = x.untyped_storage().data_ptr()
    assert {shard.untyped_storage().data_ptr() for shard in asyncdp.scatter(x, "cpu*2")} == {storage}
