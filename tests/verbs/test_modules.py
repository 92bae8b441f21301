"""Whatever a module is made of, a pass gives the values and gradients of the plain module."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import asyncdp

from .conftest import Passes
from .models import MODULES, Fn


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the gradients of all parameters and buffers, by name."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.grad for name, tensor in tensors if tensor.is_leaf}


def assert_same(
    found: dict[str, Tensor | None], expected: dict[str, Tensor | None], **tolerance: float
) -> None:
    """Compare two sets of gradients."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients_are_those_of_the_plain_module(dp: Passes, name: str) -> None:
    """Contract 4, 5, 7: three passes, the second without gradients, equal three of the plain module."""
    case = MODULES[name]
    module = case.make()
    module = module if name == "complex" else module.double()
    twin = copy.deepcopy(module) if "norm, old" not in name else _twin(name, module)
    for step in range(3):
        x = case.batch().requires_grad_()
        y = x.detach().clone().requires_grad_()
        with torch.set_grad_enabled(step != 1):
            found, expected = dp(module, x), twin(y)
        torch.testing.assert_close(found, expected)
        assert found.requires_grad == expected.requires_grad
        if step != 1:
            found.abs().square().sum().backward()
            expected.abs().square().sum().backward()
            torch.testing.assert_close(x.grad, y.grad)
    assert_same(gradients(module), gradients(twin))


def _twin(name: str, module: nn.Module) -> nn.Module:
    # The old norms keep a computed weight, which deepcopy refuses.
    twin = MODULES[name].make().double()
    twin.load_state_dict(module.state_dict())
    return twin


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_replicas_stand_alone(name: str, detach: bool) -> None:
    """Contract 4: a replica has the names, parameters and results of the original, and storage of its own."""
    case = MODULES[name]
    module = case.make()
    module = module if name == "complex" else module.double()
    module.eval()
    x = case.batch()
    for replica in asyncdp.replicate(module, "cpu*2", detach=detach):
        assert type(replica) is type(module)
        assert replica.state_dict().keys() == module.state_dict().keys()
        assert [key for key, _ in replica.named_modules()] == [key for key, _ in module.named_modules()]
        own = {tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
        theirs = [*replica.parameters(), *replica.buffers()]
        assert len(theirs) == len([*module.parameters(), *module.buffers()])
        assert own.isdisjoint(tensor.data_ptr() for tensor in theirs)
        for tensor, original in zip(replica.parameters(), module.parameters(), strict=True):
            assert isinstance(tensor, nn.Parameter)
            assert tensor.requires_grad == (original.requires_grad and not detach)
            assert tensor.is_leaf == detach
        torch.testing.assert_close(replica(x), module(x))


class Config:
    """Holds what cannot be copied before what can."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.factor = 3.0


def test_attributes_of_replicas() -> None:
    """Plain attributes are the replica's own; what cannot be copied is shared, whole, by all who have it."""
    config, notes = Config(), [1]
    part = Fn(lambda m, x: x * m.config.factor, config=config, notes=notes)
    module = Fn(lambda m, x: m.part(x) * m.config.factor, part=part, config=config, notes=notes)
    for replica in asyncdp.replicate(module, "cpu*2"):
        assert replica(torch.ones(1)) == 9
        assert replica.config is replica.part.config is config
        assert replica.notes == notes
        assert replica.notes is replica.part.notes
        assert replica.notes is not notes


def test_hooks_of_replicas_are_those_of_the_module() -> None:
    """Contract 18: what a replica's hooks note, their owner sees; a hook added to one is that one's own."""

    class Notes:
        def __init__(self) -> None:
            self.calls = 0

        def note(self, *_: object) -> None:
            self.calls += 1

    notes, own = Notes(), Notes()
    module = nn.Sequential(nn.Linear(1, 1))
    module.register_forward_hook(notes.note)
    module[0].register_forward_pre_hook(notes.note)
    replicas = asyncdp.replicate(module, "cpu*2")
    replicas[0].register_forward_hook(own.note)
    for replica in replicas:
        replica(torch.ones(1, 1))
    assert (notes.calls, own.calls) == (4, 1)
    module(torch.ones(1, 1))
    assert (notes.calls, own.calls) == (6, 1)
