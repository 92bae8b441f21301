"""An awaitable backward is torch's, on a lane."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import asyncdp

from .helpers import batch, mlp

pytestmark = pytest.mark.anyio


async def test_same_gradients_on_another_thread() -> None:
    """Gradients are those of loss.backward(), computed on a lane."""
    module = mlp()
    x, _ = batch(6)
    threads: list[threading.Thread] = []
    module[0].weight.register_hook(lambda _: threads.append(threading.current_thread()))  # type: ignore[index]
    await asyncdp.backward(module(x).square().mean())
    mine = [each.grad.clone() for each in module.parameters() if each.grad is not None]
    module.zero_grad()
    module(x).square().mean().backward()
    torch.testing.assert_close(mine, [each.grad for each in module.parameters()])
    assert threads[0].name.startswith("asyncdp-")


async def test_after_a_pass() -> None:
    """Gradients flow through gather, replicas and scatter to the module and the inputs."""
    module = nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    output = await asyncdp.data_parallel(module, x, "cpu*2")
    await asyncdp.backward(output, torch.ones_like(output))
    torch.testing.assert_close(module.weight.grad, x.detach().sum(0).expand(2, 3))
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
async def test_arguments_are_torchs() -> None:
    """Several roots, their gradients, create_graph, retain_graph and inputs mean what they mean in torch."""
    x = torch.tensor(3.0, requires_grad=True)
    y = torch.tensor(2.0, requires_grad=True)
    one, other = x * x * y, x * y
    await asyncdp.backward([one, other], [torch.tensor(1.0), None], create_graph=True, inputs=[x])
    assert x.grad is not None
    assert x.grad.item() == 2 * 3 * 2 + 2
    assert y.grad is None
    assert x.grad.requires_grad
    await asyncdp.backward(one, retain_graph=True, inputs=y)
    await asyncdp.backward(one, inputs=y)
    assert y.grad is not None
    assert y.grad.item() == 18.0
    x.grad = None  # its graph refers to x


async def test_mistakes() -> None:
    """No tensors, or a tensor that needs no gradient, are refused as clearly as by torch."""
    with pytest.raises(ValueError, match="no tensors"):
        await asyncdp.backward([])
    with pytest.raises(RuntimeError, match="does not require grad"):
        await asyncdp.backward(torch.ones(()))
