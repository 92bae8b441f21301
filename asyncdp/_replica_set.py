"""The replicas of one module, kept across passes.

Lanes on the module's own device share its parameters, so that nothing is copied and no change can be
missed. Other devices keep copies, made anew when a parameter changed. Buffers are per lane, so that
lanes never race on running statistics; lane 0 has the module's own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._autograd import Broadcast
from ._buckets import DEFAULT_BUCKET_BYTES, buckets
from ._replicate import Replica, TensorMap, check_module, stand_ins

# Preparing more than this costs more than a detour over a lane, and would hold up the event loop.
_MAX_QUICK_MODULES = 64
_MAX_QUICK_ALIASES = 32

# Values that nothing inside the replica can refer to by another way than this attribute.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class _Snapshot(NamedTuple):
    """What one submodule looked like when the replicas were made."""

    module: weakref.ref[nn.Module]
    names: list[str]
    ids: list[int]
    members: list[list[Any]]
    kept_alive: list[Any]  # so that the ids stay theirs

    @classmethod
    def of(cls, module: nn.Module) -> _Snapshot:
        values = [value for value in module.__dict__.values() if not isinstance(value, MethodType)]
        return cls(
            weakref.ref(module),
            list(module.__dict__),
            list(map(id, module.__dict__.values())),
            _members(module),
            [*values, *module._parameters.values(), *module._buffers.values()],
        )


def _members(module: nn.Module) -> list[list[Any]]:
    registries: list[dict[str, Any]] = [module._parameters, module._buffers, module._modules]
    return [[*registry, *map(id, registry.values())] for registry in registries]


class _Stamp(NamedTuple):
    """Tells whether a tensor's values may have changed."""

    version: int
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Stamp | None:
        """None for inference tensors, which count no versions: they always may have changed."""
        return None if tensor.is_inference() else cls(tensor._version, tensor.data_ptr())


class LaneModule:
    """A module as one lane runs it in one pass."""

    __slots__ = ("_buffer_owners", "_replica", "_source", "_tensors")

    def __init__(
        self,
        replica: Replica,
        tensors: TensorMap,
        source: _Copies | None,
        buffer_owners: Sequence[nn.Module],
    ) -> None:
        self._replica = replica
        self._tensors = tensors
        self._source = source
        self._buffer_owners = buffer_owners

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the replica's forward; only ever on the lane's own thread."""
        tensors = self._tensors
        if self._source is not None:
            tensors = self._source.up_to_date(tensors)
        self._replica.install(tensors)
        before = {}
        if self._buffer_owners and self._source is not None:
            before = {id(tensor): _Stamp.of(tensor) for tensor in tensors.values()}
        output = self._replica.module(*args, **kwargs)
        for owner in self._buffer_owners:
            self._write_back(owner, before)
        return output

    def _write_back(self, owner: nn.Module, before: dict[int, _Stamp | None]) -> None:
        """Let this lane's buffer updates survive: carry them into the module's own buffers."""
        assert self._replica.installed is not None
        copies = self._replica.buffers_of(owner)
        for name, own in list(owner._buffers.items()):
            updated = copies.get(name)
            if own is None or updated is None or updated is own:
                continue
            if updated is not self._replica.installed.get(id(own)):
                # Forward put another tensor in the buffer's place.
                owner._buffers[name] = updated.detach().to(own.device)
            elif updated.device != own.device and before.get(id(updated)) != _Stamp.of(updated):
                with torch.no_grad():
                    own.copy_(updated)


class _Copies:
    """One lane's copies of tensors that live on another device."""

    def __init__(self, originals: Sequence[Tensor], device: torch.device) -> None:
        self._originals = originals
        self._device = device
        self._stamps: dict[int, _Stamp | None] = {}
        self._copies: TensorMap = {}

    def forget(self) -> None:
        self._stamps = {}

    def up_to_date(self, tensors: TensorMap) -> TensorMap:
        """Complete `tensors` by copies of all it lacks; copy anew only what changed."""
        changed = [
            tensor
            for tensor in self._originals
            if (stamp := _Stamp.of(tensor)) is None or self._stamps.get(id(tensor)) != stamp
        ]
        if changed:
            self._stamps = {**self._stamps, **{id(tensor): _Stamp.of(tensor) for tensor in changed}}
            fresh = _copied(changed, self._device)
            self._copies = {**self._copies, **stand_ins(changed, fresh)}
        return {**self._copies, **tensors} if tensors else self._copies


class ReplicaSet:
    """The replicas of one module on several lanes.

    Args:
        module: what to replicate; only referred to weakly, and given again to `prepare`.
        devices: one per lane.
        bucket_bytes: size of what one reduce-add of gradients covers.
    """

    def __init__(
        self,
        module: nn.Module,
        devices: Sequence[torch.device],
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        check_module(module)
        self._devices = list(devices)
        self._bucket_bytes = bucket_bytes
        self._lock = threading.Lock()
        self._snapshots: list[_Snapshot] = []  # empty until the first pass builds the replicas
        self._buffer_stamps: list[_Stamp | None] = []

    def refresh(self) -> None:
        """Copy everything anew for the next pass, also what was changed behind autograd's back."""
        for copies in self._copies if self._snapshots else ():
            if copies is not None:
                copies.forget()
        self._buffer_stamps = []

    def prepare_nowait(self, module: nn.Module, lanes: Sequence[int]) -> list[LaneModule] | None:
        """As `prepare` if that takes microseconds, else None: then prepare on a lane.

        A train-mode module's buffers may be in use on lane 0; its preparation queues behind that.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if self._is_quick(module, len(lanes)):
                return self._prepare(module, lanes)
            return None
        finally:
            self._lock.release()

    def prepare(self, module: nn.Module, lanes: Sequence[int]) -> list[LaneModule]:
        """Make the module ready for one pass under the current grad mode.

        Args:
            module: the module of the constructor.
            lanes: positions in `devices`; one shard each.

        Returns:
            What each of `lanes` shall call.
        """
        with self._lock:
            return self._prepare(module, lanes)

    def _is_quick(self, module: nn.Module, num_lanes: int) -> bool:
        if not self._snapshots or len(self._snapshots) > _MAX_QUICK_MODULES:
            return False
        if self._buffers and module.training:
            return False
        num_aliases = len(self._parameters) * num_lanes if torch.is_grad_enabled() else 0
        return num_aliases <= _MAX_QUICK_ALIASES

    def _prepare(self, module: nn.Module, lanes: Sequence[int]) -> list[LaneModule]:
        if not self._follows(module):
            self._build(module)
        self._refresh_buffers()
        aliases = self._aliases(lanes)
        prepared = []
        for lane, own in zip(lanes, aliases, strict=True):
            tensors = {**self._shared[lane], **own} if own else self._shared[lane]
            owners = (
                [each for each in module.modules() if each._buffers] if lane == 0 and self._buffers else ()
            )
            prepared.append(LaneModule(self._replicas[lane], tensors, self._copies[lane], owners))
        return prepared

    def _build(self, module: nn.Module) -> None:
        check_module(module)
        self._parameters = list(module.parameters())
        self._buffers = list(module.buffers())
        self._snapshots = [_Snapshot.of(each) for each in module.modules()]
        self._replicas = [Replica(module, deep=False) for _ in self._devices]
        self._copies = [self._copies_for(lane) for lane in range(len(self._devices))]
        self._buffer_stamps = []
        self._lane_buffers: list[Tensor] = []
        self._shared: list[TensorMap] = [{} for _ in self._devices]
        self._share_parameters()
        self._refresh_buffers()

    def _is_own(self, tensor: Tensor, lane: int) -> bool:
        """Whether a lane uses the module's own tensor."""
        return tensor.device == self._devices[lane]

    def _copies_for(self, lane: int) -> _Copies | None:
        foreign = [
            tensor
            for tensor in self._parameters + (self._buffers if lane == 0 else [])
            if not self._is_own(tensor, lane)
        ]
        return _Copies(foreign, self._devices[lane]) if foreign else None

    def _share_parameters(self) -> None:
        for lane in range(len(self._devices)):
            own = [tensor for tensor in self._parameters if self._is_own(tensor, lane)]
            self._shared[lane] = stand_ins(own, own)

    def _refresh_buffers(self) -> None:
        """Give each lane but the first new copies of the buffers if any of them changed.

        New ones instead of writing into the old: a pass under way may still read those.
        """
        if not self._buffers:
            return
        stamps = [_Stamp.of(tensor) for tensor in [*self._buffers, *self._lane_buffers]]
        if None not in stamps and stamps == self._buffer_stamps:
            return
        own = [buffer for buffer in self._buffers if self._is_own(buffer, 0)]
        self._shared[0] = {**self._shared[0], **stand_ins(own, own)}
        self._lane_buffers = []
        for lane, device in enumerate(self._devices[1:], start=1):
            copies = _copied(self._buffers, device)
            self._lane_buffers += copies
            self._shared[lane] = {**self._shared[lane], **stand_ins(self._buffers, copies)}
        self._buffer_stamps = [_Stamp.of(tensor) for tensor in [*self._buffers, *self._lane_buffers]]

    def _aliases(self, lanes: Sequence[int]) -> list[TensorMap]:
        """Each lane's own parameters for a pass that records gradients; empty maps for one that does not."""
        aliases: list[dict[int, Tensor]] = [{} for _ in lanes]
        if not torch.is_grad_enabled():
            return list(aliases)
        learning = [tensor for tensor in [*self._parameters, *self._buffers] if tensor.requires_grad]
        devices = [self._devices[lane] for lane in lanes]
        for bucket in buckets(learning, self._bucket_bytes):
            outputs = Broadcast.apply(devices, False, *bucket)
            for position, own in enumerate(aliases):
                share = outputs[position * len(bucket) : (position + 1) * len(bucket)]
                own.update(stand_ins(bucket, share))
        return list(aliases)

    def _follows(self, module: nn.Module) -> bool:
        """Carry changes of plain attributes over to the replicas; tell whether that was all."""
        modules = list(module.modules())
        if len(modules) != len(self._snapshots):
            return False
        for position, each in enumerate(modules):
            snapshot = self._snapshots[position]
            if snapshot.module() is not each or snapshot.members != _members(each):
                return False
            if snapshot.ids != list(map(id, each.__dict__.values())):
                if not self._follow_attributes(each, snapshot):
                    return False
                self._snapshots[position] = _Snapshot.of(each)
        return True

    def _follow_attributes(self, module: nn.Module, snapshot: _Snapshot) -> bool:
        if snapshot.names != list(module.__dict__):
            return False
        for (name, value), old in zip(module.__dict__.items(), snapshot.ids, strict=True):
            if id(value) == old:
                continue
            if not isinstance(value, _PLAIN):
                return False
            for replica in self._replicas:
                replica.set_attribute(module, name, value)
        return True


def _copied(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    # Outside inference mode, whose tensors could not be used by a later pass that trains.
    with torch.inference_mode(False), torch.no_grad():
        return [tensor.detach().to(device, copy=True) for tensor in tensors]
