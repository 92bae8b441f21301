"""Gradients are summed bucket by bucket while the rest of the backward still runs."""

from __future__ import annotations

import asyncio

import torch
from torch import nn

import asyncdp


class Marked(torch.autograd.Function):
    """An identity that says when its backward runs."""

    @staticmethod
    def forward(ctx, x, name, log):
        """Pass `x` on."""
        ctx.name, ctx.log = name, log
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        """Write the name down."""
        ctx.log.append(ctx.name)
        return grad, None, None


class Noisy(nn.Module):
    """Two layers; the backward of the first announces itself."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run both."""
        return self.last(Marked.apply(self.first(x), "first layer", self.log))


def test_the_last_layer_is_summed_before_the_first_layer_runs() -> None:
    """The reduce-add of a bucket does not wait for the end of the backward."""
    log: list[str] = []
    module = Noisy(log)
    for parameter in module.parameters():
        parameter.register_hook(lambda _: log.append("summed"))

    async def run() -> torch.Tensor:
        async with asyncdp.DataParallel(module, "cpu*2", num_lanes="all", bucket_bytes=1) as engine:
            return await engine(torch.ones(2, 4))

    asyncio.run(run()).sum().backward()
    assert log.count("first layer") == 2
    assert log.index("summed") < max(place for place, entry in enumerate(log) if entry == "first layer")
    assert log.count("summed") == 4, "one per parameter"
