"""Optimizer steps by torch's fused kernels, where the optimizer's owner has left the choice to torch.

Left to itself torch takes one of its quicker implementations on CUDA, and on the CPU the slowest, with
several operations for every parameter. The fused one goes over all that belongs to a parameter once. It
rounds differently, in the last bit.

Its CPU kernels trust that the tensors of one parameter lie in memory alike, element after element, so
everything is looked at before every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn, optim

_Group = dict[str, Any]
_Names = Callable[[_Group], Sequence[str]]


def _of_adam(group: _Group) -> Sequence[str]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


# What each kind keeps that is shaped like a parameter. Not of subclasses, which may do anything else.
_KEPT: Mapping[type, _Names] = {
    optim.SGD: lambda group: ("momentum_buffer",) if group["momentum"] else (),
    optim.Adam: _of_adam,
    optim.AdamW: _of_adam,
    optim.Adagrad: lambda _: ("sum",),
}

_OPTION_TYPES = {bool, float, int, str, type(None), list, tuple}
_TENSOR_TYPES = {Tensor, nn.Parameter}
_LAYOUTS = {torch.strided}
_DTYPES = ({torch.float32}, {torch.float64})  # of others the kernels compute in a wider type

_gradient_of = attrgetter("grad")
_layout_of = attrgetter("layout")
_is_on_cpu = attrgetter("is_cpu")
_dtype_of = attrgetter("dtype")


@contextmanager
def fused(optimizer: Any) -> Iterator[None]:
    """A block in which `optimizer.step()` goes by fused kernels in those of its groups that allow it."""
    names = _KEPT.get(type(optimizer))
    groups = []
    if names is not None and not _is_watched(optimizer):
        groups = [group for group in optimizer.param_groups if _fits(optimizer, group, names)]
    for group in groups:
        group["fused"] = True
    try:
        yield
    finally:
        for group in groups:
            group["fused"] = None


def _is_watched(optimizer: Any) -> bool:
    """Whether a hook of the step may save the optimizer's state dict, which then held what is set here."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def _fits(optimizer: Any, group: _Group, names: _Names) -> bool:
    """Whether a fused step of a group does what its step otherwise does, and nobody has said which.

    The first step of a parameter does not: it makes what is kept, and differently.
    """
    is_open = group["foreach"] is None and group["fused"] is None
    if not is_open or group["differentiable"] or group.get("capturable"):
        return False
    options = chain(group.values(), group.get("betas", ()))
    if not _OPTION_TYPES.issuperset(map(type, options)):  # a learning rate may be a tensor
        return False
    parameters = [each for each in group["params"] if each.grad is not None]
    tensors = [*parameters, *map(_gradient_of, parameters)]
    if not _LAYOUTS.issuperset(map(_layout_of, tensors)) or not all(map(_is_on_cpu, parameters)):
        return False
    state = optimizer.state
    for name in names(group):
        tensors += [state[each].get(name) if each in state else None for each in parameters]
    return (
        _TENSOR_TYPES.issuperset(map(type, tensors))
        and {*map(_dtype_of, tensors)} in _DTYPES
        and all(map(Tensor.is_contiguous, tensors))
    )
