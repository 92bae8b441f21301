"""What of a forward's changes survives in the module, where several parts of it belong together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .ways import WAYS, way

pytestmark = pytest.mark.anyio
every_way = pytest.mark.parametrize("name", WAYS)


class DynamicRotary(nn.Module):
    """Rotary embeddings that grow with long inputs and are reset by short ones, as in transformers."""

    inverse: Tensor
    original: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.ones(1), persistent=False)
        self.register_buffer("original", torch.ones(1), persistent=False)
        self.longest: Any = 4

    def forward(self, x: Tensor) -> Tensor:
        length = torch.tensor(x.shape[1])
        if length > self.longest:
            self.register_buffer("inverse", self.original * length, persistent=False)
            self.longest = length
        if length < 4 and self.longest > 4:
            self.register_buffer("inverse", self.original, persistent=False)
            self.longest = 4
        return x * self.inverse


@every_way
@pytest.mark.parametrize("training", [False, True])
async def test_numbers_in_tensors_survive_and_so_do_ties(name: str, training: bool) -> None:
    """A number kept as a tensor survives beside its buffer, and one tensor under two names stays one."""
    module = DynamicRotary().train(training)
    twin = copy.deepcopy(module)
    async with way(name, module) as run:
        for length in (3, 6, 3, 9, 7, 3):
            x = torch.ones(2, length)
            found = await run(x)
            twin(x[:1])
            assert torch.equal(torch.stack([*found]), twin(x))
            assert int(module.longest) == int(twin.longest)
            assert len([*module.buffers()]) == len([*twin.buffers()])


class Recorder(nn.Module):
    """Registers hooks below itself at the first call, as transformers does to record hidden states."""

    table: Tensor

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("table", torch.zeros(1))
        self.counts = counts
        self.is_hooked = False
        self.num_calls = 0
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_hooked:
            self.layer.register_forward_hook(lambda module, args, output: output + 1)
            self.is_hooked = True
        if self.counts:
            self.table.add_(1)
            self.num_calls += 1
        return self.layer(x)


@every_way
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("counts", [False, True])
async def test_a_flag_goes_with_the_hooks_that_it_is_about(name: str, training: bool, counts: bool) -> None:
    """No pass finds a flag for hooks that are gone; numbers beside a changed buffer survive."""
    module = Recorder(counts).train(training)
    async with way(name, module) as run:
        for _ in range(3):
            found = await run(torch.ones(2, 1))
            assert torch.equal(torch.stack([*found]), torch.full((2, 1), 2.0))
    assert module.is_hooked is False
    assert not module.layer._forward_hooks
    assert module.num_calls == int(module.table)


class Cached(nn.Module):
    """Keeps a table that is no buffer, and its length, beside a buffer that never changes."""

    inverse: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.ones(1))
        self.longest = 0
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            self.table = torch.arange(x.shape[1]) * self.inverse
            self.longest = x.shape[1]
        assert self.table is not None
        return x + self.table[: x.shape[1]]


@every_way
@pytest.mark.parametrize("training", [False, True])
async def test_nothing_survives_beside_a_buffer_that_stays(name: str, training: bool) -> None:
    """A buffer that might have changed, but did not, carries nothing, not the length of a table."""
    module = Cached().train(training)
    async with way(name, module) as run:
        for length in (3, 5, 2):
            found = await run(torch.zeros(2, length))
            assert torch.equal(torch.stack([*found]), torch.arange(length).expand(2, -1).float())
    assert module.longest == 0
