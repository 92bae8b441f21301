"""Replicas that are kept follow every change of the module they belong to."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import asyncdp
from asyncdp._replicas.replica import Replica
from asyncdp._replicas.state import CACHE_ATTRIBUTE

from .conftest import Passes
from .models import Fn, Hooked, Tied, rows

pytestmark = pytest.mark.filterwarnings("ignore:.*lazily.*")


def net() -> nn.Sequential:
    """Two layers with a part that differs between train and eval."""
    return nn.Sequential(nn.Linear(3, 3), nn.Dropout(1.0), nn.Linear(3, 3)).double().eval()


def replace_layer(module: Any) -> None:
    module[0] = nn.Linear(3, 3).double()


def add_parameter(module: Any) -> None:
    module[0].extra = nn.Parameter(torch.randn(3).double())
    module[0].forward = lambda x, layer=module[0]: nn.functional.linear(x, layer.weight) + layer.extra


def rebind_forward(module: Any) -> None:
    module[0].forward = (lambda self, x: x * 2 + self.bias).__get__(module[0])


def tie(module: Any) -> None:
    module[2].weight = module[0].weight


def hook(module: Any) -> None:
    module[0].register_forward_hook(lambda _module, _args, output: output * 3)


def pre_hook(module: Any) -> None:
    module[0].register_forward_pre_hook(lambda _module, args: (args[0] + 1,))


def parametrize(module: Any) -> None:
    parametrizations.weight_norm(module[0])


def remove_bias(module: Any) -> None:
    module[0].bias = None


def add_module(module: Any) -> None:
    module.append(nn.Tanh())


def step_in_place(module: Any) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)


def step_behind(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(0.5)


def load(module: Any) -> None:
    module.load_state_dict({key: value + 1 for key, value in module.state_dict().items()})


def freeze(module: Any) -> None:
    module[0].requires_grad_(False)


CHANGES: list[Callable[[Any], None]] = [
    replace_layer,
    rebind_forward,
    tie,
    hook,
    pre_hook,
    parametrize,
    remove_bias,
    add_module,
    step_in_place,
    step_behind,
    load,
    freeze,
    lambda module: module.train(),
    lambda module: setattr(module[1], "p", 0.0) or module.train(),
    lambda module: module.float().double(),
    lambda module: module[0].register_buffer("new", torch.ones(3)),
    lambda module: setattr(module[1], "note", "an attribute that was not there"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_seen(dp: Passes, change: Callable[[Any], None]) -> None:
    """Contract 18: the pass after a change gives the values and gradients of the changed module."""
    module, x = net(), rows(3)()
    dp(module, x).sum().backward()
    module.zero_grad()
    change(module)
    twin = copy.deepcopy(module)
    found, expected = dp(module, x), twin(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_dtype_change_is_seen(dp: Passes) -> None:
    """After `module.to(dtype)` replicas compute in that dtype."""
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    dp(module, rows(3, dtype=torch.float32)())
    module.to(torch.float64)
    assert dp(module, rows(3)()).dtype == torch.float64


def test_hook_beside_an_own_one_is_seen_and_forgotten(dp: Passes) -> None:
    """A hook put beside one that replicas had to rebind runs in them, and no longer once removed."""
    module, x = Hooked().double(), rows(3)()
    before = dp(module, x)
    handle = module.layer.register_forward_hook(lambda _module, _args, output: output + 1)
    torch.testing.assert_close(dp(module, x), before + 1)
    handle.remove()
    torch.testing.assert_close(dp(module, x), before)


def test_own_hook_put_in_later_is_rebound(dp: Passes) -> None:
    """A method of the module that becomes a hook after a pass runs as each replica's, not the original's."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def check(self, layer: nn.Module, _args: Any) -> None:
            assert layer is self.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    module, x = Late().double(), rows(3)()
    before = dp(module, x)
    module.layer.register_forward_pre_hook(module.check)
    torch.testing.assert_close(dp(module, x), before)


def test_edited_list_of_parts_is_seen(dp: Passes) -> None:
    """A plain list of layers that is edited in place changes what replicas run."""
    first, second = nn.Linear(3, 3).double(), nn.Tanh()
    module = Fn(lambda m, x: m.order[1](m.order[0](x)), first=first, second=second, order=[first, second])
    x = rows(3)()
    torch.testing.assert_close(dp(module, x), second(first(x)))
    module.order.reverse()
    torch.testing.assert_close(dp(module, x), first(second(x)))


def run_nested(m: Any, x: Tensor) -> Tensor:
    for each in (*m.order[0]["first"], *m.order[1], *m.order[2][0]):
        x = each(x)
    return x


def swap(order: Any) -> None:
    order[0]["first"].reverse()


def move_over(order: Any) -> None:
    order[1].append(order[2][0].pop(0))


def fill(order: Any) -> None:
    order[1].append(nn.Tanh())


def put_in(order: Any) -> None:
    order[0]["first"][0] = nn.Tanh()


def rename(order: Any) -> None:
    order[0]["second"] = order[0].pop("first")
    order[0]["first"] = []


@pytest.mark.parametrize("change", [swap, move_over, fill, put_in, rename])
def test_edited_containers_within_containers_are_seen(dp: Passes, change: Callable[[Any], None]) -> None:
    """Lists and dicts of layers are followed however deep they are, also inside tuples and when empty."""
    first, second = nn.Linear(3, 3).double(), nn.Tanh()
    order = [{"first": [first, second]}, [], ([nn.Linear(3, 3).double(), nn.Sigmoid()],)]
    module = Fn(run_nested, first=first, third=order[2][0][0], order=order)
    x = rows(3)()
    torch.testing.assert_close(dp(module, x), module(x))
    change(module.order)
    torch.testing.assert_close(dp(module, x), module(x))


def test_entry_that_moves_to_the_list_beside_is_seen(dp: Passes) -> None:
    """A layer moved from the front of one list to the end of the list before changes what replicas run."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for each in m.before:
            x = each(x)
        return x if not m.after else -x

    first, second = nn.Tanh(), nn.Sigmoid()
    module = Fn(forward, first=first, second=second, before=[first], after=[second])
    x = rows(3)()
    torch.testing.assert_close(dp(module, x), module(x))
    module.before.append(module.after.pop(0))
    torch.testing.assert_close(dp(module, x), module(x))


def test_entry_under_another_name_is_seen(dp: Passes) -> None:
    """A layer of a plain dict that gets another key is found under that key by replicas."""
    head, names = nn.Tanh(), ["a"]
    module = Fn(lambda m, x: m.heads[names[0]](x), head=head, heads={"a": head})
    x = rows(3)()
    torch.testing.assert_close(dp(module, x), module(x))
    names[0] = "b"
    module.heads["b"] = module.heads.pop("a")
    torch.testing.assert_close(dp(module, x), module(x))


def test_own_methods_rebound_twice_are_seen(dp: Passes) -> None:
    """A forward rebound twice between passes is noticed although the method's address may come again."""
    module, x = nn.Identity(), rows(3)()
    for factor in range(6):
        for _ in range(2):
            module.forward = (lambda self, x, factor=factor: x * factor).__get__(module)
            assert module.forward is not None
        torch.testing.assert_close(dp(module, x), x * factor)


def test_plain_loop_copies_nothing_anew(dp: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and evaluating in turn in a loop makes replicas once only."""
    made = []
    original = Replica.__init__

    def counted(self: Replica, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Replica, "__init__", counted)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    x = torch.randn(8, 3)
    for _ in range(4):
        module.train()
        optimizer.zero_grad()
        dp(module, x).sum().backward()
        optimizer.step()
        module.eval()
        with torch.no_grad():
            torch.testing.assert_close(dp(module, x), module(x))
    assert len(made) == 2


def test_pass_keeps_the_mode_of_its_call(dp: Passes) -> None:
    """A module switched to eval while a pass waits in its lanes does not change that pass."""
    import asyncio
    import threading

    gate = threading.Event()

    def held(m: Any, x: Tensor) -> Tensor:
        if x[0, 0] == 1:
            assert gate.wait(20)
        return torch.full_like(x, float(m.training))

    module = Fn(held)
    dp(module, torch.zeros(4, 1))

    async def both() -> tuple[Tensor, Tensor]:
        first = asyncio.ensure_future(dp.begin(module, torch.ones(4, 1)))
        second = asyncio.ensure_future(dp.begin(module, torch.full((4, 1), 2.0)))
        await asyncio.sleep(0)
        module.eval()
        third = asyncio.ensure_future(dp.begin(module, torch.full((4, 1), 3.0)))
        await asyncio.sleep(0)
        gate.set()
        await first
        return await second, await third

    second, third = dp.runner.run(both())
    assert second.tolist() == [[1.0]] * 4
    assert third.tolist() == [[0.0]] * 4


def test_replicas_leave_no_trace_in_copies_and_files(dp: Passes) -> None:
    """A module that was passed through lanes can be copied, saved and loaded; its state is as it was."""
    module, x = Tied(), torch.randn(4, 3)
    keys = list(module.state_dict())
    expected = dp(module, x)
    assert list(module.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(module, buffer)
    assert b"_replica_set" not in buffer.getvalue(), "the file could be loaded only where asyncdp is"
    buffer.seek(0)
    assert not copy.deepcopy(module).__dict__.get(CACHE_ATTRIBUTE), (
        "the copy would keep the original's replicas alive"
    )
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(dp(other, x), expected)
        with torch.no_grad():
            other.a.bias.add_(1)
        torch.testing.assert_close(dp(other, x), other(x))
        torch.testing.assert_close(dp(module, x), expected)
        assert other.b.weight is other.a.weight
        assert other.a.weight is not module.a.weight


def test_shallow_copy_has_replicas_of_its_own(dp: Passes) -> None:
    """`copy.copy` of a module that was passed through lanes is a module of its own."""
    module, x = nn.Dropout(1.0), torch.ones(4, 1)
    dp(module, x)
    other = copy.copy(module)
    other.eval()
    assert dp(other, x).sum() == 4
    assert dp(module, x).sum() == 0


def test_replicas_can_be_saved(tmp_path: Any) -> None:
    """Contract 18: a replica, attached or not, goes through torch.save and comes back equal."""
    module, x = Tied(), torch.randn(4, 3)
    for detach in (False, True):
        replica = asyncdp.replicate(module, "cpu*2", detach=detach)[1]
        torch.save(replica, tmp_path / "replica.pt")
        loaded = torch.load(tmp_path / "replica.pt", weights_only=False)
        torch.testing.assert_close(loaded(x), module(x))
        torch.save(replica.state_dict(), tmp_path / "state.pt")
        fresh = Tied()
        fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        torch.testing.assert_close(fresh(x), module(x))
