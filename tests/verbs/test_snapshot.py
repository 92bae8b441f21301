"""A snapshot of a module is current for as long as nothing that replicas are made of changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asyncdp._replicas.snapshot import ModuleSnapshot

from .models import MODULES


def net() -> Any:
    """Tied and shared parts, an empty place, a list of layers, and plain attributes."""
    module: Any = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1)))
    module[1][1].weight = module[0].weight
    module.shared = module[1][1]
    module.register_module("absent", None)
    module.register_buffer("count", torch.zeros(1))
    module.layers = [module[0], module[1]]
    module.scale, module.kind, module.constant = 1, "a", torch.ones(1)
    module.flag = True
    return module


def replace_parameter(module: Any) -> None:
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())


def move_last(module: Any) -> None:
    module._modules["0"] = module._modules.pop("0")


def rename(module: Any) -> None:
    module.other = module.__dict__.pop("kind")


def become(module: Any) -> None:
    module[1][0].__class__ = nn.AlphaDropout


def replace_namespace(module: Any) -> None:
    module[0].__dict__ = dict(module[0].__dict__, in_features=7)


STRUCTURAL: list[Callable[[Any], object]] = [
    replace_parameter,
    move_last,
    rename,
    become,
    lambda module: module[1].append(nn.ReLU()),
    lambda module: module.add_module("absent", nn.ReLU()),
    lambda module: setattr(module, "count", module.count.clone()),
    lambda module: setattr(module, "constant", torch.ones(1)),
    lambda module: setattr(module, "scale", torch.ones(())),
    lambda module: setattr(module, "flag", torch.tensor(True)),
    lambda module: module.layers.reverse(),
    lambda module: setattr(module, "layers", list(module.layers)),
    lambda module: module[0].register_forward_hook(print),
    lambda module: module.__dict__.pop("kind"),
    lambda module: setattr(module, "new", 1),
]

PLAIN: list[tuple[Callable[[Any], object], dict[tuple[int, str], Any]]] = [
    (lambda module: setattr(module, "scale", 1.0), {(0, "scale"): 1.0}),
    (lambda module: setattr(module, "scale", True), {(0, "scale"): True}),
    (lambda module: setattr(module, "flag", 1), {(0, "flag"): 1}),
    (lambda module: setattr(module, "kind", None), {(0, "kind"): None}),
    (lambda module: module[1][0].eval(), {(3, "training"): False}),
    (replace_namespace, {(1, "in_features"): 7}),
]


def test_modules_and_tensors_are_found_as_torch_finds_them() -> None:
    """Modules, parameters and buffers come once each, in the order in which the module gives them."""
    module = net()
    module[1].above = module[1]
    snapshot = ModuleSnapshot.capture(module)
    assert snapshot.modules == [*module.modules()]
    assert [*map(id, snapshot.parameters)] == [*map(id, module.parameters())]
    assert [*map(id, snapshot.buffers)] == [*map(id, module.buffers())]
    assert snapshot.buffer_owners == [0]


@pytest.mark.parametrize("name", MODULES)
def test_nothing_changed(name: str) -> None:
    """A snapshot stays current through a forward that changes nothing but values."""
    module = MODULES[name].make().eval()
    module = module if name == "complex" else module.double()
    x = MODULES[name].batch()
    module(x)
    snapshot = ModuleSnapshot.capture(module)
    for tensor in snapshot.tensors:
        tensor.data.mul_(1)
    assert snapshot.is_current()
    assert snapshot.has_same_parts()
    assert snapshot.plain_changes(ModuleSnapshot.capture(module)) == {}


@pytest.mark.parametrize("change", STRUCTURAL)
def test_structural_changes(change: Callable[[Any], object]) -> None:
    """Anything replaced, added, removed, renamed or reordered is seen, even if it equals what was there."""
    module = net()
    snapshot = ModuleSnapshot.capture(module)
    change(module)
    assert not snapshot.is_current()
    assert snapshot.plain_changes(ModuleSnapshot.capture(module)) is None


@pytest.mark.parametrize(("change", "expected"), PLAIN)
def test_plain_changes(change: Callable[[Any], object], expected: dict[tuple[int, str], Any]) -> None:
    """New values of plain attributes are seen with their types, and named by module and attribute."""
    module = net()
    snapshot = ModuleSnapshot.capture(module)
    change(module)
    assert not snapshot.is_current()
    found = snapshot.plain_changes(ModuleSnapshot.capture(module))
    assert found == expected
    assert [*map(type, found.values())] == [*map(type, expected.values())]


def test_a_later_change_does_not_reach_a_snapshot() -> None:
    """What a snapshot says of modes and attributes is as of its moment."""
    module = net()
    snapshot = ModuleSnapshot.capture(module)
    module.eval()
    module.kind = "b"
    assert all(snapshot.training)
    assert snapshot.namespaces[0]["kind"] == "a"
    assert not snapshot.has_same_modes()
    assert snapshot.has_same_parts()


def test_values_that_cannot_be_compared() -> None:
    """An attribute whose comparison raises counts as changed when it is replaced."""

    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ValueError

        __hash__ = None  # type: ignore[assignment]

    module = nn.Linear(1, 1)
    module.odd = Odd()
    snapshot = ModuleSnapshot.capture(module)
    assert snapshot.is_current()
    module.odd = Odd()
    assert not snapshot.is_current()


def test_a_snapshot_does_not_keep_its_module() -> None:
    """A module that only its own snapshot refers to is freed at once, and the snapshot is not current."""
    gc.disable()
    try:
        module: Any = nn.Sequential(nn.Linear(1, 1))
        module.__dict__["_asyncdp_replicas"] = snapshot = ModuleSnapshot.capture(module)
        assert snapshot.is_current()
        reference: weakref.ref[nn.Module] = weakref.ref(module)
        weight: weakref.ref[Tensor] = weakref.ref(module[0].weight)
        del module
        assert reference() is None
        assert not snapshot.is_current()
        del snapshot
        assert weight() is None
    finally:
        gc.enable()
