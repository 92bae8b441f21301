"""The end of a training step: gradients into `.grad`, the optimizer's step, all or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .._devices.threads import set_intra_op_threads
from ..errors import ClosureOptimizerError, LossReductionError, NotAnOptimizerError
from .reducer import Gradients, add_up


@dataclass(slots=True)
class StepOptions:
    """What a user says about one training step; `DataParallel.train_step` documents the fields."""

    loss_fn: Callable[[Any, Any], Tensor]
    optimizer: Any
    loss_reduction: str = "mean"
    before_step: Callable[[], object] | None = None
    scaler: Any = None
    reduce_only: bool = False

    def check(self) -> None:
        """Refuse what cannot work, before any lane runs."""
        if self.loss_reduction not in ("mean", "sum"):
            raise LossReductionError(self.loss_reduction)
        if self.reduce_only:
            return
        if not callable(getattr(self.optimizer, "step", None)) or not hasattr(self.optimizer, "zero_grad"):
            raise NotAnOptimizerError(self.optimizer)
        if _needs_closure(self.optimizer.__class__):
            raise ClosureOptimizerError(self.optimizer)


@lru_cache(maxsize=64)
def _needs_closure(kind: type) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")  # type: ignore[attr-defined]
    return closure is not None and closure.default is inspect.Parameter.empty


class Accumulated:
    """Gradients that lanes hold back until a step reduces them.

    Args:
        num_lanes: how many lanes may hold some.
    """

    def __init__(self, num_lanes: int) -> None:
        # The tensors themselves are kept too, so that their ids stay theirs.
        self._by_lane: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(num_lanes)]

    def __bool__(self) -> bool:
        return any(self._by_lane)

    def clear(self) -> None:
        """Forget everything."""
        for held in self._by_lane:
            held.clear()

    def of(self, tensors: Sequence[Tensor]) -> list[Gradients]:
        """What each lane holds for `tensors`; lanes that hold nothing are left out."""
        return [
            [held[id(tensor)][1] if id(tensor) in held else None for tensor in tensors]
            for held in self._by_lane
            if held
        ]

    def add(self, tensors: Sequence[Tensor], gradients: Sequence[Gradients]) -> None:
        """Add one step's gradients of each lane, which may be written to, to what the lanes hold."""
        for held, own in zip(self._by_lane, gradients, strict=False):
            places = [place for place, gradient in enumerate(own) if gradient is not None]
            groups = [
                ([own[place]], [held[id(tensors[place])][1]] if id(tensors[place]) in held else [])
                for place in places
            ]
            devices = [gradient.device for gradient in own if gradient is not None]
            for place, total in zip(places, add_up(groups, devices), strict=True):
                assert total is not None
                held[id(tensors[place])] = (tensors[place], total)


class Held:
    """The gradients that a step finds, put aside so that it begins without any.

    What the step's backwards add to `.grad` of these tensors directly, by a loss that looks at the
    module's parameters itself or learns a temperature, say, is then the step's own.

    Args:
        learning: the module's tensors that learn.
        optimizer: whose tensors may learn too; may be None.
    """

    def __init__(self, learning: Sequence[Tensor], optimizer: Any) -> None:
        own = [tensor for tensor in learning if tensor.is_leaf]
        groups = getattr(optimizer, "param_groups", ())
        others = [tensor for group in groups for tensor in group["params"]]
        if len(others) == len(own) and all(map(is_, others, own)):
            others = []  # by far the most frequent case, spared the search
        self.outsiders: list[Tensor] = []
        """The optimizer's tensors that are not the module's."""
        if others:
            known = set(map(id, own))
            self.outsiders = [tensor for tensor in others if id(tensor) not in known]
        self.tensors = own + self.outsiders
        self.gradients = [tensor.grad for tensor in self.tensors]
        self.is_empty = self.gradients.count(None) == len(self.gradients)
        """Whether there were none."""
        if not self.is_empty:
            clear(self.tensors)

    def restore(self) -> None:
        """Put them back."""
        for tensor, gradient in zip(self.tensors, self.gradients, strict=True):
            tensor.grad = gradient

    def direct(self) -> Gradients:
        """What the step's backwards have added to the tensors themselves."""
        return [tensor.grad for tensor in self.tensors]


def clear(tensors: Sequence[Tensor]) -> None:
    """Let tensors have no gradients."""
    for tensor in tensors:
        tensor.grad = None


def deliver(held: Held, learning: Sequence[Tensor], sums: Gradients, kept: Sequence[Gradients]) -> None:
    """Put whole gradients into `.grad`: those of the step, and those that were there before it.

    Args:
        held: what was there before, and the tensors to deliver to.
        learning: the module's tensors that learn.
        sums: what lanes have found for each of `learning`; may be written to.
        kept: what earlier steps have kept for each of the outsiders.
    """
    own: dict[int, Tensor] = {}
    for tensor, gradient in zip(learning, sums, strict=True):
        if gradient is not None and tensor.is_leaf:
            own[id(tensor)] = gradient
        elif gradient is not None:  # it was made of leaves, which get what is theirs
            torch.autograd.backward(tensor, gradient)
    devices = [tensor.device for tensor in held.tensors]
    fresh = [[own.get(id(tensor)), tensor.grad] for tensor in held.tensors]
    for place, tensor in enumerate(held.tensors):
        if has_hooks(tensor) and id(tensor) in own:
            fresh[place] = [_hooked(tensor, fresh[place])]
    earlier: list[Gradients] = [[gradient] for gradient in held.gradients]
    first_outsider = len(earlier) - len(held.outsiders)
    for gradients in kept:
        for place, gradient in enumerate(gradients, start=first_outsider):
            earlier[place].insert(-1, gradient)
    totals = add_up(list(zip(fresh, earlier, strict=True)), devices)
    for tensor, total in zip(held.tensors, totals, strict=True):
        tensor.grad = total


def _hooked(tensor: Tensor, gradients: Gradients) -> Tensor | None:
    """Send gradients through autograd, so that the hooks of the parameter see the whole batch's."""
    total = add_up([(gradients, [])], [tensor.device])[0]
    tensor.grad = None
    torch.autograd.backward(tensor, total)
    return tensor.grad


def commit(held: Held, options: StepOptions, write_buffers: Callable[[], None] | None) -> None:
    """Take the optimizer's step with the gradients that are in `.grad`, and clear them.

    Args:
        held: the tensors that have them.
        options: what the user said about the step.
        write_buffers: makes the module's buffers those of the step; called when only the optimizer
            itself can still fail. None if there are none.
    """
    if options.before_step is not None:
        _before_step(options, options.before_step)
    if write_buffers is not None:
        write_buffers()
    if options.reduce_only:
        return
    try:
        if options.scaler is None:
            options.optimizer.step()
        else:
            options.scaler.step(options.optimizer)
            options.scaler.update()
    except BaseException as error:
        _forget_unscaling(options)
        error.add_note("raised by the optimizer itself, which may have changed some parameters already")
        raise
    clear(held.tensors)
    if getattr(options.optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
        options.optimizer.zero_grad()  # torch's own would do the same once more


def _before_step(options: StepOptions, call: Callable[[], object]) -> None:
    try:
        if options.scaler is not None and not options.reduce_only:
            options.scaler.unscale_(options.optimizer)
        call()
    except BaseException:
        _forget_unscaling(options)
        raise


def _forget_unscaling(options: StepOptions) -> None:
    """Let the next step unscale its gradients although this one, which failed, has done so."""
    if options.scaler is not None and not options.reduce_only:
        options.scaler.update(options.scaler.get_scale())


def has_hooks(tensor: Tensor) -> bool:
    """Whether someone waits for a tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """A block with `num_threads` intra-op threads."""
    before = torch.get_num_threads()
    if before == num_threads:
        yield
        return
    set_intra_op_threads(num_threads)
    try:
        yield
    finally:
        set_intra_op_threads(before)
