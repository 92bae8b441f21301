"""Each lane's own leaves and buffers for training.

A lane computes its loss and backward on leaves of its own, which share storage with the module's
parameters on the module's device, so that no two lanes write to one `.grad`. Its buffers are copies,
so that nothing of the module changes before the step is known to succeed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._replicas.copies import storages
from .._replicas.replica import Replica, stand_ins
from .._replicas.replica_set import ReplicaSet, brought_back
from .._replicas.snapshot import Outline
from .commit import has_hooks
from .reducer import Gradients, bucket_positions

Report = Callable[[int, Tensor], None]
"""Takes the position of a tensor that learns, and its gradient."""


_TRAINING = attrgetter("training")


class Modes:
    """Which parts of a module are in train mode, as of a call.

    The module's own thread may change it while a step is queued or running.
    """

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.modules = outline.modules
        self.training = [*map(_TRAINING, self.modules)]

    def hold(self) -> bool:
        """Whether they are so still."""
        return [*map(_TRAINING, self.modules)] == self.training


class TrainingLane:
    """One lane's replica for training. Only ever used by one thread at a time.

    Args:
        replica: the structure.
        device: where the lane works.
        learning: the module's tensors that require gradients.
        still: its other parameters and buffers.
    """

    def __init__(
        self, replica: Replica, device: torch.device, learning: Sequence[Tensor], still: Sequence[Tensor]
    ) -> None:
        self._replica = replica
        with torch.inference_mode(False), torch.no_grad():
            self._leaves = [_leaf_of(tensor, device) for tensor in learning]
            own = [
                tensor
                if isinstance(tensor, nn.Parameter) and tensor.device == device
                else _copy(tensor, device)
                for tensor in still
            ]
        self._tensors = {**stand_ins(learning, self._leaves), **stand_ins(still, own)}
        pairs = zip([*self._leaves, *own], [*learning, *still], strict=True)
        # Leaves on the module's device need no copy: they share its storage.
        self._copies = [pair for pair in pairs if pair[0].data_ptr() != pair[1].data_ptr()]
        self._report: Report | None = None
        self._hooks: list[RemovableHandle] = []

    def module(self, report: Report | None, modes: Modes) -> nn.Module:
        """The replica, ready for one forward and backward.

        Args:
            report: gets every gradient as soon as it is complete; None to `collect` them later.
            modes: which parts of it shall be in train mode.
        """
        self._report_to(report)
        if self._copies:
            # Always: no version tells of changes through `.data`, nor of batch norm's to its buffers.
            with torch.inference_mode(False), torch.no_grad():
                torch._foreach_copy_([own for own, _ in self._copies], [source for _, source in self._copies])
        self._held = storages(own for own, _ in self._copies)  # until the next step
        self._versions = {id(own): own._version for own, _ in self._copies}
        self._replica.install(self._tensors)
        self._training = dict(zip(map(id, modes.modules), modes.training, strict=True))
        self._replica.set_modes(self._training)
        return self._replica.module

    def report(self, position: int, leaf: Tensor) -> None:
        """Pass a leaf's gradient on; its hook's call, in the midst of a backward."""
        if self._report is not None and leaf.grad is not None:
            gradient, leaf.grad = leaf.grad, None
            self._report(position, gradient)

    def _report_to(self, report: Report | None) -> None:
        """Hook up the leaves only while someone wants to know: a hook costs every backward its call."""
        self._report = report
        if report is not None and not self._hooks:
            self._hooks = [
                leaf.register_post_accumulate_grad_hook(_hook(weakref.ref(self), position))
                for position, leaf in enumerate(self._leaves)
            ]
        elif report is None:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def collect(self) -> Gradients:
        """Take the gradients that nobody was told of; after a failure too, or the next step had them."""
        self._report = None  # or what it belongs to would live on until the next step, sums and all
        gradients = [leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        return gradients

    def write_buffers(self, module: nn.Module) -> None:
        """Carry what the forward did to this lane's buffers into the module's."""
        for owner in module.modules():
            copies = self._replica.buffers_of(owner) if owner._buffers else {}
            for name, updated in copies.items():
                own = owner._buffers.get(name)
                if updated is not None and updated.requires_grad:
                    continue  # it learns, on the module's own storage
                if own is None or updated is None or updated is not self._tensors.get(id(own)):
                    if updated is not own:  # the forward put another tensor in the buffer's place
                        owner._buffers[name] = (
                            None if updated is None else brought_back(updated.detach(), own)
                        )
                # Asked for the mode too: batch norm changes its statistics without counting a version.
                elif self._versions.get(id(updated), 0) != updated._version or (
                    self._training.get(id(owner)) and not _overlaps_itself(own)
                ):
                    with torch.no_grad():
                        own.copy_(updated)


def _hook(lane: weakref.ref[TrainingLane], position: int) -> Callable[[Tensor], None]:
    """Tell a lane of a leaf's gradient; referring to it weakly, for the lane refers to the leaf."""

    def tell(leaf: Tensor) -> None:
        alive = lane()
        if alive is not None:
            alive.report(position, leaf)

    return tell


def _leaf_of(tensor: Tensor, device: torch.device) -> Tensor:
    """A leaf on `device` with the values of `tensor`; the same storage where the device is the same."""
    return tensor.detach().to(device).requires_grad_()


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, as after `expand`: then nothing can write to it as it is."""
    if tensor.layout is not torch.strided:
        return False
    return any(
        stride == 0 and length > 1 for stride, length in zip(tensor.stride(), tensor.shape, strict=True)
    )


def trained_in_place(outline: Outline, device: torch.device) -> list[Tensor] | None:
    """The tensors of a module that learn, if it can train on `device` itself; None if it needs a replica."""
    for each in outline.modules:
        if each._buffers:
            return None
    learning: list[Tensor] = []
    for tensor in outline.parameters():
        # A hook shall get the whole gradient, kept ones included, and only when all is well.
        if not tensor.is_leaf or tensor.device != device or has_hooks(tensor):
            return None
        if tensor.requires_grad:
            learning.append(tensor)
    return learning


class TrainingLanes(ReplicaSet):
    """The training replicas of one module, one per lane."""

    def __init__(self, module: nn.Module, devices: Sequence[torch.device]) -> None:
        super().__init__(module, devices)
        self._made: list[TrainingLane | None] = []
        self._key: list[Any] = []
        self.learning: list[Tensor] = []
        """The module's tensors that require gradients, as of the last `prepare_training`."""
        self.buckets: list[list[int]] = []
        """Which of them are reduced together."""
        self.num_elements = 0
        """Of all of them."""

    @property
    def has_buffers(self) -> bool:
        """Whether a step may change buffers of the module; as of the last `prepare_training`."""
        return self._has_buffers

    def prepare_training(self, module: nn.Module, num_lanes: int) -> list[TrainingLane]:
        """Make the first `num_lanes` lanes ready for one step of `module` as it is now.

        Only ever called by one thread at a time, between steps.
        """
        if not self._follows():
            self._build(module)
            self._key = []
        tensors = [*self._parameters, *self._buffers]
        key = [_identity(tensor) for tensor in tensors]
        if key != self._key:
            self._key = key
            self._made = [None] * len(self._devices)
            self.learning = [tensor for tensor in tensors if tensor.requires_grad]
            self.buckets = bucket_positions(self.learning)
            self.num_elements = sum(tensor.numel() for tensor in self.learning)
        return [self._lane(position) for position in range(num_lanes)]

    def _lane(self, position: int) -> TrainingLane:
        made = self._made[position]
        if made is None:
            still = [tensor for tensor in self._parameters + self._buffers if not tensor.requires_grad]
            made = TrainingLane(self._replicas[position], self._devices[position], self.learning, still)
            self._made[position] = made
        return made


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What stays the same while a leaf or a copy made of `tensor` can go on standing for it."""
    is_strided = tensor.layout is torch.strided
    return (
        tensor.data_ptr() if is_strided else id(tensor),
        tensor.stride() if is_strided else (),
        tensor.requires_grad,
        tensor.dtype,
        tensor.shape,
        tensor.device,
    )
