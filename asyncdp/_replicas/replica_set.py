"""The replicas of one module, kept across passes.

Lanes on the module's own device share its parameters, so that nothing is copied and no change can be
missed. Other devices keep copies, made anew when a parameter changed. Buffers are per lane, so that
lanes never race on running statistics; lane 0 has the module's own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._autograd import broadcast_first
from .buckets import DEFAULT_BUCKET_BYTES, buckets
from .copies import Stamp, copies_on, hold_storages, storages
from .replica import KEPT, AttributeMap, Replica, TensorMap, check_module, stand_ins
from .snapshot import Structure, modules_of

# Preparing more than this costs more than a detour over a lane, and would hold up the event loop.
_MAX_QUICK_MODULES = 256
_MAX_QUICK_ALIASES = 32


@dataclass(slots=True)
class LaneModule:
    """A module as one lane runs it in one pass."""

    replica: Replica
    tensors: TensorMap
    changes: AttributeMap
    source: _Copies | None
    buffer_owners: Sequence[nn.Module]
    held: Sequence[torch.UntypedStorage] = ()
    """What the tensors begin with: a forward may give them other memory before a device has read this."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the replica's forward; only ever on the lane's own thread."""
        tensors = self.tensors if self.source is None else self.source.up_to_date(self.tensors)
        self.replica.install(tensors, self.changes)
        before = {}
        if self.buffer_owners and self.source is not None:
            before = {id(tensor): Stamp.of(tensor) for tensor in tensors.values()}
        output = self.replica.module(*args, **kwargs)
        for owner in self.buffer_owners:
            self._write_back(owner, tensors, before)
        return output

    def _write_back(self, owner: nn.Module, installed: TensorMap, before: dict[int, Stamp | None]) -> None:
        """Let this lane's buffer updates survive: carry them into the module's own buffers."""
        copies = self.replica.buffers_of(owner)
        for name, own in list(owner._buffers.items()):
            updated = copies.get(name)
            if updated is own:
                continue
            if own is None or updated is None or updated is not installed.get(id(own)):
                # Forward put another tensor in the buffer's place.
                owner._buffers[name] = brought_back(updated, own)
            elif self._is_copied(own) and (owner.training or before.get(id(updated)) != Stamp.of(updated)):
                # Asked for the mode too: batch norm changes its statistics without counting a version.
                with torch.no_grad():
                    own.copy_(updated)

    def _is_copied(self, tensor: Tensor) -> bool:
        return self.source is not None and self.source.has(tensor)


def brought_back(updated: Tensor | None, own: Tensor | None) -> Tensor | None:
    """What a forward put in a buffer's place, on the device of the one that it replaces."""
    if updated is None or own is None:
        return updated
    return updated.detach().to(own.device)


class _Copies:
    """One lane's copies of tensors that live on another device."""

    def __init__(self, originals: Sequence[Tensor], device: torch.device, checksum: bool) -> None:
        self._originals = originals
        self._device = device
        self._checksum = checksum
        self._stamps: dict[int, Stamp | None] = {}
        self._held = hold_storages(())
        self._copies: TensorMap = {}

    def has(self, tensor: Tensor) -> bool:
        """Whether the lane uses a copy in place of `tensor`."""
        return id(tensor) in self._copies

    def forget(self) -> None:
        self._stamps = {}

    def up_to_date(self, tensors: TensorMap) -> TensorMap:
        """Complete `tensors` by copies of all it lacks; copy anew only what changed."""
        before = self._stamps
        stamps = {id(tensor): Stamp.of(tensor, checksum=self._checksum) for tensor in self._originals}
        changed = [
            tensor
            for tensor in self._originals
            if stamps[id(tensor)] is None or before.get(id(tensor)) != stamps[id(tensor)]
        ]
        if changed:
            held = hold_storages(self._originals)
            fresh = copies_on(changed, self._device)
            self._copies = {**self._copies, **stand_ins(changed, fresh)}
            if self._stamps is before:  # and was not forgotten meanwhile
                self._stamps, self._held = stamps, held
        return {**self._copies, **tensors} if tensors else self._copies


class ReplicaSet:
    """The replicas of one module on several lanes.

    Args:
        module: what to replicate; only referred to weakly, and given again to `prepare`.
        devices: one per lane.
        bucket_bytes: size of what one reduce-add of gradients covers.
        checksum: read the values of everything copied at every pass, to find changes of any kind.
    """

    def __init__(
        self,
        module: nn.Module,
        devices: Sequence[torch.device],
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        checksum: bool = False,
    ) -> None:
        check_module(module)
        self._devices = list(devices)
        self._bucket_bytes = bucket_bytes
        self._checksum = checksum
        self._lock = threading.Lock()
        self._structure: Structure | None = None  # until the first pass builds the replicas
        self._handed_out: dict[tuple[int, ...], list[LaneModule]] = {}  # what later passes may have too
        self._buffer_stamps: list[Stamp | None] = []  # empty if buffers may change without a trace
        self._held = hold_storages(())  # those of the stamps

    def refresh(self) -> None:
        """Copy everything anew for the next pass, also what was changed behind autograd's back."""
        for copies in self._copies if self._structure else ():
            if copies is not None:
                copies.forget()
        self._buffer_stamps = []

    def prepare_nowait(self, module: nn.Module, lanes: Sequence[int]) -> list[LaneModule] | None:
        """As `prepare` if that takes microseconds, else None: then prepare on a lane.

        After a pass in train mode lane 0 may be changing buffers; the next preparation queues behind it.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return self._hand_out(module, lanes) if self._is_quick(len(lanes)) else None
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
            if not self._follows():
                self._build(module)
            if not self._are_buffers_current():
                self._refresh_buffers()
            return self._hand_out(module, lanes)

    def _is_quick(self, num_lanes: int) -> bool:
        if self._structure is None or len(self._structure) > _MAX_QUICK_MODULES:
            return False
        if self._checksum and self._buffers:
            return False
        if not self._follows() or not self._are_buffers_current():
            return False
        num_aliases = len(self._parameters) * num_lanes if torch.is_grad_enabled() else 0
        return num_aliases <= _MAX_QUICK_ALIASES

    def _hand_out(self, module: nn.Module, lanes: Sequence[int]) -> list[LaneModule]:
        aliases = self._aliases(lanes)
        key = tuple(lanes)
        if aliases is None and key in self._handed_out:
            return self._handed_out[key]
        owners = [each for each in module.modules() if each._buffers] if self._has_buffers else []
        if any(each.training for each in owners):
            self._buffer_stamps = []
        made = [
            LaneModule(
                self._replicas[lane],
                {**self._shared[lane], **own} if own else self._shared[lane],
                self._changes,
                self._copies[lane],
                owners if lane == 0 else (),
                storages(own.values()) if self._devices[lane].type != "cpu" else (),
            )
            for lane, own in zip(lanes, aliases or [{}] * len(lanes), strict=True)
        ]
        if aliases is None and not owners:  # the module keeps this, which must not keep the module
            self._handed_out[key] = made
        return made

    def _build(self, module: nn.Module) -> None:
        check_module(module)
        self._structure = None  # should anything below fail, the next pass starts here again
        structure = Structure(module)
        self._parameters = list(module.parameters())
        self._buffers = list(module.buffers())
        self._has_buffers = any(each._buffers for each in module.modules())  # empty places count too
        self._replicas = [Replica(module, deep=False) for _ in self._devices]
        self._copies = [self._copies_for(lane) for lane in range(len(self._devices))]
        self._buffer_stamps = []
        self._lane_buffers: list[Tensor] = []
        self._changes: AttributeMap = {}
        self._handed_out = {}
        self._shared: list[TensorMap] = [self._own_parameters(lane) for lane in range(len(self._devices))]
        self._structure = structure

    def _is_own(self, tensor: Tensor, lane: int) -> bool:
        """Whether a lane uses the module's own tensor."""
        return tensor.device == self._devices[lane]

    def _copies_for(self, lane: int) -> _Copies | None:
        foreign = [
            tensor
            for tensor in self._parameters + (self._buffers if lane == 0 else [])
            if not self._is_own(tensor, lane)
        ]
        return _Copies(foreign, self._devices[lane], self._checksum) if foreign else None

    def _own_parameters(self, lane: int) -> TensorMap:
        own = [tensor for tensor in self._parameters if self._is_own(tensor, lane)]
        return stand_ins(own, own)

    def _are_buffers_current(self) -> bool:
        """Whether every lane's buffers are what the module's are."""
        if not self._buffers:
            return True
        stamps = self._current_stamps()
        return None not in stamps and stamps == self._buffer_stamps

    def _current_stamps(self) -> list[Stamp | None]:
        return [Stamp.of(tensor, checksum=self._checksum) for tensor in [*self._buffers, *self._lane_buffers]]

    def _refresh_buffers(self) -> None:
        """Give each lane but the first new copies of the buffers.

        New ones instead of writing into the old: a pass under way may still read those.
        """
        before = self._buffer_stamps
        self._handed_out = {}
        own = [buffer for buffer in self._buffers if self._is_own(buffer, 0)]
        self._shared[0] = {**self._shared[0], **stand_ins(own, own)}
        self._lane_buffers = []
        for lane, device in enumerate(self._devices[1:], start=1):
            copies = copies_on(self._buffers, device)
            self._lane_buffers += copies
            self._shared[lane] = {**self._shared[lane], **stand_ins(self._buffers, copies)}
        # Made on one lane's stream, read on those of others.
        wait_issued({buffer.device for buffer in [*self._buffers, *self._lane_buffers]})
        if self._buffer_stamps is before:  # and no refresh was asked for meanwhile
            self._buffer_stamps = self._current_stamps()
            self._held = hold_storages(self._buffers)

    def _aliases(self, lanes: Sequence[int]) -> list[TensorMap] | None:
        """Each lane's own parameters for a pass that records their gradients; None for any other."""
        if not torch.is_grad_enabled():
            return None
        learning = [tensor for tensor in [*self._parameters, *self._buffers] if tensor.requires_grad]
        if not learning:
            return None
        aliases: list[dict[int, Tensor]] = [{} for _ in lanes]
        devices = [self._devices[lane] for lane in lanes]
        for bucket in buckets(learning, self._bucket_bytes):
            outputs = broadcast_first(devices, bucket)
            for position, own in enumerate(aliases):
                share = outputs[position * len(bucket) : (position + 1) * len(bucket)]
                own.update(stand_ins(bucket, share))
        return list(aliases)

    def _follows(self) -> bool:
        """Note changes of plain attributes for the replicas; tell whether that was all."""
        if self._structure is None:
            return False
        if self._structure.is_same():
            return True
        changes = self._structure.plain_changes()
        if changes is None:
            return False
        # A new map: a pass under way keeps the values of its own time.
        self._changes = {**self._changes, **changes}
        self._handed_out = {}
        for replica in self._replicas:
            replica.changes = self._changes
        self._structure.take_note()
        return True


def updates_buffers(module: nn.Module) -> bool:
    """Whether a forward is likely to change buffers, which must then happen on lane 0."""
    return any(each._buffers and each.training for each in modules_of(module))


class Kept(dict[tuple[torch.device, ...], ReplicaSet]):
    """A module's replica sets by their devices. Copies and pickles of the module go without them.

    So do forked children: a lane may have been at work on a replica, or have held its set's lock.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = weakref.ref(owner)  # a shallow copy of the module has this too, but does not own it
        self.process = os.getpid()

    def __deepcopy__(self, memo: object) -> dict[Any, Any]:
        return {}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


def replica_set_of(module: nn.Module, devices: Sequence[torch.device]) -> ReplicaSet:
    """The module's replica set for these devices, made at first use and kept as long as the module.

    It is kept on the module itself: a table of weak keys would hold for ever any module that its own
    hooks, which the replicas share, refer to.
    """
    kept = module.__dict__.get(KEPT)
    if not isinstance(kept, Kept) or kept.owner() is not module or kept.process != os.getpid():
        kept = module.__dict__[KEPT] = Kept(module)
    key = tuple(devices)
    if key not in kept:
        kept[key] = ReplicaSet(module, devices)
    return kept[key]


def wait_issued(devices: Iterable[torch.device]) -> None:
    """Block until everything this thread has issued on its current streams of `devices` is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
