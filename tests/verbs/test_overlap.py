"""Gradients are summed bucket by bucket while the rest of the backward still runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import asyncdp
from asyncdp import _autograd
from asyncdp._replicas.copies import buckets
from asyncdp._replicas.replica_set import ReplicaSet


def test_buckets_go_backwards_and_keep_to_their_size() -> None:
    """Buckets start at the last parameter; one is closed before it would grow too large."""
    tensors = [torch.zeros(size) for size in (4, 2, 2, 1, 9)]
    sizes = [[tensor.numel() for tensor in bucket] for bucket in buckets(tensors, max_bytes=16)]
    assert sizes == [[9], [1, 2], [2], [4]]


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


def test_the_last_layer_is_summed_before_the_first_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduce-add of a bucket does not wait for the end of the backward."""
    log: list[str] = []
    real = _autograd._kernels.reduce_add_many

    def watched(groups, destination):
        log.append("summed")
        return real(groups, destination)

    monkeypatch.setattr(_autograd._kernels, "reduce_add_many", watched)
    module = Noisy(log)
    replicas = ReplicaSet(module, asyncdp.parse_devices("cpu*2"), bucket_bytes=1)
    first, second = replicas.prepare(module, [0, 1])
    # Lane by lane, so that the first lane's backward cannot be done before the second's begins.
    (first(torch.ones(1, 4)) + second(torch.ones(1, 4))).sum().backward()
    assert log.count("first layer") == 2
    assert log.index("summed") < max(place for place, entry in enumerate(log) if entry == "first layer")
    assert log.count("summed") == 4, "one per bucket"
