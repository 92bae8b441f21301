"""The end of a training step: gradients into `.grad`, the optimizer's step, all or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._devices.threads import set_intra_op_threads
from ._reducer import Gradients, add_up
from .errors import ClosureOptimizerError, LossReductionError, NotAnOptimizerError


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


class Commit:
    """Takes one optimizer step with given gradients; a failure before the optimizer leaves no trace.

    Args:
        tensors: the module's tensors that learn.
        options: what the user said about the step.
        plain: whether it is known that all tensors are leaves without hooks and without gradients.
    """

    def __init__(self, tensors: Sequence[Tensor], options: StepOptions, *, plain: bool = False) -> None:
        self._tensors = tensors
        self._options = options
        self._plain = plain

    def run(self, gradients: Gradients, write_buffers: Callable[[], None]) -> None:
        """Do it all.

        Args:
            gradients: one per tensor; they may be written to.
            write_buffers: makes the module's buffers those of the step; called when only the
                optimizer itself can still fail.
        """
        options = self._options
        leaves = self._tensors if self._plain else [tensor for tensor in self._tensors if tensor.is_leaf]
        before = [None] * len(leaves) if self._plain else [tensor.grad for tensor in leaves]
        try:
            for tensor, gradient in zip(self._tensors, gradients, strict=True):
                if self._plain:
                    tensor.grad = gradient
                elif gradient is not None:
                    _deliver(tensor, gradient)
            self._before_step()
        except BaseException:
            for tensor, old in zip(leaves, before, strict=True):
                tensor.grad = old
            raise
        write_buffers()
        if not options.reduce_only:
            self._step()
            _clear(options.optimizer)
            for tensor in leaves:
                tensor.grad = None

    def _before_step(self) -> None:
        options = self._options
        if options.before_step is None:
            return
        unscales = options.scaler is not None and not options.reduce_only
        if unscales:
            options.scaler.unscale_(options.optimizer)
        try:
            options.before_step()
        except BaseException:
            if unscales:  # or the next step could not unscale: forget that this one has
                options.scaler.update(options.scaler.get_scale())
            raise

    def _step(self) -> None:
        options = self._options
        try:
            if options.scaler is None:
                options.optimizer.step()
            else:
                options.scaler.step(options.optimizer)
                options.scaler.update()
        except BaseException as error:
            error.add_note("raised by the optimizer itself, which may have changed some parameters already")
            raise


def _clear(optimizer: Any) -> None:
    """As `optimizer.zero_grad()`; where that is torch's own, without its profiler marks."""
    if getattr(optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = None


def has_hooks(tensor: Tensor) -> bool:
    """Whether someone waits for a tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def _deliver(tensor: Tensor, gradient: Tensor) -> None:
    """Add a gradient to `tensor.grad`, into memory of its own, so that the old one can be put back."""
    old = tensor.grad if tensor.is_leaf else None
    if not tensor.is_leaf or has_hooks(tensor):
        if tensor.is_leaf:
            tensor.grad = None
        # Through autograd, so that the hooks of the parameter see the whole batch's gradient.
        torch.autograd.backward(tensor, gradient)
        if not tensor.is_leaf or tensor.grad is None:
            return
        gradient = tensor.grad
    tensor.grad = gradient if old is None else add_up([([gradient], [old])], [tensor.device])[0]


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
