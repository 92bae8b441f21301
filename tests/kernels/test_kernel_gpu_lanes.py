"""Whole passes and training steps on CUDA lanes; the same tests run on CPU lanes everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from asyncdp import DataParallel, Runtime, gather

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["cpu*2", pytest.param("cuda:0,cuda:0", marks=pytest.mark.gpu)])
def devices(request):
    """Two lanes on one device of each kind there is."""
    if request.param.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return request.param


def model(devices):
    """Make a network of layers small enough to compare, on the lanes' device."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    return layers.to(devices.partition(",")[0].partition("*")[0]).double()


def batch(module, seed, num_rows=9):
    """Make inputs and targets where the module is."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_rows, 3, 8, 8, dtype=torch.float64, generator=generator)
    targets = torch.randint(10, (num_rows,), generator=generator)
    device = next(module.parameters()).device
    return inputs.to(device), targets.to(device)


@pytest.fixture
def two_optimizers(devices):
    """Two equal modules, each with its optimizer, whose making imports far too much for an event loop."""
    modules = [model(devices) for _ in range(2)]
    return [(module, torch.optim.SGD(module.parameters(), lr=0.1)) for module in modules]


async def test_a_pass_and_its_gradients_equal_the_module(devices):
    """Outputs gathered from two lanes, and gradients summed over them, are those of the module alone."""
    module = model(devices)
    alone = copy.deepcopy(module)
    inputs, targets = batch(module, 1)
    async with DataParallel(module, devices) as engine:
        outputs = await engine(inputs)
        nn.functional.cross_entropy(outputs, targets).backward()
    expected = alone(inputs)
    nn.functional.cross_entropy(expected, targets).backward()
    assert torch.allclose(outputs, expected)
    for ours, theirs in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad)


async def test_training_steps_equal_one_device(devices, two_optimizers):
    """Ten steps on two lanes lead to the weights of ten steps on one device."""
    (module, optimizer), (alone, alone_optimizer) = two_optimizers
    async with DataParallel(module, devices) as engine:
        for seed in range(10):
            inputs, targets = batch(module, seed)
            loss = await engine.train_step(inputs, targets, nn.functional.cross_entropy, optimizer)
            alone_optimizer.zero_grad()
            expected = nn.functional.cross_entropy(alone(inputs), targets)
            expected.backward()
            alone_optimizer.step()
            assert torch.allclose(loss.detach(), expected.detach())
    for ours, theirs in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(ours, theirs)


async def test_results_survive_the_memory_of_later_passes(devices):
    """Outputs kept while later passes reuse the lanes' memory stay what they were."""
    module = model(devices)
    async with DataParallel(module, devices) as engine:
        with_inputs = []
        for seed in range(20):
            inputs, _ = batch(module, seed)
            with_inputs.append((inputs, await engine(inputs)))
    for inputs, outputs in with_inputs:
        assert torch.allclose(outputs, module(inputs))


async def test_kernels_run_on_the_lanes_stream(devices):
    """A gather called on a lane is ordered with the lane's operations, and warm_up has loaded its kernel."""
    async with Runtime(devices) as runtime:
        await runtime.warm_up()
        lane = runtime.lanes[0]

        def make_and_gather():
            shards = [torch.ones(10_007, device=lane.device) * i for i in range(4)]
            return gather(shards, lane.device)

        outputs = [await runtime.run(make_and_gather, lane=lane) for _ in range(20)]
    expected = torch.arange(4.0).repeat_interleave(10_007)
    assert all(torch.equal(output.cpu(), expected) for output in outputs)
