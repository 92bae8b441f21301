"""Functions that captured modules, kept as attributes or hooks, are the replica's own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asyncdp

from .ways import WAYS, way

pytestmark = pytest.mark.anyio
every_way = pytest.mark.parametrize("name", WAYS)


class Extractor(nn.Module):
    """Collects features by hooks that a method made, the way that tutorials do it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.net = nn.Sequential(nn.Identity(), nn.ReLU())
        features = self.features
        for name, layer in self.net.named_children():
            hooks: dict[str, Any] = {
                "closure": self.hook(name),
                "partial": functools.partial(Extractor.collect, self, name),
                "container": lambda _, args, output, name=name: features.__setitem__(name, output),
            }
            layer.register_forward_hook(hooks[kind])

    def collect(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features[name] = output

    def hook(self, name: str) -> Any:
        def collect(module: nn.Module, args: Any, output: Tensor) -> None:
            self.features[name] = output

        return collect

    def forward(self, x: Tensor) -> Tensor:
        self.features.clear()
        self.net(x)
        return self.features["0"] + self.features["1"]


@every_way
@pytest.mark.parametrize("kind", ["closure", "partial", "container"])
async def test_hooks_collect_the_rows_of_their_lane(name: str, kind: str) -> None:
    """Hooks that captured the module write into the replica that runs them, and leave nothing."""
    module = Extractor(kind)
    x = torch.tensor([[1.0], [-2.0], [3.0], [-4.0]])
    async with way(name, module) as run:
        for _ in range(10):
            found = await run(x)
            assert torch.equal(torch.stack([*found]), x + x.relu())
    assert not module.features


class Wrapped(nn.Module):
    """Counts in a method that it has wrapped itself, beside a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(1)
        self.num_updates = 0
        self.update = self.counted(self.update)  # type: ignore[method-assign]

    def counted(self, update: Any) -> Any:
        @functools.wraps(update)
        def wrapper(x: Tensor) -> None:
            self.num_updates += 1
            update(x)

        return wrapper

    def update(self, x: Tensor) -> None:
        self.total += x.sum()

    def forward(self, x: Tensor) -> Tensor:
        self.update(x)
        return x + self.total


@pytest.mark.parametrize("name", ["data_parallel", "all", "number"])
async def test_wrapped_methods_count_for_their_lane(name: str) -> None:
    """A wrapped method updates its replica's own tensors; the first lane's survive with the count beside."""
    module = Wrapped()
    x = torch.tensor([[1.0], [10.0]])
    async with way(name, module) as run:
        for number in range(1, 4):
            before = number - 1.0
            assert torch.equal(await run(x), torch.tensor([[1 + before + 1], [10 + before + 10]]))
            assert (module.num_updates, float(module.total)) == (number, number)


async def test_replicate_copies_them_too() -> None:
    """The replicas of `asyncdp.replicate` run their own wrapped methods, not the module's."""
    module = Wrapped()
    first, second = asyncdp.replicate(module, "cpu*2")
    first(torch.ones(1, 1))
    assert (first.num_updates, second.num_updates, module.num_updates) == (1, 0, 0)
    assert module.update.__name__ == "update"


class Renewing(nn.Module):
    """Takes its hook off in forward and registers it anew, by a handle that it keeps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Identity()
        self.handles: Any = {"attribute": None, "list": [None], "dict": {0: None}}[kind]
        self.renew()

    def renew(self) -> None:
        handle = self.layer.register_forward_hook(
            lambda _module, _args, _kwargs, output: output + 1, with_kwargs=True
        )
        if self.kind == "attribute":
            self.handles = handle
        else:
            self.handles[0] = handle

    def forward(self, x: Tensor) -> Tensor:
        (self.handles if self.kind == "attribute" else self.handles[0]).remove()
        self.renew()
        return self.layer(x)  # type: ignore[no-any-return]


@every_way
@pytest.mark.parametrize("kind", ["attribute", "list", "dict"])
async def test_handles_remove_the_hooks_of_their_replica(name: str, kind: str) -> None:
    """A hook removed by a handle that the module keeps is the replica's; the module has its own as before."""
    module = Renewing(kind)
    hooks = [*module.layer._forward_hooks]
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    async with way(name, module) as run:
        for _ in range(6):
            assert torch.equal(torch.stack([*await run(x)]), x + 1)
    assert [*module.layer._forward_hooks] == [*module.layer._forward_hooks_with_kwargs] == hooks


def test_handles_of_replicas_are_their_own() -> None:
    """Of what `replicate` makes, handles remove nothing of the original either."""
    module = Renewing("attribute")
    for replica in asyncdp.replicate(module, "cpu*2"):
        assert torch.equal(replica(torch.ones(1)), torch.full((1,), 2.0))
    assert len(module.layer._forward_hooks) == 1
