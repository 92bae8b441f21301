"""Choosing the number of lanes never changes what a result means."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import asyncdp

from ..notes import Notes
from .helpers import batch, distance, mlp, serial_step

pytestmark = pytest.mark.anyio

# On three lanes all, one and two of them are tried, three calls in a row each, for four rounds at most.
ROUND = 3 * 3
MOST_TRIALS = 4 * ROUND


class Counting(nn.Module):
    """Notes how many rows each forward got; returns what `function` makes of them."""

    def __init__(self, function: Callable[[Tensor], Any] = lambda x: x * 2) -> None:
        super().__init__()
        self.function = function
        self.rows = Notes()

    def forward(self, x: Tensor) -> Any:
        self.rows.append(len(x))
        return self.function(x)


def adaptive(module: nn.Module) -> asyncdp.DataParallel:
    """Return an engine on three lanes that chooses by itself."""
    return asyncdp.DataParallel(module, "cpu*3")


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


async def test_it_tries_one_to_all_lanes_and_settles() -> None:
    """The first calls are on all, one and two lanes; then it stays with one number, and tells which."""
    module = Counting()
    x = torch.arange(6.0).reshape(6, 1)
    async with adaptive(module) as one:
        assert torch.equal(await one(x), x * 2)
        while (choice := one.statistics().choices[0]).reason == "still learning":
            assert torch.equal(await one(x), x * 2)
        tried = set(module.rows)
        module.rows.clear()
        for _ in range(3):  # too few to doubt the choice, however long they take
            assert torch.equal(await one(x), x * 2)
    assert tried == {2, 6, 3}
    assert set(choice.costs) == {1, 2, 3}
    assert choice.num_probes <= MOST_TRIALS
    assert choice.reason
    assert choice.workload.startswith("call train grad float32")
    assert module.rows == [6 // choice.num_lanes] * 3 * choice.num_lanes


@pytest.mark.filterwarnings("ignore:Was asked to gather")
@pytest.mark.parametrize(
    ("function", "num_rows"),
    [
        (torch.mean, 6),
        (torch.mean, 3),
        (lambda x: x.sum(0), 6),
        (lambda x: (x, x.new_ones(1)), 3),
        (lambda x: x.new_ones(2, 4), 6),
    ],
    ids=["scalar", "scalar from one row", "one row for all", "one element each", "as long as a shard"],
)
async def test_outputs_per_replica_stay_on_all_lanes(function: Any, num_rows: int) -> None:
    """Where each lane gives something of its own, every call gives as many as there are lanes."""
    x = torch.arange(float(num_rows * 4)).reshape(num_rows, 4)
    async with adaptive(Counting(function)) as one:
        first = await one(x)
        for _ in range(14):
            again = await one(x)
            pairs = zip(first, again, strict=True) if isinstance(first, tuple) else [(first, again)]
            for mine, other in pairs:
                assert torch.equal(mine, other)
        assert one.statistics().choices[0].num_lanes == 3


async def test_batch_statistics_fix_the_choice() -> None:
    """A batch norm in train mode always sees the shards of all lanes; in eval mode it need not."""
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    x = torch.randn(6, 5)
    async with adaptive(module) as one:
        for _ in range(14):
            await one(x)
        fixed = one.statistics().choices[0]
        module.eval()
        for _ in range(14):
            await one(x)
        free = one.statistics().choices[1]
    assert (fixed.num_lanes, fixed.num_probes) == (3, 0)
    assert "batch statistics" in fixed.reason
    assert free.num_probes == 14


class Counter(nn.Module):
    """Counts its rows, in whatever mode, in a buffer, another tensor or a parameter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(1))
        if kind in ("buffer", "new buffer"):
            self.register_buffer("count", torch.zeros(()))
        else:
            count = torch.zeros(())
            self.count = nn.Parameter(count, requires_grad=False) if kind == "parameter" else count

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "new buffer":
            self.count = self.count + len(x)
        else:
            self.count += len(x)
        return x * self.weight


@pytest.mark.parametrize("kind", ["buffer", "new buffer", "tensor", "parameter"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("steps", [False, True])
async def test_modules_that_change_their_state_stay_on_all_lanes(
    kind: str, training: bool, steps: bool
) -> None:
    """What is left in the module never depends on a choice: each pass counts the rows of lane 0's shard."""
    module = Counter(kind).train(training)
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    x = torch.ones(6, 1)
    async with adaptive(module) as one:
        for _ in range(14):
            if steps:
                await one.train_step(x, x, functional.mse_loss, optimizer)
            else:
                await one(x)
        assert module.count.item() == 14 * 2
        assert "state" in one.statistics().choices[-1].reason or (training and "buffer" in kind)


async def test_a_table_made_once_does_not_fix_the_choice() -> None:
    """A forward that changes a buffer in its first call alone is no reason to stay on all lanes."""

    class Table(nn.Module):
        table: Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.ones(1)
            return x * self.table

    async with adaptive(Table().eval()) as one:
        for _ in range(14):
            await one(torch.ones(6, 1))
        (choice,) = one.statistics().choices
        assert choice.num_probes == 14


async def test_deterministic_mode_fixes_the_choice() -> None:
    """In torch's deterministic mode calls and steps never depend on what was measured."""
    module = mlp()
    x, y = batch(6)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    async with adaptive(module) as one:
        with deterministic():
            for _ in range(5):
                await one(x)
                await one.train_step(x, y, functional.cross_entropy, optimizer)
        choices = one.statistics().choices
    assert [choice.num_lanes for choice in choices] == [3, 3]
    assert all("deterministic" in choice.reason for choice in choices)


async def test_shapes_and_modes_are_workloads_of_their_own() -> None:
    """Another length, another mode of the module and training steps are learned separately."""
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    async with adaptive(module) as one:
        for num_rows in (4, 4, 32):
            x, y = batch(num_rows)
            await one(x)
        module.eval()
        await one(x)
        await one.train_step(x, y, functional.cross_entropy, optimizer)
        assert len(one.statistics().choices) == 4


async def test_training_adapts_and_stays_equal() -> None:
    """While a step is tried on one, two and three lanes the weights follow the serial run."""
    torch.manual_seed(0)
    module = mlp()
    serial = copy.deepcopy(module)
    optimizer, serial_optimizer = (torch.optim.Adam(each.parameters(), 0.01) for each in (module, serial))
    async with adaptive(module) as one:
        for number in range(MOST_TRIALS + 4):
            x, y = batch(10)
            await one.train_step(x, y, functional.cross_entropy, optimizer)
            serial_step(serial, serial_optimizer, x, y, functional.cross_entropy)
            if number == ROUND - 1:  # later it may have chosen, and begun to learn again
                assert len(one.statistics().choices[0].costs) == 3
    assert distance(module, serial) < 1e-10


async def test_gradients_on_any_number_of_lanes() -> None:
    """Whatever number of lanes a call took, its backward gives the same gradients."""
    torch.manual_seed(0)
    module = mlp()
    x, _ = batch(10)
    module(x).square().mean().backward()
    expected = [each.grad for each in module.parameters()]
    async with adaptive(module) as one:
        for _ in range(ROUND + 1):
            module.zero_grad()
            await asyncdp.backward((await one(x)).square().mean())
            torch.testing.assert_close([each.grad for each in module.parameters()], expected)


@pytest.mark.parametrize("num_lanes", [1, 2, "all"])
async def test_a_number_forces(num_lanes: Any) -> None:
    """A number, or "all", is what every call takes, and nothing is learned."""
    module = Counting()
    async with asyncdp.DataParallel(module, "cpu*3", num_lanes=num_lanes) as one:
        for _ in range(8):
            await one(torch.zeros(6, 1))
        assert one.statistics().choices == ()
    assert set(module.rows) == {6 // (3 if num_lanes == "all" else num_lanes)}


@pytest.mark.parametrize("rows", [[4], [4, 5, 6, 7], [6, 4, 7, 5], [1, 4], [2, 3]], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x @ x.T,
        lambda x: {"logits": (x @ x.T).softmax(-1), "x": x},
        lambda x: x.unsqueeze(1).expand(-1, len(x), -1),
        lambda x: tuple(x.new_zeros(len(x)) for _ in range(len(x))),
    ],
    ids=["products", "contrastive", "pairs", "as many parts as rows"],
)
async def test_where_rows_meet_every_call_means_the_same(function: Any, rows: list[int]) -> None:
    """Outputs whose other dimensions depend on the rows of a shard are those of all lanes, in every call."""
    async with (
        asyncdp.DataParallel(Counting(function), "cpu*2", num_lanes="all") as fixed,
        asyncdp.DataParallel(Counting(function), "cpu*2") as one,
    ):
        for number in range(40):
            x = torch.randn(rows[number % len(rows)], 3)
            try:
                expected = await fixed(x)
            except asyncdp.errors.GatherError:  # shards of unlike length cannot be joined
                with pytest.raises(asyncdp.errors.GatherError):
                    await one(x)
                continue
            found = await one(x)
            torch.testing.assert_close(found, expected)


def counts_of_last(x: Tensor) -> Tensor:
    return (x[:, None] == x[None]).all(-1).sum(1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(0),
        lambda x: x - x.mean(0),
        lambda x: {"sorted": x.sort(0).values, "x": x},
        lambda x: (x, x.cumsum(0).to(torch.bfloat16)),
        lambda x: x > x.median(),
        counts_of_last,
    ],
    ids=["softmax", "centred", "sorted", "running sum", "above the median", "duplicates"],
)
@pytest.mark.parametrize("records", [False, True])
async def test_where_rows_meet_in_values_every_call_means_the_same(function: Any, records: bool) -> None:
    """A row that depends on the others of its shard has the values of all lanes, in every call."""
    async with (
        asyncdp.DataParallel(Counting(function), "cpu*2", num_lanes="all") as fixed,
        asyncdp.DataParallel(Counting(function), "cpu*2") as one,
    ):
        for number in range(20):
            x = torch.randn(64, 3)
            x[63] = x[62] = x[0]
            if number == 3:  # a batch of equal rows hides what others show
                x = torch.ones(64, 3)
            x.requires_grad_(records)
            torch.testing.assert_close(await one(x), await fixed(x))
        choice = one.statistics().choices[0]
    assert (choice.num_lanes, "depends on the other rows" in choice.reason) == (2, True)


@pytest.mark.parametrize(
    "function",
    [lambda x: functional.dropout(x, 0.5), lambda x: x.argmax(1), lambda x: x / 0.0, lambda x: x.half()],
    ids=["dropout", "argmax", "not finite", "half"],
)
async def test_rows_for_themselves_leave_the_choice_free(function: Any) -> None:
    """Chance, indices and values that are no numbers are not taken for rows that meet."""
    async with asyncdp.DataParallel(Counting(function), "cpu*2") as one:
        for _ in range(8):
            await one(torch.randn(8, 3))
        assert "rows" not in one.statistics().choices[0].reason


async def test_a_forward_that_writes_into_its_input_runs_once() -> None:
    """A batch whose forward changes it is never run again to compare, so all lanes run all of them."""
    module = Counting(lambda x: x.add_(1.0))
    async with asyncdp.DataParallel(module, "cpu*2") as one:
        for _ in range(8):
            x = torch.zeros(4, 3)
            assert torch.equal(await one(x), torch.ones(4, 3))
            assert torch.equal(x, torch.ones(4, 3))
        assert "write into their input" in one.statistics().choices[0].reason
    assert set(module.rows) == {2}


async def test_results_are_compared_in_all_dimensions_before_a_choice() -> None:
    """A number of lanes is chosen only once its results had the shape that all lanes give."""
    module = Counting(lambda x: x * 2)
    async with asyncdp.DataParallel(module, "cpu*2") as one:
        # No two calls have the same shapes, so that the first on one lane is run on all lanes too.
        for number in range(16):
            x = torch.ones(8, 16 + number)
            assert torch.equal(await one(x), x * 2)
    assert module.rows.count(8) < module.rows.count(4)
