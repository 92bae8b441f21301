"""The end of a training step: gradients into `.grad`, the optimizer's step, all or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .._checks import check_flags, shown
from .._devices.threads import set_intra_op_threads
from .._torch_private import hooks_of
from ..errors import ClosureOptimizerError, LossReductionError, NotAnOptimizerError, NotASchedulerError
from .reducer import Gradients, add_up

_is_leaf = attrgetter("is_leaf")
_gradient = attrgetter("grad")
_parameters = itemgetter("params")


@dataclass(slots=True)
class StepOptions:
    """What a user says about one training step; `DataParallel.train_step` documents the fields."""

    loss_fn: Callable[[Any, Any], Tensor]
    optimizer: Any
    loss_reduction: str = "mean"
    before_step: Callable[[], object] | None = None
    scaler: Any = None
    reduce_only: bool = False
    scheduler: Any = None

    def check(self) -> None:
        """Refuse what cannot work, before any lane runs."""
        if self.loss_reduction not in ("mean", "sum"):
            raise LossReductionError(self.loss_reduction)
        if not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn must be a function of outputs and targets, but got {shown(self.loss_fn)}. "
                "Pass torch.nn.functional.cross_entropy, say, or lambda outputs, targets: outputs.mean()."
            )
        if self.before_step is not None and not callable(self.before_step):
            raise TypeError(
                f"before_step must be a function without arguments, but got {shown(self.before_step)}. "
                "Pass lambda: clip_grad_norm_(module.parameters(), 1.0), say."
            )
        if self.scaler is not None and not hasattr(self.scaler, "scale"):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, but got {shown(self.scaler)}.")
        check_flags(reduce_only=self.reduce_only)
        if self.reduce_only:
            return
        if not callable(getattr(self.optimizer, "step", None)) or not hasattr(self.optimizer, "zero_grad"):
            raise NotAnOptimizerError(self.optimizer)
        if _needs_closure(self.optimizer.__class__):
            raise ClosureOptimizerError(self.optimizer)
        if self.scheduler is not None:
            _check_scheduler(self.scheduler, self.optimizer)


@lru_cache(maxsize=64)
def _needs_closure(kind: type) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")  # type: ignore[attr-defined]
    return closure is not None and closure.default is inspect.Parameter.empty


def _check_scheduler(scheduler: Any, optimizer: Any) -> None:
    step = getattr(scheduler, "step", None)
    if not callable(step) or isinstance(scheduler, torch.optim.Optimizer):
        raise NotASchedulerError(scheduler)
    try:
        inspect.signature(step).bind()
    except TypeError:
        raise NotASchedulerError(scheduler, "needs more than the count of steps") from None
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise NotASchedulerError(scheduler, "belongs to another optimizer")


class AccumulatedGradients:
    """Gradients that stay on their lanes until a step reduces them.

    Args:
        num_lanes: how many lanes may have some.
    """

    def __init__(self, num_lanes: int) -> None:
        # With the tensors themselves, so that their ids stay theirs.
        self._by_lane: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(num_lanes)]

    def __bool__(self) -> bool:
        return any(self._by_lane)

    def clear(self) -> None:
        """Discard everything."""
        for own in self._by_lane:
            own.clear()

    def of(self, tensors: Sequence[Tensor]) -> list[Gradients]:
        """Return each lane's gradients of `tensors`; lanes that have none at all are left out."""
        return [
            [own[id(tensor)][1] if id(tensor) in own else None for tensor in tensors]
            for own in self._by_lane
            if own
        ]

    def add(self, tensors: Sequence[Tensor], gradients: Sequence[Gradients]) -> None:
        """Add one step's gradients, which may be written to, to those of each lane."""
        for earlier, new in zip(self._by_lane, gradients, strict=False):
            places = [place for place, gradient in enumerate(new) if gradient is not None]
            groups = [
                ([new[place]], [earlier[id(tensors[place])][1]] if id(tensors[place]) in earlier else [])
                for place in places
            ]
            devices = [gradient.device for gradient in new if gradient is not None]
            for place, total in zip(places, add_up(groups, devices), strict=True):
                assert total is not None, "there was a gradient to add"
                earlier[id(tensors[place])] = (tensors[place], total)


class SavedGradients:
    """The gradients that a step finds, put aside so that it begins without any.

    What the step's backwards add to `.grad` of these tensors directly (by a loss that reads the module's
    parameters itself, or trains a temperature of its own) is then the step's own.

    Args:
        trainable: the module's trainable tensors.
        optimizer: may have further trainable tensors; None has none.

    Attributes:
        outsiders: the optimizer's tensors that are not the module's.
        tensors: all tensors whose gradients are put aside, the outsiders last.
        gradients: their gradients.
        is_empty: whether there were none.
    """

    def __init__(self, trainable: Sequence[Tensor], optimizer: Any) -> None:
        own = [*filter(_is_leaf, trainable)]
        groups = getattr(optimizer, "param_groups", ())
        others = [*chain.from_iterable(map(_parameters, groups))]
        if len(others) == len(own) and all(map(is_, others, own)):
            others = []  # by far the most frequent case, spared the search
        self.outsiders: list[Tensor] = []
        if others:
            known = set(map(id, own))
            self.outsiders = [tensor for tensor in others if id(tensor) not in known]
        self.tensors = own + self.outsiders
        self.gradients = [*map(_gradient, self.tensors)]
        self.is_empty = self.gradients.count(None) == len(self.gradients)
        if not self.is_empty:
            clear(self.tensors)

    def restore(self) -> None:
        """Put them back."""
        for tensor, gradient in zip(self.tensors, self.gradients, strict=True):
            tensor.grad = gradient

    def direct(self) -> Gradients:
        """Return what the step's backwards have added to the tensors themselves."""
        return [*map(_gradient, self.tensors)]


def clear(tensors: Sequence[Tensor]) -> None:
    """Set the gradients of tensors to None."""
    for tensor in tensors:
        tensor.grad = None


def deliver(
    saved: SavedGradients, trainable: Sequence[Tensor], sums: Gradients, accumulated: Sequence[Gradients]
) -> None:
    """Put whole gradients into `.grad`: those of the step, and those that were there before it.

    Args:
        saved: what was there before, and the tensors to deliver to.
        trainable: the module's trainable tensors.
        sums: the sum over the lanes for each of `trainable`; may be written to.
        accumulated: what earlier steps have accumulated for each of the outsiders.
    """
    own: dict[int, Tensor] = {}
    for tensor, gradient in zip(trainable, sums, strict=True):
        if gradient is not None and tensor.is_leaf:
            own[id(tensor)] = gradient
        elif gradient is not None:  # it was computed from leaves, which get their part
            torch.autograd.backward(tensor, gradient)
    devices = [tensor.device for tensor in saved.tensors]
    fresh = [[own.get(id(tensor)), tensor.grad] for tensor in saved.tensors]
    for place, tensor in enumerate(saved.tensors):
        if id(tensor) in own and any(hooks_of(tensor)):
            fresh[place] = [_hooked(tensor, fresh[place])]
    earlier: list[Gradients] = [[gradient] for gradient in saved.gradients]
    first_outsider = len(earlier) - len(saved.outsiders)
    for gradients in accumulated:
        for place, gradient in enumerate(gradients, start=first_outsider):
            earlier[place].insert(-1, gradient)
    totals = add_up(list(zip(fresh, earlier, strict=True)), devices)
    for tensor, total in zip(saved.tensors, totals, strict=True):
        tensor.grad = total


def _hooked(tensor: Tensor, gradients: Gradients) -> Tensor | None:
    """Pass gradients through autograd, so that the parameter's hooks get the whole batch's."""
    total = add_up([(gradients, [])], [tensor.device])[0]
    tensor.grad = None
    torch.autograd.backward(tensor, total)
    return tensor.grad


def commit(
    saved: SavedGradients, options: StepOptions, write_back_buffers: Callable[[], None] | None
) -> bool:
    """Take the optimizer's step with the gradients that are in `.grad`, and clear them.

    Args:
        saved: the tensors that have them.
        options: what the user said about the step.
        write_back_buffers: makes the module's buffers those of the step; called when only the optimizer
            itself can still fail. None if there are none.

    Returns:
        Whether the optimizer has stepped: a scaler has it skip gradients that overflowed.
    """
    if write_back_buffers is not None:
        write_back_buffers()
    if options.reduce_only:
        return False
    has_stepped = True
    try:
        if options.scaler is None:
            options.optimizer.step()
        else:
            has_stepped = _step_scaled(options.scaler, options.optimizer)
    except BaseException as error:
        forget_unscaling(options)
        error.add_note("raised by the optimizer itself, which may have changed some parameters already")
        raise
    clear(saved.tensors)
    if getattr(options.optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
        options.optimizer.zero_grad()  # torch's own would do the same once more
    return has_stepped


def _step_scaled(scaler: Any, optimizer: Any) -> bool:
    """Step through a scaler; return whether it let the optimizer step, as far as that can be told."""
    steps: list[object] = []
    register = getattr(optimizer, "register_step_post_hook", None)
    hook = None if register is None else register(lambda *_: steps.append(None))
    try:
        scaler.step(optimizer)
    finally:
        if hook is not None:
            hook.remove()
    scaler.update()
    return hook is None or bool(steps)


def step_scheduler(options: StepOptions) -> None:
    """Have the learning rate scheduler note a step that the optimizer has taken."""
    if options.scheduler is None:
        return
    try:
        options.scheduler.step()
    except BaseException as error:
        error.add_note("raised by the learning rate scheduler, after a step that the optimizer has taken")
        raise


def learning_rate_of(optimizer: Any) -> float | Tensor | None:
    """Return the learning rate of an optimizer's first group, if it has any; waits for no device."""
    groups = getattr(optimizer, "param_groups", ())
    rate = groups[0].get("lr") if groups else None
    # Torch changes a rate that is a tensor in place.
    return rate.clone() if isinstance(rate, Tensor) else rate


def prepare(options: StepOptions) -> None:
    """Unscale the gradients and call `before_step`: the step can still fail."""
    try:
        if options.scaler is not None and not options.reduce_only:
            options.scaler.unscale_(options.optimizer)
        if options.before_step is not None:
            options.before_step()
    except BaseException:
        forget_unscaling(options)
        raise


def forget_unscaling(options: StepOptions) -> None:
    """Let the next step unscale its gradients although this failed one already has."""
    if options.scaler is not None and not options.reduce_only:
        options.scaler.update(options.scaler.get_scale())


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Run a block with `num_threads` intra-op threads."""
    before = torch.get_num_threads()
    if before == num_threads:
        yield
        return
    set_intra_op_threads(num_threads)
    try:
        yield
    finally:
        set_intra_op_threads(before)
