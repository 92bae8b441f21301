"""Inputs and outputs that are no tensors with rows: said in words, or refused with both readings."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import asyncdp
from asyncdp import PerRow, Whole
from asyncdp.errors import AmbiguousSequenceError, GatherError, UnsplittableError

from .models import Fn, numbered

pytestmark = pytest.mark.anyio

Call = Callable[..., Any]
# The first optimizer imports torch's compiler, which no event loop may wait for.
torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)

NUM_LANES: list[Any] = [1, "all", "auto"]


def lengths(_module: nn.Module, x: Tensor, texts: Any) -> Tensor:
    """Add to each row the length of its text."""
    assert len(x) == len(texts)
    return x + torch.tensor([[float(len(text))] for text in texts])


@asynccontextmanager
async def called(how: Any, module: nn.Module) -> AsyncIterator[Call]:
    """Give a function that calls the module in one of the ways there are."""
    if how == "data_parallel":
        yield lambda *args, **kwargs: asyncdp.data_parallel(module, args, "cpu*2", module_kwargs=kwargs)
        return
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes=how) as engine:
        yield engine


@pytest.fixture(params=["data_parallel", *NUM_LANES], ids=str)
def how(request: pytest.FixtureRequest) -> Any:
    """Every way to call a module on one batch."""
    return request.param


TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]
WITH_TEXTS = [[1.0], [3.0], [5.0], [7.0], [9.0]]


@pytest.mark.parametrize("kind", [list, tuple])
async def test_one_entry_per_row(how: Any, kind: Any) -> None:
    """A `PerRow` beside a tensor meets the rows of its entries, however the batch is split."""
    async with called(how, Fn(lengths)) as call:
        for _ in range(8):
            assert (await call(numbered(5), PerRow(kind(TEXTS)))).tolist() == WITH_TEXTS
            assert (await call(numbered(5), texts=PerRow(kind(TEXTS)))).tolist() == WITH_TEXTS


async def test_rows_of_entries_alone(how: Any) -> None:
    """Without any tensor the entries are the rows."""
    module = Fn(lambda m, texts: torch.tensor([len(text) for text in texts]))
    async with called(how, module) as call:
        assert (await call(PerRow(TEXTS))).tolist() == [1, 2, 3, 4, 5]


async def test_targets_of_a_detector(how: Any) -> None:
    """Entries hold tensors of any size, which nobody splits; gradients flow through them."""
    seen: list[int] = []

    def detect(m: Any, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        seen.append(len(images))
        pairs = zip(images, targets, strict=True)
        return torch.stack([image.mean() + target["boxes"].sum() for image, target in pairs])

    images = [torch.rand(3, 4 + size, 4, requires_grad=True) for size in range(3)]
    targets = [{"boxes": torch.ones(3, size + 1)} for size in range(3)]
    async with called(how, Fn(detect)) as call:
        found = await call(PerRow(images), PerRow(targets))
    expected = [image.mean().item() + 3 * (size + 1) for size, image in enumerate(images)]
    assert found.tolist() == pytest.approx(expected)
    found.sum().backward()
    assert all(image.grad is not None for image in images)
    assert sum(seen) == 3


@pytest.mark.parametrize(
    "value",
    ["text", ["only", "texts"], 3.5, {"a": None}, [torch.tensor(2.0)], ({"x": 1}, {"x": 2})],
    ids=str,
)
async def test_without_rows_it_runs_once(how: Any, value: Any) -> None:
    """An input without anything to split runs once, on one lane, and gives what the module gives."""
    calls: list[Any] = []
    module = Fn(lambda m, given: calls.append(given) or (torch.arange(4.0), torch.tensor(1.0)))
    async with called(how, module) as call:
        rows, scalar = await call(value)
    assert len(calls) == 1
    assert rows.tolist() == [0, 1, 2, 3]
    assert scalar.dim() == 0


@dataclasses.dataclass
class Targets:
    """A dataclass around a list."""

    names: list[str]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (["a", "b", "c", "d"], "argument 1 is a list of 4"),
        (("a", "b", "c", "d"), "argument 1 is a tuple of 4"),
        ([{"boxes": torch.ones(4, 4)}] * 4, "argument 1 is a list of 4"),
        ({"meta": {"names": [1, 2, 3, 4]}}, "argument 1['meta']['names'] is a list"),
        (Targets(["a"] * 4), "argument 1.names is a list"),
        ({"scores": np.zeros((4, 2))}, "argument 1['scores'] is a ndarray of 4"),
    ],
    ids=["list", "tuple", "dicts", "nested", "dataclass", "array"],
)
@pytest.mark.parametrize("num_lanes", ["data_parallel", "all", "auto"])
async def test_two_readings_are_refused(num_lanes: Any, value: Any, name: str) -> None:
    """A sequence as long as the batch may mean two things: nothing runs, and the error says both."""
    ran: list[Any] = []
    async with called(num_lanes, Fn(lambda m, x, y: ran.append(y) or x)) as call:
        with pytest.raises(AmbiguousSequenceError) as caught:
            await call(numbered(4), value)
    assert isinstance(caught.value, ValueError)
    assert name in str(caught.value)
    assert "asyncdp.PerRow" in str(caught.value)
    assert "asyncdp.Whole" in str(caught.value)
    assert not ran


async def test_one_lane_needs_no_words() -> None:
    """Where nothing is split nothing is in doubt, in calls and in steps."""
    module = Fn(lambda m, x, y: x * m.scale, scale=nn.Parameter(torch.ones(())))
    names, targets = ["a"] * 4, [{"boxes": torch.ones(2, 4)}] * 4
    for devices, num_lanes in (("cpu", "auto"), ("cpu*2", 1)):
        async with asyncdp.DataParallel(module, devices, num_lanes=num_lanes) as engine:
            assert torch.equal(await engine(numbered(4), names), numbered(4))
            assert torch.equal(await engine(numbered(4), targets), numbered(4))
            optimizer = torch.optim.SGD(module.parameters(), 0.0)
            loss = await engine.train_step((numbered(4), names), targets, lambda x, y: x.sum(), optimizer)
            assert loss == 6


async def test_the_same_for_every_lane(how: Any) -> None:
    """A `Whole` reaches every forward as it is, whatever its length, tensors included."""
    seen: list[Any] = []

    def forward(m: Any, x: Tensor, names: Any, weights: Tensor) -> Tensor:
        seen.append(names)
        return x * weights.sum()

    async with called(how, Fn(forward)) as call:
        found = await call(numbered(4), Whole(["a", "b", "c", "d"]), weights=Whole(torch.ones(7)))
    assert found.tolist() == [[0], [7], [14], [21]]
    assert all(names == ["a", "b", "c", "d"] and type(names) is list for names in seen)


@pytest.mark.parametrize(
    "value", [["a", "b"], (), "four", [None] * 4, torch.Size([1, 2, 3, 4]), [numbered(4)] * 4], ids=str
)
async def test_what_is_in_no_doubt(value: Any) -> None:
    """Sequences of another length, shapes, and layers of tensors with rows go on as ever."""
    kinds: list[Any] = []
    module = Fn(lambda m, x, y: kinds.append(type(y)) or x)
    assert torch.equal(await asyncdp.data_parallel(module, (numbered(4), value), "cpu*2"), numbered(4))
    assert kinds == [type(value)] * 2


async def test_outputs_per_row_are_joined(how: Any) -> None:
    """A `PerRow` in an output has one entry for each row, in the order of the batch."""
    module = Fn(lambda m, x: {"found": PerRow({"row": row} for row in x.flatten().tolist()), "x": x})
    async with called(how, module) as call:
        for _ in range(8):
            found = (await call(numbered(5)))["found"]
            assert found == [{"row": float(row)} for row in range(5)]
            assert type(found) is PerRow


async def test_an_input_per_row_may_be_returned(how: Any) -> None:
    """What a forward got as `PerRow` and returns as it is, is joined again."""
    async with called(how, Fn(lambda m, x, ids: (ids, x))) as call:
        ids, x = await call(numbered(4), PerRow(["A", "B", "C", "D"]))
    assert ids == ["A", "B", "C", "D"]
    assert torch.equal(x, numbered(4))


@pytest.mark.parametrize(
    "output",
    [
        lambda x: [{"x": row} for row in x],
        lambda x: ["row"] * len(x),
        lambda x: {"found": [{"score": row} for row in x]},
    ],
    ids=["dicts", "texts", "nested"],
)
@pytest.mark.parametrize("num_rows", [2, 4, 5])
async def test_unmarked_outputs_per_row_are_refused(output: Any, num_rows: int) -> None:
    """A list with as many entries as its shard has rows is never joined, nor taken for equal, by a guess."""
    with pytest.raises(GatherError, match=r"asyncdp\.PerRow"):
        await asyncdp.data_parallel(Fn(lambda m, x: output(x)), numbered(num_rows), "cpu*2")


async def test_parts_in_a_tuple_or_of_tensors() -> None:
    """The same parts in every shard are a tuple, or a list of tensors: concatenated part by part."""
    module = Fn(lambda m, x: (({"a": x}, {"a": -x}), [x, x * 2]))
    (one, other), pair = await asyncdp.data_parallel(module, numbered(4), "cpu*2")
    assert one["a"].flatten().tolist() == [0, 1, 2, 3]
    assert other["a"].flatten().tolist() == [0, -1, -2, -3]
    assert pair[1].flatten().tolist() == [0, 2, 4, 6]


async def test_too_few_entries_in_an_output() -> None:
    """A `PerRow` in an output has exactly one entry per row."""
    with pytest.raises(GatherError, match="1 entries in the output of a shard of 2 rows"):
        await asyncdp.data_parallel(Fn(lambda m, x: PerRow(["one"])), numbered(4), "cpu*2")


def test_a_text_is_no_list_of_entries() -> None:
    """One string is not one entry per row."""
    with pytest.raises(TypeError, match="one entry per row"):
        PerRow("abcd")


async def test_map_and_batcher() -> None:
    """Whole batches on one lane get the same lists; a batcher gives each sample its entry."""
    module = Fn(lambda m, x, texts: PerRow(f"{text}{int(row)}" for text, row in zip(texts, x, strict=True)))
    async with asyncdp.DataParallel(module, "cpu*2") as engine:
        batches = [(numbered(2), PerRow(["a", "b"])), (numbered(1), PerRow(["c"]))]
        assert [found async for found in engine.map(batches)] == [["a0", "b1"], ["c0"]]
        async with asyncdp.Batcher(engine, max_batch_size=2) as batcher:
            assert await batcher((torch.tensor([7.0]), "x")) == "x7"


@pytest.mark.parametrize("num_lanes", NUM_LANES)
async def test_steps_with_entries(num_lanes: Any) -> None:
    """A training step splits `PerRow` inputs and targets with the rows, and equals the step of one device."""
    module, plain = nn.Linear(1, 1), nn.Linear(1, 1)
    plain.load_state_dict(module.state_dict())
    wrapped = Fn(lambda m, x, names: (m.inner(x), names), inner=module)

    def loss_fn(output: Any, targets: Any) -> Tensor:
        y, names = output
        assert len(y) == len(names) == len(targets)
        return (y - torch.stack([target["y"] for target in targets])).square().mean()

    targets = [{"y": torch.tensor([float(row)], requires_grad=True)} for row in range(5)]
    async with asyncdp.DataParallel(wrapped, "cpu*2", num_lanes=num_lanes) as engine:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        loss = await engine.train_step((numbered(5), PerRow(TEXTS)), PerRow(targets), loss_fn, optimizer)
        if num_lanes != 1:
            with pytest.raises(AmbiguousSequenceError, match="targets is a list"):
                await engine.train_step((numbered(5), PerRow(TEXTS)), targets, loss_fn, optimizer)
    expected = (plain(numbered(5)) - numbered(5)).square().mean()
    expected.backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(list(module.parameters()), list(plain.parameters()))
    assert all(target["y"].grad is None for target in targets)


UNSPLITTABLE = {
    "coo": (lambda: torch.eye(4).to_sparse(), "sparse_coo tensor"),
    "csr": (lambda: torch.eye(4).to_sparse_csr(), "sparse_csr tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "nested tensor",
    ),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor"),
    "packed": (lambda: pack_sequence([torch.zeros(3), torch.zeros(2)]), "PackedSequence"),
}


@pytest.fixture(params=UNSPLITTABLE)
def unsplittable(request: pytest.FixtureRequest) -> Any:
    """A value that holds rows along none of its dimensions, and what it is called."""
    make, kind = UNSPLITTABLE[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls some of these prototypes
        return make(), kind


async def test_what_cannot_be_split_is_named(unsplittable: Any) -> None:
    """Sparse, nested and packed inputs are refused by name and with a remedy; one lane just runs them."""
    value, kind = unsplittable
    module = Fn(lambda m, x, y=None: torch.ones(3))
    for how in ("data_parallel", "all", "auto"):
        async with called(how, module) as call:
            with pytest.raises(UnsplittableError, match=f"keyword 'y' is a {kind}") as caught:
                await call(numbered(4), y=value)
            assert isinstance(caught.value, TypeError)
            with pytest.raises(UnsplittableError, match=f"argument 0 is a {kind}"):
                await call(value)
            assert (await call(numbered(4), y=Whole(value))).tolist() == [1.0] * 6
    async with called(1, module) as call:
        assert (await call(value)).tolist() == [1.0] * 3


class Graphs:
    """A batch of graphs as libraries have them: it moves itself, in place."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.moved_to: list[torch.device] = []

    def to(self, device: torch.device, non_blocking: bool = False) -> Graphs:
        self.moved_to = [*self.moved_to, device]
        self.x = self.x.to(device)
        return self


class Quantity:
    """Something whose `to` takes a unit."""

    def to(self, unit: str) -> Quantity:
        raise AssertionError(f"asked for the unit {unit}")


async def test_objects_that_move_themselves(how: Any) -> None:
    """An object with a `to` for devices arrives on the lane's device, once; the caller's stays as it was."""
    graphs, quantity = Graphs(torch.ones(6)), Quantity()
    module = Fn(lambda m, given, other: (given.x, given.moved_to, other is quantity))
    async with called(how, module) as call:
        x, moved_to, is_same = await call(graphs, quantity)
    assert torch.equal(x, torch.ones(6))
    assert moved_to == [torch.device("cpu")]
    assert is_same
    assert graphs.moved_to == []
