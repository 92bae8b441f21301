"""Nothing outlives its use: modules, batches, graphs and errors go without the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asyncdp

from .conftest import Passes
from .models import MODULES, Case, Fn

# None that torch itself puts into a cycle, as it does with parametrized modules.
SOME = ["linear", "lstm", "tied", "lists of parameters", "spectral_norm, old"]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the collector, only what is in no cycle goes away."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def gone(references: list[weakref.ref[Any]]) -> bool:
    """Whether everything is gone, as soon as the lanes have put down what they hold."""
    idle = threading.Event()
    for _ in range(500):
        if all(reference() is None for reference in references):
            return True
        idle.wait(0.01)  # a lane lets go of its last work only after it has woken the caller
    return False


def passes(dp: Passes, case: Case) -> list[weakref.ref[Any]]:
    """Train, evaluate and drop a module; return references to all of it."""
    module, x = case.make(), case.batch()
    module = module.double()
    for _ in range(2):
        y = dp(module, x)
        y.abs().sum().backward()
    with torch.no_grad():
        dp(module.eval(), x)
    return [weakref.ref(each) for each in (*module.modules(), *module.parameters(), *module.buffers(), x, y)]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("no_collector")
def test_dropped_module_goes(dp: Passes, name: str) -> None:
    """Contract 18: a module, its parameters, the batch and the graph are freed when the caller drops them."""
    references = passes(dp, MODULES[name])
    dp.forget()
    assert gone(references)


@pytest.mark.usefixtures("no_collector")
def test_batch_goes_while_the_module_stays(dp: Passes) -> None:
    """Between passes neither lanes nor replicas hold the last batch or its activations."""
    kept: list[weakref.ref[Any]] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.layer(x)
        kept.append(weakref.ref(hidden))
        return hidden.relu()

    module = Fn(forward, layer=nn.Linear(3, 3))
    x = torch.randn(4, 3)
    y = dp(module, x)
    kept += [weakref.ref(x), weakref.ref(y)]
    del x, y
    assert gone(kept)


def test_module_whose_hook_refers_to_it_goes(dp: Passes) -> None:
    """A module in a cycle of its own making is collected; no table of ours holds it."""

    def use() -> weakref.ref[nn.Module]:
        module = nn.Linear(3, 3)
        module.register_forward_hook(lambda _module, _args, output: output + module.bias)
        dp(module, torch.randn(4, 3))
        return weakref.ref(module)

    reference = use()
    dp.forget()
    gc.collect()
    assert gone([reference])


@pytest.mark.usefixtures("no_collector")
def test_failed_pass_leaves_nothing(dp: Passes) -> None:
    """An exception and the tensors its traceback holds go when the caller drops it."""

    class Broken(Exception):
        pass

    def forward(_m: Any, x: Tensor) -> Tensor:
        raise Broken

    def fail() -> list[weakref.ref[Any]]:
        x = torch.randn(4, 3)
        module = Fn(forward)
        references: list[weakref.ref[Any]] = [weakref.ref(x), weakref.ref(module)]
        try:
            dp(module, x)
        except Broken as error:
            references.append(weakref.ref(error))
            error.__traceback__ = None  # holds this very frame, and so x
        return references

    references = fail()
    dp.forget()
    assert gone(references)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("no_collector")
def test_replicas_go(name: str, detach: bool) -> None:
    """Contract 18: replicas are in no reference cycle."""
    case = MODULES[name]
    module = case.make().double()

    def use(release: Callable[[], Any]) -> list[weakref.ref[Any]]:
        replicas = asyncdp.replicate(module, "cpu*2", detach=detach)
        for replica in replicas:
            replica(case.batch())
        release()
        return [
            weakref.ref(each) for replica in replicas for each in (*replica.modules(), *replica.parameters())
        ]

    assert gone(use(gc.disable))


@pytest.mark.usefixtures("no_collector")
def test_many_passes_leave_no_tensors(dp: Passes) -> None:
    """The number of tensors alive does not grow with the number of passes."""
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def step() -> None:
        dp(module, torch.randn(6, 3), lanes=3).sum().backward()
        with torch.no_grad():
            dp(module.eval(), torch.randn(6, 3), lanes=3)
        module.train()

    def count() -> int:
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    for _ in range(3):
        step()
    before = count()
    for _ in range(20):
        step()
    assert count() <= before + 4  # the lanes may still hold a few of the last pass


def test_many_modules_leave_no_threads() -> None:
    """The functional form starts its lanes once, whatever it is called with."""
    asyncio.run(asyncdp.data_parallel(nn.Identity(), torch.zeros(4), "cpu*4"))
    before = threading.active_count()
    for _ in range(5):
        asyncio.run(asyncdp.data_parallel(nn.Linear(1, 1), torch.zeros(4, 1), "cpu*4"))
    assert threading.active_count() == before
