"""Modules that lanes cannot run as they are, or run without a part, say so before anything runs."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import asyncdp
from asyncdp import errors

from .models import Fn, numbered

pytestmark = pytest.mark.anyio

# The first optimizer imports torch's compiler, which no event loop may wait for.
torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.ReLU(), nn.Linear(1, 1))


def with_meta_buffer() -> nn.Module:
    module = nn.Sequential(nn.BatchNorm1d(1))
    module[0].running_mean = torch.empty(1, device="meta")
    return module


def dispatched() -> nn.Module:
    """Return a module as accelerate leaves it: hooks on its parts, weights wherever they are."""
    module = nn.Sequential(nn.Linear(1, 1))
    module[0]._hf_hook = SimpleNamespace(offload=True)
    return module


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (on_meta, errors.MetaTensorError, ["parameter '1.weight'", "meta device", "to_empty"]),
        (with_meta_buffer, errors.MetaTensorError, ["buffer '0.running_mean'", "load_state_dict"]),
        (dispatched, errors.OffloadedModuleError, ["accelerate", "device_map", "remove_hook_from_module"]),
    ],
)
@pytest.mark.parametrize("devices", ["cpu", "cpu*2"])
async def test_modules_without_values(make: Any, error: Any, words: list[str], devices: str) -> None:
    """Modules on the meta device, or offloaded, are refused by every form, with a remedy."""
    module = make()
    with pytest.raises(error) as first:
        await asyncdp.data_parallel(module, numbered(4), devices)
    with pytest.raises(error) as second:
        asyncdp.DataParallel(module, devices)
    with pytest.raises(error):
        asyncdp.replicate(module, devices)
    for caught in (first, second):
        assert isinstance(caught.value, (ValueError, TypeError))
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("num_lanes", [1, "all", "auto"])
async def test_inputs_without_values(num_lanes: Any) -> None:
    """An input on the meta device is refused before forward runs."""
    ran: list[Any] = []
    module = Fn(lambda m, x, y: ran.append(1) or x)
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes=num_lanes) as engine:
        with pytest.raises(errors.MetaTensorError, match="meta device"):
            await engine(numbered(4), y=torch.empty(4, device="meta"))
        with pytest.raises(errors.MetaTensorError, match="real device"):
            await engine.on_one_lane(numbered(4), y=torch.empty(4, device="meta"))
    assert not ran


@pytest.fixture
def compiled() -> nn.Module:
    """A module after its `compile()`, which no event loop may wait for."""
    module = nn.Linear(1, 1)
    module.compile(backend="eager")
    return module


async def test_compile_in_place_is_ignored_with_a_warning(compiled: nn.Module) -> None:
    """`module.compile()` compiles nothing for replicas: said once, and the results are right."""
    module = compiled
    with pytest.warns(UserWarning, match=r"Linear\.compile\(\) is ignored"):
        found = await asyncdp.data_parallel(module, numbered(4), "cpu*2")
    torch.testing.assert_close(found, module.forward(numbered(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
            torch.testing.assert_close(await engine(numbered(4)), found)


@pytest.mark.parametrize("devices", ["cpu", "cpu*2"])
async def test_hooks_for_saved_tensors_reach_the_lanes(devices: str) -> None:
    """A `saved_tensors_hooks` block around the call packs what forwards save, on every lane."""
    packed: list[int] = []
    unpacked: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(len(tensor))
        return tensor * 2

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(len(tensor))
        return tensor / 2

    module = Fn(lambda m, x: (x * m.scale).exp(), scale=nn.Parameter(torch.full((1,), 0.5)))
    with saved_tensors_hooks(pack, unpack):
        found = await asyncdp.data_parallel(module, numbered(4), devices)
    count = len(packed)
    assert count >= 2 * (2 if devices == "cpu*2" else 1)
    found.sum().backward()
    assert len(unpacked) == count
    expected = (numbered(4) * (numbered(4) * 0.5).exp()).sum()
    torch.testing.assert_close(module.scale.grad, expected.reshape(1))
    await asyncdp.data_parallel(module, numbered(4), devices)
    assert len(packed) == count  # outside of the block nothing is packed


async def test_save_on_cpu_in_a_step() -> None:
    """Torch's own block for saved tensors leaves a training step what it is."""
    module = nn.Linear(1, 1)
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
        optimizer = torch.optim.SGD(module.parameters(), 0.0)
        plain = await engine.train_step(numbered(4), numbered(4), nn.functional.mse_loss, optimizer)
        with save_on_cpu():
            saved = await engine.train_step(numbered(4), numbered(4), nn.functional.mse_loss, optimizer)
    assert torch.equal(plain, saved)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
async def test_reentrant_checkpoint_of_the_first_layer() -> None:
    """A step whose loss records nothing names reentrant checkpoints, and the remedy works."""
    use_reentrant = True
    module = Fn(
        lambda m, x: checkpoint(m.layer, x, use_reentrant=use_reentrant),
        layer=nn.Linear(1, 1),
    )
    async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all") as engine:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        with pytest.raises(errors.LossNotScalarError, match="use_reentrant=False"):
            await engine.train_step(numbered(4), numbered(4), nn.functional.mse_loss, optimizer)
        use_reentrant = False
        loss = await engine.train_step(numbered(4), numbered(4), nn.functional.mse_loss, optimizer)
    assert loss > 0
