"""Whole passes: how batches are split, where things are, and what modules may be."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asyncdp

from ..notes import Notes
from .conftest import Passes
from .models import Fn, numbered


class Shards(nn.Module):
    """Notes the rows each lane got."""

    def __init__(self) -> None:
        super().__init__()
        self.got = Notes()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.got.append(x[:, 0].tolist())
        return x


@pytest.mark.parametrize(
    ("num_rows", "sizes"), [(9, [2, 2, 2, 3]), (4, [1, 1, 1, 1]), (2, [1, 1]), (1, [1]), (0, [0])]
)
def test_rows_are_split_over_lanes(dp: Passes, num_rows: int, sizes: list[int]) -> None:
    """Contract 1: balanced shards on as many lanes as there are rows; an empty batch runs on one."""
    module, x = Shards(), numbered(num_rows)
    assert torch.equal(dp(module, x, lanes=4), x)
    assert sorted(len(rows) for rows in module.got) == sizes
    assert sorted(row for rows in module.got for row in rows) == x[:, 0].tolist()


def test_lengths_are_checked_before_anything_runs(dp: Passes) -> None:
    """Contract 2: inputs of unlike length run nothing at all, and the error names them as the caller does."""
    module = Shards()
    with pytest.raises(ValueError, match="argument 0 has 4 and keyword 'y' has 3"):
        dp(module, numbered(4), y=numbered(3))
    with pytest.raises(ValueError, match=r"argument 1\['mask'\] has 4 and keyword 'y'\[1\] has 3"):
        dp(module, None, {"mask": numbered(4)}, y=["text", numbered(3)])
    assert not module.got


@dataclass
class Answer:
    """What a module may return."""

    logits: Tensor
    cache: list[dict[str, Tensor]]
    name: str
    nothing: None = None


def test_nested_values_go_through(dp: Passes) -> None:
    """Contract 3: trees in, trees out, with what is no tensor repeated and returned once."""

    def forward(_m: Any, x: Tensor, *, extra: dict[str, Any]) -> Any:
        assert (extra["flag"], extra["none"], extra["scale"].shape) == (True, None, ())
        y = x * extra["scale"] + extra["more"][0]
        return OrderedDict(answer=Answer(y, [{"k": x}, {}], "name"), empty=())

    found = dp(
        Fn(forward),
        numbered(5),
        extra={"flag": True, "none": None, "scale": torch.tensor(2.0), "more": [numbered(5)]},
    )
    assert type(found) is OrderedDict
    assert found == OrderedDict(answer=found["answer"], empty=())
    assert torch.equal(found["answer"].logits, numbered(5) * 3)
    assert torch.equal(found["answer"].cache[0]["k"], numbered(5))
    assert (found["answer"].cache[1], found["answer"].name, found["answer"].nothing) == ({}, "name", None)


def test_no_inputs_run_once(dp: Passes) -> None:
    """A module without inputs runs on one lane."""
    ran: list[int] = []
    module = Fn(lambda m: ran.append(1) or torch.ones(2))
    assert torch.equal(dp(module), torch.ones(2))
    assert ran == [1]


def test_split_along_another_dimension() -> None:
    """`dim` says which dimension is split and put together."""
    module, x = nn.Softmax(dim=0), torch.randn(3, 7)
    found = asyncio.run(asyncdp.data_parallel(module, x, "cpu*3", dim=1))
    torch.testing.assert_close(found, module(x))


def test_one_device_runs_the_module_itself(dp: Passes) -> None:
    """Contract 12: with one lane the module is not copied; changes it makes to itself stay."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls = m.calls + 1
        m.mark = m.mark + 1
        return x.sum()

    module = Fn(forward, calls=0)
    module.register_buffer("mark", torch.zeros(1))
    for _ in range(2):
        assert dp(module, numbered(4), lanes=1).shape == ()
    assert (module.calls, module.mark.item()) == (2, 2.0)


def test_outputs_of_parallel_apply_are_on_their_devices() -> None:
    """Contract 11: outputs go to the given devices; with none given, to where each input is."""
    x = torch.ones(2)
    for devices in (None, "cpu*2"):
        found = asyncio.run(asyncdp.parallel_apply([nn.Identity()] * 2, [x, (x * 2,)], devices=devices))
        assert [each.tolist() for each in found] == [[1, 1], [2, 2]]
        assert {each.device.type for each in found} == {"cpu"}
    assert asyncio.run(asyncdp.parallel_apply([], [])) == []


def test_keyword_arguments_of_parallel_apply() -> None:
    """Each module gets its own keyword arguments."""
    module = Fn(lambda m, x, *, times: x * times)
    x = torch.ones(1)
    found = asyncio.run(asyncdp.parallel_apply([module, module], [x, x], kwargs=[{"times": 2}, {"times": 3}]))
    assert [each.item() for each in found] == [2, 3]


def test_parallel_apply_with_more_modules_than_lanes() -> None:
    """Modules share the default lanes when there are more of them."""
    found = asyncio.run(asyncdp.parallel_apply([nn.Identity()] * 9, [torch.tensor([k]) for k in range(9)]))
    assert [each.item() for each in found] == list(range(9))


def test_hooks_run_in_every_lane(dp: Passes) -> None:
    """Contract 18: forward, pre and full backward hooks run once per replica, bound methods included."""

    class Recorder:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def before(self, _module: nn.Module, _args: Any) -> None:
            self.calls.append("before")

        def after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
            self.calls.append("after")

        def backward(self, _module: nn.Module, _grad_in: Any, grad_out: Any) -> None:
            self.calls.append(f"backward {len(grad_out[0])}")

    recorder = Recorder()
    module = nn.Sequential(nn.Linear(3, 3))
    module[0].register_forward_pre_hook(recorder.before)
    module[0].register_forward_hook(recorder.after)
    module[0].register_full_backward_hook(recorder.backward)
    dp(module, torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert sorted(recorder.calls) == ["after"] * 2 + ["backward 2"] * 2 + ["before"] * 2


def test_exported_module() -> None:
    """The module of an exported program runs in lanes and as replicas."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (torch.randn(4, 3),), dynamic_shapes=({0: batch},))
    module, x = program.module(), torch.randn(6, 3)
    torch.testing.assert_close(asyncio.run(asyncdp.data_parallel(module, x, "cpu*2")), net(x))
    for replica in asyncdp.replicate(module, "cpu*2"):
        torch.testing.assert_close(replica(x), net(x))


def test_traced_module(dp: Passes) -> None:
    """A module traced by torch.fx runs in lanes, and learns."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    module, x = torch.fx.symbolic_trace(net), torch.randn(6, 3)
    found = dp(module, x)
    torch.testing.assert_close(found, net(x))
    found.sum().backward()
    assert net[0].weight.grad is not None


def test_module_compiled_in_place_runs_uncompiled(dp: Passes) -> None:
    """After `module.compile()` replicas run the plain forward, on their own parameters."""
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    module = Fn(lambda m, x: m.layer(x).relu(), layer=nn.Linear(3, 3))
    module.compile(backend=backend)
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match=r"compile\(\) is ignored"):
        found = dp(module, x)
    torch.testing.assert_close(found, module.layer(x).relu())
    found.sum().backward()
    assert module.layer.weight.grad is not None
    assert not calls


def test_many_passes_at_once_keep_apart(dp: Passes) -> None:
    """Passes under way together, learning and not, each get their own result."""
    module = nn.Linear(3, 3)
    batches = [torch.randn(1 + k % 5, 3) for k in range(40)]

    async def all_at_once() -> list[Tensor]:
        return await asyncio.gather(*(dp.begin(module, x) for x in batches))

    for x, found in zip(batches, dp.runner.run(all_at_once()), strict=True):
        torch.testing.assert_close(found, module(x))


def test_two_loops_share_a_module() -> None:
    """Two event loops in two threads may run the same module at the same time."""
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    wrong: list[Any] = []

    async def several() -> None:
        for _ in range(30):
            x = torch.randn(4, 3)
            found = await asyncdp.data_parallel(module, x, "cpu*2")
            if not torch.allclose(found, module(x), atol=1e-6):
                wrong.append(found)

    threads = [threading.Thread(target=lambda: asyncio.run(several())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_tensors_in_plain_attributes_are_shared(dp: Passes) -> None:
    """A tensor that is no parameter and no buffer is used as it is, and its change is seen."""
    module = Fn(lambda m, x: x + m.offset, offset=torch.ones(1))
    x = torch.zeros(4, 1)
    assert dp(module, x).tolist() == [[1.0]] * 4
    module.offset.add_(1)
    assert dp(module, x).tolist() == [[2.0]] * 4
    module.offset = torch.full((1,), 5.0)
    assert dp(module, x).tolist() == [[5.0]] * 4
