"""Copies of a module, one per lane, whose parameters pass their gradients on to the original's."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .refusals import warn_if_compiled
from .snapshot import CACHE_ATTRIBUTE, PLAIN, AttributeMap, ModuleSnapshot

Substitutions = Mapping[int, Tensor]
"""The `id` of one of the original module's parameters or buffers -> the tensor in its place."""

_SET_APART = ("_parameters", "_buffers", "_modules")


def substitutions(originals: Sequence[Tensor], replacements: Sequence[Tensor]) -> Substitutions:
    """Map originals to their replacements; that of a parameter counts as a parameter too."""
    for original, replacement in zip(originals, replacements, strict=True):
        if isinstance(original, nn.Parameter) and replacement is not original:
            # What isinstance(x, nn.Parameter) looks at for tensors that are no such instances.
            replacement._is_param = True
    return {id(original): new for original, new in zip(originals, replacements, strict=True)}


class Replica:
    """A copy of a module's structure, in whose places tensors can be put again and again.

    Args:
        snapshot: what to copy, of a module that is alive.
        deep: whether attributes that are neither modules nor tensors are copied too, or shared with
            the original. Either way, references to the original's submodules become the replica's.

    Attributes:
        module: the copy.
    """

    def __init__(self, snapshot: ModuleSnapshot, *, deep: bool) -> None:
        originals = snapshot.modules
        warn_if_compiled(originals)
        self._modules = [*map(_bare_copy, originals, snapshot.namespaces)]
        self.module = self._modules[0]
        self._bound: Substitutions = {}
        self._bound_changes: AttributeMap = {}
        self._parameters: list[tuple[dict[str, Any], str, int]] = []
        self._buffers: list[tuple[dict[str, Any], str, int]] = []
        self._empty_buffers: list[tuple[dict[str, Any], str]] = []
        self._attributes: list[tuple[dict[str, Any], str, Any]] = []
        copies = {id(each): copied for each, copied in zip(originals, self._modules, strict=True)}
        # A submodule, met inside an attribute, stands for its copy; a copy stands for itself.
        memo = {**copies, **{id(copied): copied for copied in self._modules}} if deep else None
        tensor_ids = {id(tensor) for tensor in snapshot.tensors}
        for original, replica in zip(originals, self._modules, strict=True):
            self._fill(replica.__dict__, copies, memo, tensor_ids)
            if isinstance(original, nn.RNNBase) and not deep:
                replica.__dict__["flatten_parameters"] = _Flatten(original, replica)

    def bind(self, tensors: Substitutions, changes: AttributeMap) -> None:
        """Put tensors in the places of the original's, and values in those of its plain attributes.

        Args:
            tensors: a substitution for each parameter and buffer of the original.
            changes: all plain attributes that changed since the replica was made.
        """
        # Buffers always: a forward may have put another tensor in a buffer's place.
        for registry, name, key in self._buffers:
            registry[name] = tensors[key]
        for registry, name in self._empty_buffers:
            registry[name] = None
        if tensors is not self._bound:
            for registry, name, key in self._parameters:
                registry[name] = tensors[key]
            for namespace, name, template in self._attributes:
                namespace[name] = _substitute(template, tensors)
            self._bound = tensors
        if changes is not self._bound_changes:
            for (position, name), value in changes.items():
                self._modules[position].__dict__[name] = value
            self._bound_changes = changes

    def set_modes(self, training: Sequence[bool]) -> None:
        """Put each module in train mode or in eval mode."""
        for module, mode in zip(self._modules, training, strict=True):
            module.__dict__["training"] = mode

    def buffer_versions(self) -> dict[int, int]:
        """Return the version of each buffer by its `id`, to give to `write_back_buffers` after a forward."""
        buffers = [registry[name] for registry, name, _ in self._buffers]
        return {id(buffer): buffer._version for buffer in buffers if not buffer.is_inference()}

    def write_back_buffers(self, snapshot: ModuleSnapshot, versions: Mapping[int, int]) -> None:
        """Carry what a forward did to the buffers into those of the original."""
        originals = snapshot.modules
        for position in snapshot.buffer_owners:
            replica, own = self._modules[position], originals[position]._buffers
            for name in own | replica._buffers:
                before, after = own.get(name), replica._buffers.get(name)
                if after is before:
                    continue
                if before is None or after is None or after is not self._bound.get(id(before)):
                    # The forward put another tensor in the buffer's place.
                    device = None if before is None else before.device
                    own[name] = None if after is None else after.detach().to(device)
                elif after.requires_grad and after.device == before.device:
                    continue  # the two share their storage
                elif versions.get(id(after)) != after._version or (
                    # Batch norm changes its statistics without counting a version.
                    replica.training and not _overlaps_itself(before)
                ):
                    with torch.no_grad():
                        before.copy_(after)

    def _fill(
        self,
        namespace: dict[str, Any],
        copies: Mapping[int, nn.Module],
        memo: dict[int, Any] | None,
        tensor_ids: set[int],
    ) -> None:
        for registry, slots in (("_parameters", self._parameters), ("_buffers", self._buffers)):
            entries = namespace[registry] = dict(namespace[registry])
            slots += [(entries, name, id(value)) for name, value in entries.items() if value is not None]
        buffers = namespace["_buffers"]
        self._empty_buffers += [(buffers, name) for name, value in buffers.items() if value is None]
        namespace.pop(CACHE_ATTRIBUTE, None)
        namespace["_modules"] = {
            name: None if child is None else copies[id(child)]
            for name, child in namespace["_modules"].items()
        }
        # Compiled code of the original would run the original.
        namespace.pop("_compiled_call_impl", None)
        for name, value in [*namespace.items()]:
            if name in _SET_APART:
                continue
            mapped = _substitute(value, copies)
            if _refers_to(mapped, tensor_ids):
                self._attributes.append((namespace, name, mapped))
            elif memo is not None:
                mapped = _deep_copy(name, mapped, memo)
            namespace[name] = mapped


class ReplicaCache:
    """The replicas of one module, made once and kept while nothing but plain attributes changes.

    Args:
        num_replicas: one per lane.

    Attributes:
        snapshot: what the replicas follow; None before they are first built.
        replicas: the replicas.
        changes: plain attributes that changed since they were built. A new map for every change: a pass
            under way keeps the values of its own time.
    """

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self.snapshot: ModuleSnapshot | None = None
        self.replicas: list[Replica] = []
        self.changes: AttributeMap = {}

    def follow(self, snapshot: ModuleSnapshot) -> bool:
        """Take over changes of plain attributes; return False if the replicas have to be built anew."""
        if self.snapshot is None:
            return False
        if snapshot is self.snapshot:
            return True
        changes = self.snapshot.plain_changes(snapshot)
        if changes is None:
            return False
        if changes:
            self.changes = {**self.changes, **changes}
        self.snapshot = snapshot
        return True

    def build(self, snapshot: ModuleSnapshot) -> None:
        """Make all replicas anew."""
        self.snapshot = None  # should anything below fail, the next pass starts here again
        self.replicas = [Replica(snapshot, deep=False) for _ in range(self._num_replicas)]
        self.changes = {}
        self.snapshot = snapshot


class _Flatten:
    """The `flatten_parameters` of a replica, which does not move weights shared with the original.

    Moved weights would no longer be shared, or would move while other lanes read them. They are as flat as
    the original's.
    """

    def __init__(self, original: nn.RNNBase, replica: nn.Module) -> None:
        self._original = weakref.ref(original)
        self._replica = weakref.ref(replica)

    def __call__(self) -> None:
        original, replica = self._original(), self._replica()
        assert isinstance(replica, nn.RNNBase), "it is called by way of the replica"
        if original is None or not _share_weights(original, replica):
            type(replica).flatten_parameters(replica)


def _share_weights(original: nn.RNNBase, replica: nn.RNNBase) -> bool:
    pairs = zip(original._flat_weights, replica._flat_weights, strict=True)
    return any(
        isinstance(weight, Tensor) and isinstance(twin, Tensor) and weight.data_ptr() == twin.data_ptr()
        for weight, twin in pairs
    )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements share memory, as after `expand`; nothing can write to such a tensor."""
    if tensor.layout is not torch.strided:
        return False
    lengths = zip(tensor.stride(), tensor.shape, strict=True)
    return any(stride == 0 and length > 1 for stride, length in lengths)


def _bare_copy(module: nn.Module, namespace: Mapping[str, Any]) -> nn.Module:
    # Not through the class's own __new__, which some classes (GraphModule) use to make a new class.
    replica = object.__new__(type(module))
    replica.__dict__.update(namespace)
    return replica


def _substitute(value: Any, memo: Mapping[int, Any]) -> Any:
    """Replace what `memo` knows, also inside lists, tuples, dicts and bound methods."""
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    if kind is MethodType and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    if kind in (list, tuple):
        return _rebuilt(value, [_substitute(entry, memo) for entry in value], kind)
    if kind in (dict, OrderedDict):
        entries = [_substitute(entry, memo) for entry in value.values()]
        return _rebuilt(value, entries, lambda new: kind(zip(value, new, strict=True)), list(value.values()))
    return value


def _rebuilt(value: Any, new: list[Any], make: Callable[[list[Any]], Any], old: Any = None) -> Any:
    """Make a new container if an entry changed; else return the same one, so that edits stay visible."""
    entries = value if old is None else old
    if all(before is after for before, after in zip(entries, new, strict=True)):
        return value
    return make(new)


def _refers_to(value: Any, ids: set[int]) -> bool:
    if isinstance(value, Tensor):
        return id(value) in ids
    if type(value) in (list, tuple):
        return any(_refers_to(entry, ids) for entry in value)
    if type(value) in (dict, OrderedDict):
        return any(_refers_to(entry, ids) for entry in value.values())
    return False


def _deep_copy(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute deeply, but share hooks and what cannot be copied (locks, handles)."""
    if isinstance(value, PLAIN):
        return value
    if name.endswith("_hooks"):
        return copy.copy(value)
    # A copy that fails leaves half-built objects in its memo, which no later copy may find.
    trial = dict(memo)
    try:
        copied = copy.deepcopy(value, trial)
    except Exception:
        return value
    memo.update(trial)
    return copied
