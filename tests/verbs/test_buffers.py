"""What a forward does to buffers: lane 0's changes survive, the others' are forgotten."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asyncdp
from asyncdp.testing import fake_devices

from .conftest import Passes
from .models import Fn, numbered

pytestmark = pytest.mark.filterwarnings("ignore:.*lazily.*")


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers' values."""
    return {name: tensor.clone() for name, tensor in module.named_buffers()}


class OwnNorm(nn.Module):
    """Running statistics that count neither batches nor, in torch's kernels, versions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm1d(3),
        lambda: nn.BatchNorm1d(3, momentum=None),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        OwnNorm,
    ],
)
def test_first_lanes_statistics_survive(dp: Passes, make: Any) -> None:
    """Contract 8: after each pass the statistics are those of the first shard, and evaluation uses them."""
    module, twin = make(), make()
    twin.load_state_dict(module.state_dict())
    for _ in range(3):
        x = torch.randn(8, 3) + 5
        dp(module, x)
        twin(x[:4])
        torch.testing.assert_close(statistics(module), statistics(twin))
    x = torch.randn(8, 3)
    torch.testing.assert_close(dp(module.eval(), x), twin.eval()(x))


def test_statistics_of_a_part_in_train_mode_survive(dp: Passes) -> None:
    """A part left in train mode under a module in eval mode runs on lane 0 though one lane would do."""
    module = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True)).eval()
    module[0].train()
    before = statistics(module)
    for _ in range(3):
        dp(module, torch.randn(1, 3, 5) + 5)
        after = statistics(module)
        assert not torch.equal(after["0.running_mean"], before["0.running_mean"])
        before = after


class Replacing(nn.Module):
    """Puts new tensors in the places of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", None)
        self.register_buffer("first", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.last = x.detach()
        self.first = None
        return torch.cat([x, self.count.expand_as(x)], dim=1)


def test_replaced_buffers_survive(dp: Passes) -> None:
    """Contract 8: buffers that forward replaced, created or removed on lane 0 are so in the module."""
    module = Replacing()
    for step in range(1, 4):
        found = dp(module, numbered(4))
        assert found[:, 1].tolist() == [float(step)] * 4
        assert module.count == step
        assert module.last is not None
        assert module.last.tolist() == [[0.0], [1.0]]
        assert module.first is None


def test_other_lanes_changes_are_forgotten(dp: Passes) -> None:
    """What another lane put in a buffer's place, or wrote into it, is not there in its next pass."""

    def write(m: Any, x: Tensor, *, replace: bool) -> Tensor:
        seen = m.mark.clone()
        if x[0, 0] > 0:
            if replace:
                m.mark = m.mark + 1
            else:
                m.mark.add_(1)
        return seen.expand(len(x), 1)

    module = Fn(write)
    module.register_buffer("mark", torch.zeros(1))
    module.eval()
    for replace in (True, False, True):
        assert dp(module, numbered(4), replace=replace).sum() == 0
        assert module.mark == 0


def test_buffer_written_in_inference_mode_is_seen(dp: Passes) -> None:
    """A counter that counts under inference mode counts on, on every lane."""

    def count(m: Any, x: Tensor) -> Tensor:
        seen = m.counter.clone()
        m.counter.add_(1)
        return seen.expand(len(x), 1)

    module = Fn(count)
    module.register_buffer("counter", torch.zeros(1))
    module.eval()
    for step in range(3):
        with torch.inference_mode():
            assert dp(module, numbered(4)).tolist() == [[float(step)]] * 4
    assert dp(module, numbered(4)).tolist() == [[3.0]] * 4


def test_inference_tensors_as_parameters_and_buffers(dp: Passes) -> None:
    """A module made under inference mode runs there, and its changes are seen."""
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
        x = torch.randn(4, 3)
        torch.testing.assert_close(dp(module, x), module(x))
        module[1].running_mean.add_(1)
        torch.testing.assert_close(dp(module, x), module(x))


def test_sparse_buffer(dp: Passes) -> None:
    """A sparse buffer, which has no storage to look at, reaches every lane, changed or not."""
    module = Fn(lambda m, x: torch.sparse.mm(m.graph, x.T).T)
    module.register_buffer("graph", torch.eye(3).to_sparse())
    x = torch.randn(4, 3)
    torch.testing.assert_close(dp(module, x), x)
    module.graph = module.graph * 2
    torch.testing.assert_close(dp(module, x), x * 2)


def test_passes_under_way_see_the_buffers_of_those_before(dp: Passes) -> None:
    """In train mode each lane has what lane 0 wrote in the pass before, though both passes are under way."""
    gate = threading.Event()

    def count(m: Any, x: Tensor) -> Tensor:
        if x[0, 0] == 0:
            assert gate.wait(20)
        seen = m.counter.clone()
        m.counter.add_(1)
        return seen.expand(len(x), 1)

    module = Fn(count)
    module.register_buffer("counter", torch.zeros(1))
    dp(module, numbered(4) + 10)

    async def both(num_rows: int) -> tuple[Tensor, Tensor]:
        held = asyncio.ensure_future(dp.begin(module, numbered(num_rows)))
        behind = asyncio.ensure_future(dp.begin(module, numbered(num_rows) + 10))
        await asyncio.sleep(0)
        gate.set()
        return await held, await behind

    held, behind = dp.runner.run(both(4))
    assert held.tolist() == [[1.0]] * 4
    assert behind.tolist() == [[2.0]] * 4
    gate.clear()
    held, behind = dp.runner.run(both(1))  # the second would find lane 1 free, but its count would be lost
    assert (held.item(), behind.item(), module.counter.item()) == (3.0, 4.0, 5.0)


def test_batches_on_one_lane_each() -> None:
    """Whole batches on whichever lane is free are right; where buffers change, none of them is lost."""

    def count(m: Any, x: Tensor) -> Tensor:
        m.counter.add_(1)
        return x * 2

    module = Fn(count)
    module.register_buffer("counter", torch.zeros(1))

    async def several() -> list[Tensor]:
        async with asyncdp.DataParallel(module, "cpu*2") as engine:
            return await asyncio.gather(*(engine.on_one_lane(numbered(rows)) for rows in range(1, 9)))

    for rows, found in enumerate(asyncio.run(several()), start=1):
        assert torch.equal(found, numbered(rows) * 2)
    assert module.counter == 8


@pytest.mark.anyio
async def test_change_behind_autograd_needs_refresh_on_another_device() -> None:
    """`refresh` makes copies notice what `parameter.data` did without a trace."""
    module, x = nn.Linear(1, 1, bias=False), torch.ones(2, 1)
    async with (
        asyncdp.Runtime(fake_devices(2)) as runtime,
        asyncdp.DataParallel(module, runtime=runtime, num_lanes="all") as engine,
    ):
        with torch.no_grad():
            before = await engine(x)
            module.weight.data.fill_(7)
            assert torch.equal(await engine(x), before)
            engine.refresh()
            assert torch.equal(await engine(x), torch.full((2, 1), 7.0))
