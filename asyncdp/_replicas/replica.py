"""Copies of a module, one per lane, whose parameters pass their gradients on to the original's."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AddedInForwardError
from .snapshot import CACHE_ATTRIBUTE, PLAIN, AttributeMap, ModuleSnapshot, is_plain
from .state import ATOMS, MUTABLE, OF_ALL_MODULES, REGISTRIES, empty_like, is_same, refill, shallow, watch

Substitutions = Mapping[int, Tensor]
"""The `id` of one of the original module's parameters or buffers -> the tensor in its place."""


def substitutions(originals: Sequence[Tensor], replacements: Sequence[Tensor]) -> Substitutions:
    """Map originals to their replacements; that of a parameter counts as a parameter too."""
    for original, replacement in zip(originals, replacements, strict=True):
        if isinstance(original, nn.Parameter) and replacement is not original:
            # What isinstance(x, nn.Parameter) looks at for tensors that are no such instances.
            replacement._is_param = True
    return {id(original): new for original, new in zip(originals, replacements, strict=True)}


@dataclass(slots=True)
class Survivors:
    """What of a forward's changes to its replica survives in the original.

    Attributes:
        snapshot: of the original.
        buffers: position and name of each buffer to be changed; what it was before, what it is now, and
            whether it was put in the other's place.
        values: plain values that were set beside buffers that changed.
        loose: tensors to be written to, and from what.
    """

    snapshot: ModuleSnapshot
    buffers: list[tuple[int, str, Tensor | None, Tensor | None, bool]] = field(default_factory=list)
    values: dict[tuple[int, str], Any] = field(default_factory=dict)
    loose: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    transient: list[tuple[int, str]] = field(default_factory=list)
    """New buffers that are not to be saved."""

    def apply(self) -> None:
        """Carry them into the original."""
        modules = self.snapshot.modules
        for position, name in self.transient:
            modules[position]._non_persistent_buffers_set.add(name)
        with torch.no_grad():
            for position, name, before, after, is_replaced in self.buffers:
                if not is_replaced:
                    before.copy_(after)  # type: ignore[union-attr, arg-type]
                else:
                    device = None if before is None else before.device
                    modules[position]._buffers[name] = None if after is None else after.detach().to(device)
            for before, after in self.loose:
                before.copy_(after)
        for (position, name), value in self.values.items():
            modules[position].__dict__[name] = value


class Replica:
    """A copy of a module's structure, in whose places tensors can be put again and again.

    Args:
        snapshot: what to copy, of a module that is alive.
        deep: whether attributes that are neither modules nor tensors are copied too, or shared with
            the original. Either way, references to the original's submodules become the replica's, and
            lists, dictionaries, sets and hooks are its own.

    Attributes:
        module: the copy.
    """

    def __init__(self, snapshot: ModuleSnapshot, *, deep: bool) -> None:
        originals = snapshot.modules
        self._modules = [*map(_bare_copy, originals, snapshot.namespaces)]
        self.module = self._modules[0]
        self._bound: Substitutions | None = None
        self._bound_changes: AttributeMap = {}
        self._training: Sequence[bool] = snapshot.training
        self._may_differ = False
        self._differed: bool | None = None  # after the forward that has run last, if that is known
        parameters = {id(parameter) for parameter in snapshot.parameters}
        copier = _Copier(snapshot, self._modules, deep=deep)
        for original, replica in zip(originals, self._modules, strict=True):
            copier.fill(replica.__dict__)
            if isinstance(original, nn.RNNBase) and not deep:
                replica.__dict__["flatten_parameters"] = _Flatten(original, replica)
        self._places, self._templates = copier.places, copier.templates
        self._non_parameters = [place for place in copier.places if place[2] not in parameters]
        self._namespaces = [each.__dict__ for each in self._modules]
        self._types = [*map(type, self._modules)]
        self._holders = copier.holders
        # Restored from these, but for tensors, which are bound again.
        self._saved_namespaces = [*map(dict, self._namespaces)]
        self._saved = [shallow(each) if each else None for each in self._holders]
        self._watch = watch(self._namespaces, copier.containers)
        self._containers = copier.containers

    def bind(self, tensors: Substitutions, changes: AttributeMap, training: Sequence[bool] = ()) -> None:
        """Make the replica as if it had just been made: with these tensors, attributes and modes.

        Args:
            tensors: a substitution for each parameter, buffer and loose tensor of the original.
            changes: all plain attributes that changed since the replica was made.
            training: the mode of every module.
        """
        if self._may_differ:
            self._may_differ = False
            if self._differs():
                self._restore()
        is_new = tensors is not self._bound
        if is_new:
            for holder, name, key in self._places:
                holder[name] = tensors[key]
            for holder, name, template in self._templates:
                holder[name] = _substitute(template, tensors)
            self._bound = tensors
        if changes is not self._bound_changes:
            is_new = True
            self._bind_changes(changes)
        if training and training is not self._training:
            is_new = True
            self._set_modes(training)
        if is_new:
            self._watch.renew(self._namespaces)

    def end(self, *, is_recorded: bool) -> None:
        """Undo what a forward has left on the replica.

        Args:
            is_recorded: whether a backward may come, which may run parts of the forward again: then it is
                undone when the replica is bound the next time.
        """
        differs, self._differed = self._differed, None
        self._may_differ = is_recorded
        if not is_recorded and (self._differs() if differs is None else differs):
            self._restore()

    def forget_difference(self) -> None:
        """Look anew for what is left: more than the forward has run since."""
        self._differed = None

    def versions(self) -> dict[int, int]:
        """Return the version of all but parameters by its `id`, to give to `survivors` after a forward."""
        tensors = [holder[name] for holder, name, _ in self._non_parameters]
        return {id(tensor): tensor._version for tensor in tensors if not tensor.is_inference()}

    def survivors(
        self, snapshot: ModuleSnapshot | None, versions: Mapping[int, int] | None
    ) -> Survivors | None:
        """Return what of a forward's changes the original gets, if it gets any.

        Args:
            snapshot: of the original; None if the replica's changes are not to survive.
            versions: the versions of the buffers before.

        Raises:
            AddedInForwardError: the forward made submodules or parameters.
        """
        assert self._bound is not None, "a forward has run"
        differs = self._differed = self._differs()
        if differs:
            self._check_additions()
        if snapshot is None or versions is None or not (differs or snapshot.buffer_owners or snapshot.loose):
            return None
        found = Survivors(snapshot)
        owners = range(len(self._modules)) if differs else snapshot.buffer_owners
        for position in owners:
            if self._buffers_changed(position, found, versions) and differs:
                self._collect_values(position, found)
        for original in snapshot.loose:
            own = self._bound[id(original)]
            if own is not original and (own.is_inference() or versions.get(id(own)) != own._version):
                found.loose.append((original, own))
        return found

    def _buffers_changed(self, position: int, found: Survivors, versions: Mapping[int, int]) -> bool:
        """Collect the changed buffers of one module; return whether there are any."""
        replica = self._modules[position]
        own = found.snapshot.namespaces[position]["_buffers"]
        is_changed = False
        assert self._bound is not None, "a forward has run"
        for name in own | replica._buffers:
            before, after = own.get(name), replica._buffers.get(name)
            if before is None and after is None:
                continue
            if before is None or after is None or after is not self._bound.get(id(before)):
                # The forward put another tensor in the buffer's place.
                found.buffers.append((position, name, before, after, True))
                is_changed = True
                if name not in own and name in replica._non_persistent_buffers_set:
                    found.transient.append((position, name))
                continue
            is_counted = after.is_inference() or versions.get(id(after)) != after._version
            # Batch norm changes its statistics without counting a version.
            if not is_counted and not replica.training:
                continue
            is_changed = True
            shares_storage = after is before or (after.requires_grad and after.device == before.device)
            if not shares_storage and (is_counted or not _overlaps_itself(before)):
                found.buffers.append((position, name, before, after, False))
        return is_changed

    def _collect_values(self, position: int, found: Survivors) -> None:
        saved = self._saved_namespaces[position]
        for name, value in self._namespaces[position].items():
            before = saved.get(name, found)
            if name in OF_ALL_MODULES or before is value or not is_plain(value):
                continue
            if type(before) is not type(value) or before != value:
                found.values[position, name] = value

    def _differs(self) -> bool:
        return not self._watch.holds(self._namespaces) or [*map(type, self._modules)] != self._types

    def _check_additions(self) -> None:
        known = {id(each) for each in self._modules}
        content = {id(each): saved for each, saved in zip(self._holders, self._saved, strict=True)}
        for module, namespace in zip(self._modules, self._saved_namespaces, strict=True):
            for kind, registry in (("submodule", "_modules"), ("parameter", "_parameters")):
                saved = content[id(namespace[registry])] or {}
                for name, value in module.__dict__[registry].items():
                    if value is None or saved.get(name) is not None or id(value) in known:
                        continue
                    if isinstance(value, Tensor) or any(_tensors_of(value)):
                        prefix = next(path for path, each in self.module.named_modules() if each is module)
                        raise AddedInForwardError(kind, f"{prefix}.{name}" if prefix else name)

    def _restore(self) -> None:
        for module, kind in zip(self._modules, self._types, strict=True):
            if type(module) is not kind:
                module.__class__ = kind
        for namespace, saved in zip(self._namespaces, self._saved_namespaces, strict=True):
            if not is_same(namespace, saved):
                refill(namespace, saved)
        for holder, content in zip(self._holders, self._saved, strict=True):
            if content is None:
                holder.clear()
            elif not is_same(holder, content):
                refill(holder, content)
        self._bound = None  # registries hold what they held when the replica was made
        self._watch = watch(self._namespaces, self._containers)

    def _bind_changes(self, changes: AttributeMap) -> None:
        for (position, name), value in changes.items():
            self._namespaces[position][name] = self._saved_namespaces[position][name] = value
        self._bound_changes = changes

    def _set_modes(self, training: Sequence[bool]) -> None:
        for namespace, saved, mode in zip(self._namespaces, self._saved_namespaces, training, strict=True):
            namespace["training"] = saved["training"] = mode
        self._training = training


class _Copier:
    """Fills the copies of a module's namespaces.

    Attributes:
        places: where tensors are to be put: a container, the key, and the `id` of the original tensor.
        templates: the same for tuples in which tensors are: a container, the key and the original.
        holders: containers whose content a forward may change.
        containers: those of them that are no registries, and not torch's own.
    """

    def __init__(self, snapshot: ModuleSnapshot, modules: Sequence[nn.Module], *, deep: bool) -> None:
        self._copies: dict[int, Any] = dict(zip(map(id, snapshot.modules), modules, strict=True))
        # A submodule, met inside an attribute, stands for its copy; a copy stands for itself.
        self._memo = {**self._copies, **{id(each): each for each in modules}} if deep else None
        tensors = snapshot.tensors if deep else [*snapshot.tensors, *snapshot.loose]
        self._tensor_ids = {id(tensor) for tensor in tensors}
        self.places: list[tuple[Any, Any, int]] = []
        self.templates: list[tuple[Any, Any, Any]] = []
        self.holders: list[Any] = []
        self.containers: list[Any] = []

    def fill(self, namespace: dict[str, Any]) -> None:
        """Make all that one namespace holds the replica's own."""
        for registry in ("_parameters", "_buffers"):
            held = namespace[registry] = dict(namespace[registry])
            self.places += [(held, name, id(value)) for name, value in held.items() if value is not None]
        namespace.pop(CACHE_ATTRIBUTE, None)
        namespace["_modules"] = {
            name: None if child is None else self._copies[id(child)]
            for name, child in namespace["_modules"].items()
        }
        self.holders += [namespace[registry] for registry in REGISTRIES]
        # Compiled code of the original would run the original.
        namespace.pop("_compiled_call_impl", None)
        for name, value in [*namespace.items()]:
            if name in REGISTRIES or type(value) in ATOMS:
                continue
            if name in OF_ALL_MODULES:
                namespace[name] = self._own(value) if type(value) in MUTABLE else value
            elif self._memo is None:
                namespace[name] = self._own(value)
                self._note(namespace, name, value)
            else:
                namespace[name] = self._deep(namespace, name, value, self._memo)

    def _own(self, value: Any) -> Any:
        """Return the replica's own of a value; a container that is met twice is still one container."""
        kind = type(value)
        if id(value) in self._copies:
            return self._copies[id(value)]
        if kind is MethodType and id(value.__self__) in self._copies:
            return MethodType(value.__func__, self._copies[id(value.__self__)])
        if kind is tuple:
            return _rebuilt(value, [self._own(entry) for entry in value], tuple)
        if kind not in MUTABLE:
            return value
        new = self._copies[id(value)] = empty_like(value)
        self.holders.append(new)
        if isinstance(value, set):
            new.update(map(self._own, value))
            return new
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            own = self._own(entry)
            if isinstance(value, dict):
                new[key] = own
            else:
                new.append(own)
            self._note(new, key, entry)
        return new

    def _note(self, holder: Any, key: Any, value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) in self._tensor_ids:
                self.places.append((holder, key, id(value)))
        elif type(value) is tuple and _refers_to(value, self._tensor_ids):
            self.templates.append((holder, key, holder[key]))

    def _deep(self, namespace: dict[str, Any], name: str, value: Any, memo: dict[int, Any]) -> Any:
        mapped = _substitute(value, self._copies)
        if _refers_to(mapped, self._tensor_ids):
            self.templates.append((namespace, name, mapped))
            return mapped
        return _deep_copy(mapped, memo)


def _tensors_of(module: nn.Module) -> Iterator[bool]:
    return (True for _ in chain(module.parameters(), module.buffers()))


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
        changes = {place: value for place, value in changes.items() if place[1] != "training"}
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


def _deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute deeply, but share what cannot be copied (locks, handles)."""
    if isinstance(value, PLAIN):
        return value
    # A copy that fails leaves half-built objects in its memo, which no later copy may find.
    trial = dict(memo)
    try:
        copied = copy.deepcopy(value, trial)
    except Exception:
        return value
    memo.update(trial)
    return copied
