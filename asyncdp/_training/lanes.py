"""Each lane's own leaves and buffers for training.

A lane computes its loss and backward on leaves of its own, which share storage with the module's
parameters on the module's device, so that no two lanes write to one `.grad`. Its buffers are copies,
so that nothing of the module changes before the step is known to succeed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._replicas.copies import copies_in_place, storages
from .._replicas.replica import Replica, ReplicaCache, Substitutions, Tags, substitutions
from .._replicas.snapshot import AttributeMap, ModuleSnapshot
from .._replicas.survivors import Survivors
from .._replicas.writes import Look, ParameterWatch
from .._torch_private import foreach_copy_
from .reducer import Gradients, bucket_positions

Report = Callable[[int, Tensor], None]
"""Takes the position of a trainable tensor, and its gradient."""


class TrainingLane:
    """One lane's replica for training. Only ever used by one thread at a time.

    Args:
        cache: the replicas, and what they follow.
        position: which of them is this lane's.
        device: where the lane computes.
        trainable: the module's tensors that require gradients.
        frozen: its other parameters and buffers.
        loose: its tensors that are neither.
        own: the `id` of each parameter of which each lane has a copy, but the first.
    """

    def __init__(
        self,
        cache: ReplicaCache,
        position: int,
        device: torch.device,
        trainable: Sequence[Tensor],
        frozen: Sequence[Tensor],
        loose: Sequence[Tensor],
        own: Set[int],
    ) -> None:
        self._cache = cache
        self._replica = cache.replicas[position]
        with torch.inference_mode(False), torch.no_grad():
            own = own if position else frozenset()
            self.leaves = [
                tensor.detach().to(device, copy=id(tensor) in own).requires_grad_() for tensor in trainable
            ]
            others = [_frozen_on(device, tensor, own) for tensor in frozen]
        others += copies_in_place(loose)
        frozen = [*frozen, *loose]
        self._tensors: Substitutions = {
            **substitutions(trainable, self.leaves),
            **substitutions(frozen, others),
        }
        pairs = zip([*self.leaves, *others], [*trainable, *frozen], strict=True)
        # Leaves on the module's device need no copy: they share its storage.
        copied = [(own, source) for own, source in pairs if own.data_ptr() != source.data_ptr()]
        self._copies = [own for own, _ in copied]
        self._sources = [source for _, source in copied]
        self._is_fresh = False
        self._memory: list[torch.UntypedStorage] = []
        assert cache.snapshot is not None, "the replicas are built"
        self._parameters = [self._tensors[id(each)] for each in cache.snapshot.parameters]
        self._watch = ParameterWatch(self._parameters, closely=False)
        self._before: Look | None = None
        self._tags: Tags = {}
        self._reads_values = False
        self.wrote_uncounted = False
        """Whether the forward wrote into buffers what no version counts."""
        self.survivors: Survivors | None = None
        """What the forward did to buffers, until `take_survivors`."""
        self._report: Report | None = None
        self._hooks: list[RemovableHandle] = []

    def module(
        self,
        training: Sequence[bool],
        carried: AttributeMap,
        *,
        looks_closely: bool = False,
        reads_values: bool = False,
    ) -> nn.Module:
        """Return the replica, ready for one step.

        Args:
            training: the mode of every module.
            carried: values that earlier forwards have set beside buffers.
            looks_closely: as of a `ParameterWatch`.
            reads_values: as of `Replica.tags`.
        """
        if not self._is_fresh:
            self.refresh()
        self._is_fresh = False
        changes = self._cache.changes
        self._replica.bind(self._tensors, {**changes, **carried} if carried else changes, training)
        self._reads_values = reads_values
        self._tags = self._replica.tags(reads_values=reads_values)
        if self._watch.closely is not looks_closely:
            self._watch = ParameterWatch(self._parameters, closely=looks_closely)
        self._before = self._watch.look()
        return self._replica.module

    def refresh(self) -> None:
        """Copy what the lane does not share, for the step that comes next."""
        self._is_fresh = True
        if self._copies:
            # Always: no version tells of changes through `.data`, nor of batch norm's to its buffers.
            with torch.inference_mode(False), torch.no_grad():
                foreach_copy_(self._copies, self._sources)
            self._memory = storages(self._copies)  # until the next step

    def end_forward(self) -> list[int]:
        """Find what the forwards so far did to buffers, before a backward.

        Returns:
            The positions of the parameters that they wrote.

        Raises:
            LazyModuleError: the forward made submodules or parameters.
        """
        assert self._before is not None, "the forward has begun"
        written = self._watch.written(self._before)
        self.wrote_uncounted = self._reads_values and self._replica.wrote_uncounted(self._tags)
        self.survivors = self._replica.survivors(self._cache.snapshot, self._tags, written)
        return written

    def report(self, position: int, leaf: Tensor) -> None:
        """Pass a leaf's gradient on; called by its hook during a backward."""
        if self._report is not None and leaf.grad is not None:
            gradient, leaf.grad = leaf.grad, None
            self._report(position, gradient)

    def report_to(self, report: Report | None) -> None:
        """Have the next backward report each gradient once it is complete; None to `collect` them later."""
        # Hooks only while they are needed: one costs every backward a call.
        self._report = report
        if report is not None and not self._hooks:
            self._hooks = [
                leaf.register_post_accumulate_grad_hook(_hook(weakref.ref(self), position))
                for position, leaf in enumerate(self.leaves)
            ]
        elif report is None:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def collect(self) -> Gradients:
        """Take the gradients that were not reported; after a failure too, or the next step has them."""
        self._report = None  # it refers to the step's reducer, and so to all its sums
        self._before = None
        self._replica.end(is_recorded=False, looks_anew=True)
        gradients = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return gradients

    def take_survivors(self) -> Survivors | None:
        """Return what of the forward survives, once."""
        survivors, self.survivors = self.survivors, None
        return survivors


def _hook(lane: weakref.ref[TrainingLane], position: int) -> Callable[[Tensor], None]:
    """Return a hook that reports a leaf's gradient to its lane, which it refers to weakly."""

    def report(leaf: Tensor) -> None:
        alive = lane()
        if alive is not None:
            alive.report(position, leaf)

    return report


def _frozen_on(device: torch.device, tensor: Tensor, own: Set[int]) -> Tensor:
    """Return a frozen parameter itself where it is on the device; a copy of any other tensor."""
    if isinstance(tensor, nn.Parameter) and tensor.device == device and id(tensor) not in own:
        return tensor
    return tensor.detach().to(device, copy=True)


class TrainingLanes:
    """The training replicas of one module, one per lane. Only ever used by one step at a time.

    Args:
        devices: one per lane.

    Attributes:
        trainable: the module's tensors that require gradients, as of the last `prepare`.
        buckets: the positions in `trainable` of the tensors that are reduced together.
        num_elements: the number of elements of all of them.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = list(devices)
        self._cache = ReplicaCache(len(self._devices))
        self._lanes: list[TrainingLane | None] = []
        self._key: list[Any] = []
        self._own: Set[int] = frozenset()
        self._in_place_for: ModuleSnapshot | None = None
        self._in_place: Substitutions = {}
        self.trainable: list[Tensor] = []
        self.buckets: list[list[int]] = []
        self.num_elements = 0

    def prepare(
        self, snapshot: ModuleSnapshot, trainable: Sequence[Tensor], num_lanes: int, own: Set[int]
    ) -> list[TrainingLane]:
        """Make the first `num_lanes` lanes ready for one step.

        Args:
            snapshot: what the module consists of.
            trainable: those of its tensors that are trained.
            num_lanes: how many lanes compute.
            own: as of a `TrainingLane`.
        """
        self._follow(snapshot)
        required = set(map(id, trainable))
        tensors = [*snapshot.tensors, *snapshot.loose]
        key = [(_identity(each), id(each) in required, id(each) in own) for each in tensors]
        if key != self._key:
            self._key = key
            self._lanes = [None] * len(self._devices)
            self._own = own
            self.trainable = list(trainable)
            self.buckets = bucket_positions(self.trainable)
            self.num_elements = sum(tensor.numel() for tensor in self.trainable)
        return [self._lane(position, snapshot) for position in range(num_lanes)]

    def bind_in_place(
        self, snapshot: ModuleSnapshot, training: Sequence[bool], carried: AttributeMap
    ) -> Replica:
        """Return the first lane's replica, which then has the parameters of the module itself."""
        if snapshot is not self._cache.snapshot or snapshot is not self._in_place_for:
            self._follow(snapshot)
            self._in_place_for, self._in_place = snapshot, substitutions(snapshot.tensors, snapshot.tensors)
        changes = self._cache.changes
        replica = self._cache.replicas[0]
        replica.bind(self._in_place, {**changes, **carried} if carried else changes, training)
        return replica

    def _follow(self, snapshot: ModuleSnapshot) -> None:
        """Have the replicas follow a change of the module, or build them anew if they cannot."""
        if not self._cache.follow(snapshot):
            self._cache.build(snapshot)
            self._key = []

    def _lane(self, position: int, snapshot: ModuleSnapshot) -> TrainingLane:
        lane = self._lanes[position]
        if lane is None:
            known = set(map(id, self.trainable))
            frozen = [tensor for tensor in snapshot.tensors if id(tensor) not in known]
            device = self._devices[position]
            lane = TrainingLane(
                self._cache, position, device, self.trainable, frozen, snapshot.loose, self._own
            )
            self._lanes[position] = lane
        return lane


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what stays the same while a leaf or a copy made of `tensor` can go on standing for it."""
    is_strided = tensor.layout is torch.strided
    return (
        tensor.data_ptr() if is_strided else id(tensor),
        tensor.stride() if is_strided else (),
        tensor.dtype,
        tensor.shape,
        tensor.device,
    )
