"""The replicas of one module for its passes, kept from call to call.

Lanes on the module's own device share its parameters, so that nothing is copied and no change can be
missed. Other devices have copies, made anew when a parameter changed. Buffers are per lane, so that
lanes never race on running statistics; lane 0 has the module's own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Hashable, Iterable, Sequence, Set
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .._autograd import Broadcast
from .copies import (
    DEFAULT_BUCKET_BYTES,
    Copies,
    VersionTag,
    buckets,
    copies_in_place,
    copies_on,
    storage_refs,
    storages,
    wait_issued,
)
from .lane_module import LaneModule, ModuleState
from .order import Reader
from .replica import ReplicaCache, Substitutions, substitutions
from .snapshot import LatestSnapshot, ModuleSnapshot, check_module
from .state import CACHE_ATTRIBUTE
from .survivors import Carried
from .writes import WrittenParameters

# Preparing more than this costs more than a detour over a lane, and would hold up the event loop.
_MAX_QUICK_MODULES = 256
_MAX_QUICK_ALIASES = 32
_MAX_QUICK_ELEMENTS = 2**14

_requires_grad = attrgetter("requires_grad")


class ReplicaSet:
    """The replicas of one module on several lanes.

    Args:
        module: what to replicate; only referred to weakly, and given again to `prepare`.
        devices: one per lane.
        bucket_bytes: size of what one reduce-add of gradients covers.
        checksum: read the values of everything copied at every pass, to find changes of any kind.

    Attributes:
        snapshots: answer what the module consists of.
        readers: each lane's right to read the module.
        carried: what forwards have carried into the module.
        written: the parameters that they have written.
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
        self.snapshots = LatestSnapshot()
        self.readers = [Reader(module, self.snapshots, device) for device in self._devices]
        self.carried = Carried()
        self.written = WrittenParameters(self._devices)
        self._cache = ReplicaCache(len(self._devices))
        self._copies: list[Copies | None] = []
        self._states: dict[Hashable, ModuleState] = {}  # the latest of each kind, of one snapshot
        self._ready: dict[Hashable, list[LaneModule]] = {}  # what later passes may use too
        self._buffer_tags: list[VersionTag | None] = []  # empty if buffers may change uncounted
        self._storage_refs = storage_refs(())

    def refresh(self) -> None:
        """Copy everything anew for the next pass, also what was changed behind autograd's back."""
        for copies in self._copies:
            if copies is not None:
                copies.forget()
        self._buffer_tags = []

    def capture(
        self, module: nn.Module, training: bool | None = None, *, records: bool | None = None
    ) -> ModuleState:
        """Return the state of the module as it is now.

        Args:
            module: the module of the constructor.
            training: the mode that every submodule shall run in; None for the one that it is in.
            records: whether gradients are to be recorded; None for what the current grad mode says.
        """
        snapshot = self.snapshots.current(module)
        records = torch.is_grad_enabled() if records is None else records
        requires = [*map(_requires_grad, snapshot.tensors)] if records else None
        latest = self._states.get((training, records))
        if (
            latest is not None
            and latest.snapshot is snapshot
            and latest.requires == requires
            and latest.carried is self.carried.latest
        ):
            return latest
        state = ModuleState(snapshot, snapshot.modes(training), requires, self.carried.latest)
        # Of other snapshots none is kept: they hold tensors that the module may have no more. Nor are states
        # of before a forward carried something into it, to which all that came since would be kept.
        alike = {
            kind: each
            for kind, each in self._states.items()
            if each.snapshot is snapshot and each.carried is state.carried
        }
        self._states = {**alike, (training, records): state}
        return state

    def prepare_nowait(self, state: ModuleState, lanes: Sequence[int]) -> list[LaneModule] | None:
        """Do what `prepare` does if that takes microseconds, else return None: then prepare on a lane.

        The state has just been captured. After a pass in train mode lane 0 may be changing buffers; the
        next preparation queues behind it.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            ready = self._find_ready(state, lanes)
            if ready is None and self._is_quick(state, lanes):
                return self._assemble(state, lanes)
            return ready
        finally:
            self._lock.release()

    def prepare(
        self,
        module: nn.Module,
        lanes: Sequence[int],
        state: ModuleState | None = None,
        *,
        moves: bool = False,
    ) -> list[LaneModule]:
        """Make the module ready for one pass under the current grad mode.

        Args:
            module: the module of the constructor.
            lanes: positions in `devices`; one shard each.
            state: the module's, as of the call; None for now.
            moves: move the module itself to the first lane's device.

        Returns:
            What each of `lanes` shall call.
        """
        with self._lock:
            state = self.capture(module) if state is None else state.with_carried_tensors()
            if moves and not state.snapshot.is_on(self._devices[lanes[0]]):
                state = self._moved(module, state, self._devices[lanes[0]])
            ready = self._find_ready(state, lanes)
            if ready is not None:
                return ready
            if not self._follow(state.snapshot):
                self._build(state.snapshot)
            if not self._are_buffers_current(state.snapshot):
                self._refresh_buffers(state.snapshot)
            return self._assemble(state, lanes)

    def _moved(self, module: nn.Module, state: ModuleState, device: torch.device) -> ModuleState:
        """Move the module to a device, unless it has other parts by now; return its state there."""
        if not state.snapshot.has_same_parts():
            return state
        module.to(device)
        self.carried.add(state.snapshot, {}, state.snapshot.replaced_tensors())
        return state.with_carried_tensors()

    def _find_ready(self, state: ModuleState, lanes: Sequence[int]) -> list[LaneModule] | None:
        """Return what an earlier pass over these lanes was given, if it is right for this one too."""
        if self.written.known:
            return None
        ready = self._ready.get((*lanes, id(state.training)))
        if ready is None or ready[0].state is not state or state.snapshot is not self._cache.snapshot:
            return None
        return ready if self._are_buffers_current(state.snapshot) else None

    def _is_quick(self, state: ModuleState, lanes: Sequence[int]) -> bool:
        snapshot = state.snapshot
        if self._cache.snapshot is None or len(snapshot.training) > _MAX_QUICK_MODULES:
            return False
        if self._checksum and snapshot.buffers:
            return False
        if not self._follow(snapshot) or not self._are_buffers_current(snapshot):
            return False
        own = self.written.own(snapshot, state.kind, lanes)
        copied = [each for each in snapshot.parameters if id(each) in own] if own else []
        if sum(each.numel() for each in copied) > _MAX_QUICK_ELEMENTS:
            return False
        num_aliases = len(copied) + len(self._broadcast_tensors(state, lanes, own))
        return num_aliases * len(lanes) <= _MAX_QUICK_ALIASES

    def _follow(self, snapshot: ModuleSnapshot) -> bool:
        if snapshot is self._cache.snapshot:
            return True
        self._ready = {}
        return self._cache.follow(snapshot)

    def _build(self, snapshot: ModuleSnapshot) -> None:
        self._cache.build(snapshot)
        self._copies = [self._copies_for(lane, snapshot) for lane in range(len(self._devices))]
        self._buffer_tags = []
        self._lane_buffers: list[Tensor] = []
        self._ready = {}
        loose = substitutions(snapshot.loose, snapshot.loose)
        self._shared = [
            {**self._own(lane, snapshot.parameters), **loose} for lane in range(len(self._devices))
        ]

    def _assemble(self, state: ModuleState, lanes: Sequence[int]) -> list[LaneModule]:
        snapshot = state.snapshot
        own = self.written.own(snapshot, state.kind, lanes)
        is_in_train_mode = state.training is not snapshot.training and any(state.training)
        if snapshot.updates_buffers or is_in_train_mode or self.written.reads_values(state.kind):
            self._buffer_tags = []
        looks_closely = self.written.needs_close_look(state.kind)
        aliases = self._aliases(state, lanes, own)
        carried = state.carried.values_since(snapshot)
        mine = [
            self._with_own(lane, tensors, own)
            for lane, tensors in zip(lanes, aliases or [{}] * len(lanes), strict=True)
        ]
        made = [
            LaneModule(
                self._cache.replicas[lane],
                {**self._shared[lane], **tensors} if tensors else self._shared[lane],
                {**self._cache.changes, **carried} if carried else self._cache.changes,
                state,
                self._copies[lane],
                snapshot if lane == 0 else None,
                self.carried,
                lane,
                self.written,
                self.written.watch,
                own,
                looks_closely,
                storages(tensors.values()) if self._devices[lane].type != "cpu" else (),
            )
            for lane, tensors in zip(lanes, mine, strict=True)
        ]
        if not (carried or looks_closely or aliases):
            self._ready[*lanes, id(state.training)] = made
        return made

    def _with_own(self, lane: int, tensors: Substitutions, own: Set[int]) -> Substitutions:
        """Add copies of what a lane would share with others, but may not; the first has the module's own."""
        if lane == 0 or not own:
            return tensors
        device = self._devices[lane]
        shared = [
            each
            for each in self.written.parameters
            if id(each) in own and id(each) not in tensors and each.device == device
        ]
        copies = copies_in_place(shared)
        wait_issued({device})
        return {**tensors, **substitutions(shared, copies)}

    def _copies_for(self, lane: int, snapshot: ModuleSnapshot) -> Copies | None:
        device = self._devices[lane]
        needed = snapshot.tensors if lane == 0 else snapshot.parameters
        foreign = [tensor for tensor in needed if tensor.device != device]
        return Copies(foreign, device, self._checksum) if foreign else None

    def _own(self, lane: int, tensors: Sequence[Tensor]) -> Substitutions:
        """Return those of the module's tensors that a lane uses itself."""
        own = [tensor for tensor in tensors if tensor.device == self._devices[lane]]
        return substitutions(own, own)

    def _are_buffers_current(self, snapshot: ModuleSnapshot) -> bool:
        """Return whether every lane's buffers are what the module's are."""
        if not snapshot.buffers and not snapshot.loose:
            return True
        tags = self._current_tags(snapshot)
        return None not in tags and tags == self._buffer_tags

    def _current_tags(self, snapshot: ModuleSnapshot) -> list[VersionTag | None]:
        buffers = [*snapshot.buffers, *snapshot.loose, *self._lane_buffers]
        return [VersionTag.of(buffer, checksum=self._checksum) for buffer in buffers]

    def _refresh_buffers(self, snapshot: ModuleSnapshot) -> None:
        """Give each lane but the first new copies of the buffers.

        New ones instead of writing into the old: a pass under way may still read those.
        """
        before = self._buffer_tags
        buffers = snapshot.buffers
        self._ready = {}
        self._shared[0] = {**self._shared[0], **self._own(0, buffers)}
        self._lane_buffers = []
        for lane, device in enumerate(self._devices[1:], start=1):
            copies = copies_on(buffers, device) + copies_in_place(snapshot.loose)
            self._lane_buffers += copies
            originals = [*buffers, *snapshot.loose]
            self._shared[lane] = {**self._shared[lane], **substitutions(originals, copies)}
        # Made on one lane's stream, read on those of others.
        wait_issued({tensor.device for tensor in [*buffers, *snapshot.loose, *self._lane_buffers]})
        if self._buffer_tags is before:  # and no refresh was asked for meanwhile
            self._buffer_tags = self._current_tags(snapshot)
            self._storage_refs = storage_refs([*buffers, *snapshot.loose])

    def _broadcast_tensors(
        self, state: ModuleState, lanes: Sequence[int], own: Iterable[int]
    ) -> list[Tensor]:
        """Return what lanes cannot take from the module itself to record gradients.

        On one lane, and on two CPU lanes, nothing is left to ReduceAdd: the sum of two is the same in any
        order, so autograd's own will do. It adds up those of more lanes in no certain order.
        """
        if state.requires is None or not torch.is_grad_enabled():
            return []
        devices = {self._devices[lane] for lane in lanes}
        trainable = [tensor for tensor in state.trainable() if tensor.requires_grad]
        if len(lanes) > 2 or (len(lanes) == 2 and devices != {torch.device("cpu")}):
            return trainable
        (device,) = devices
        if [*lanes] == [0]:
            return trainable if any(each.device != device for each in trainable) else []
        apart = {*own, *map(id, state.snapshot.buffers)}
        return [each for each in trainable if id(each) in apart or each.device != device]

    def _aliases(self, state: ModuleState, lanes: Sequence[int], own: Set[int]) -> list[Substitutions] | None:
        """Return each lane's own parameters for a pass that records gradients; None for any other.

        Of those in `own` all lanes but the first get copies.
        """
        trainable = self._broadcast_tensors(state, lanes, own)
        if not trainable:
            return None
        devices = [self._devices[lane] for lane in lanes]
        aliases: list[dict[int, Tensor]] = [{} for _ in lanes]
        # The first lane shares the memory and the version of all: what it writes survives, and a backward
        # finds out what has been written since the forward.
        copied = [lane > 0 for lane in lanes]
        shared = [each for each in trainable if id(each) not in own]
        apart = [each for each in trainable if id(each) in own]
        groups: list[tuple[list[Tensor], bool | list[bool]]] = []
        groups += [(each, False) for each in buckets(shared, self._bucket_bytes)]
        groups += [(each, copied) for each in buckets(apart, self._bucket_bytes)]
        for bucket, copy in groups:
            outputs = Broadcast.apply(devices, copy, *bucket)
            for position, mine in enumerate(aliases):
                share = outputs[position * len(bucket) : (position + 1) * len(bucket)]
                mine.update(substitutions(bucket, share))
        return list(aliases)


class ReplicaSets(dict[tuple[torch.device, ...], ReplicaSet]):
    """A module's replica sets by their devices. Copies and pickles of the module go without them.

    So do forked children: a lane may have been running a replica, or have held its set's lock.
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
    """Return the module's replica set for these devices, made at first use and kept as long as the module.

    It is kept on the module itself: a table of weak keys would hold for ever any module that its own
    hooks, which the replicas share, refer to.
    """
    sets = module.__dict__.get(CACHE_ATTRIBUTE)
    if not isinstance(sets, ReplicaSets) or sets.owner() is not module or sets.process != os.getpid():
        sets = module.__dict__[CACHE_ATTRIBUTE] = ReplicaSets(module)
    key = tuple(devices)
    if key not in sets:
        sets[key] = ReplicaSet(module, devices)
    return sets[key]
