"""Copies of a module, one per lane, whose parameters pass their gradients on to the original's."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_private import flat_weights, mark_as_parameter, storage_address, version_of
from ..errors import LazyModuleError
from .checksums import close_look
from .containers import entries, is_same, refill, shallow
from .copier import Copier, bare_copy, substitute
from .refusals import warn_if_compiled
from .snapshot import AttributeMap, ModuleSnapshot, is_plain
from .state import HOOKS, OF_ALL_MODULES, Watch
from .survivors import Survivors

Substitutions = Mapping[int, Tensor]
"""The `id` of one of the original module's parameters or buffers -> the tensor in its place."""

Tags = Mapping[int, int | tuple[int, int]]
"""The `id` of a tensor of a replica -> its version, with a checksum where its values were read."""

_ABSENT = object()


def substitutions(originals: Sequence[Tensor], replacements: Sequence[Tensor]) -> Substitutions:
    """Map originals to their replacements; that of a parameter counts as a parameter too."""
    for original, replacement in zip(originals, replacements, strict=True):
        if isinstance(original, nn.Parameter) and replacement is not original:
            mark_as_parameter(replacement)
    return {id(original): new for original, new in zip(originals, replacements, strict=True)}


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
        warn_if_compiled(originals)
        self._modules = [*map(bare_copy, originals, snapshot.namespaces)]
        self.module = self._modules[0]
        self._bound: Substitutions | None = None
        self._bound_changes: AttributeMap = {}
        self._built: dict[tuple[int, str], Any] = {}  # values of before the bound changes
        self._training: Sequence[bool] = snapshot.training
        self._may_differ = False
        self._is_reshaped = False  # attributes were added or deleted
        self._read: Set[int] = frozenset()  # the `id` of what is looked at closely
        self._differed: bool | None = None  # after the forward that has run last, if that is known
        parameters = {id(parameter) for parameter in snapshot.parameters}
        copier = Copier(snapshot, self._modules, deep=deep)
        for original, replica in zip(originals, self._modules, strict=True):
            copier.fill(replica.__dict__)
            if isinstance(original, nn.RNNBase) and not deep:
                replica.__dict__["flatten_parameters"] = _Flatten(original, replica)
        copier.bind_handles()
        self._places, self._templates = copier.places, copier.templates
        self._non_parameters = [place for place in copier.places if place[2] not in parameters]
        self._namespaces = [each.__dict__ for each in self._modules]
        self._types = [*map(type, self._modules)]
        self._holders = copier.holders
        # Restored from these, but for tensors, which are bound again.
        self._saved_namespaces = [*map(dict, self._namespaces)]
        self._saved = [shallow(each) if each else None for each in self._holders]
        self._containers, self._objects = copier.containers, copier.objects
        self._watch = self._new_watch()

    def _new_watch(self) -> Watch:
        return Watch(self._modules, self._containers, self._objects)

    def bind(self, tensors: Substitutions, changes: AttributeMap, training: Sequence[bool] = ()) -> None:
        """Make the replica as if it had just been made: with these tensors, attributes and modes.

        Args:
            tensors: a substitution for each parameter, buffer and loose tensor of the original.
            changes: all plain attributes that changed since the replica was made.
            training: the mode of every module.
        """
        if self._may_differ:
            self._may_differ = False
            if not self._watch.holds(self.module):
                self._restore()
        is_new = tensors is not self._bound
        if is_new:
            for holder, name, key in self._places:
                holder[name] = tensors[key]
            for holder, name, template in self._templates:
                holder[name] = substitute(template, tensors)
            self._bound = tensors
        if changes is not self._bound_changes:
            is_new = True
            self._bind_changes(changes)
        if training and training is not self._training:
            is_new = True
            self._set_modes(training)
        if self._is_reshaped:
            self._is_reshaped = False
            self._watch = self._new_watch()
        elif is_new:
            self._watch.renew(self.module)

    def end(self, *, is_recorded: bool, looks_anew: bool = False) -> None:
        """Undo what a forward has left on the replica.

        Args:
            is_recorded: whether a backward may come, which may run parts of the forward again: then it is
                undone when the replica is bound the next time.
            looks_anew: whether more than the forward has run since `survivors` looked.
        """
        differs, self._differed = None if looks_anew else self._differed, None
        self._may_differ = is_recorded
        if is_recorded or differs is False:
            return
        if differs or not self._watch.holds(self.module):
            self._restore()

    def tags(self, *, reads_values: bool = False) -> Tags:
        """Return what all but parameters are like, to give to `survivors` after a forward.

        Args:
            reads_values: find also what no version counts. Of buffers in train mode everything is taken for
                changed anyway.
        """
        if not self._non_parameters:
            return {}
        tensors = [holder[name] for holder, name, _ in self._non_parameters]
        self._read = frozenset(map(id, tensors)) - self._training_buffers() if reads_values else frozenset()
        tag = self._tag if reads_values else version_of
        return {id(tensor): tag(tensor) for tensor in tensors if not tensor.is_inference()}

    def wrote_uncounted(self, tags: Tags) -> bool:
        """Return whether a forward has written something that no version counted, of what `tags` has read."""
        assert self._bound is not None, "a forward has run"
        read = [self._bound[key] for _, _, key in self._non_parameters if id(self._bound[key]) in self._read]
        pairs = [(tags[id(tensor)], close_look(tensor)) for tensor in read if not tensor.is_inference()]
        return any(before != after and before[0] == after[0] for before, after in pairs)  # type: ignore[index]

    def _tag(self, tensor: Tensor) -> int | tuple[int, int]:
        return close_look(tensor) if id(tensor) in self._read else version_of(tensor)

    def _training_buffers(self) -> set[int]:
        return {id(each) for module in self._modules if module.training for each in module._buffers.values()}

    def survivors(
        self,
        snapshot: ModuleSnapshot | None,
        tags: Tags | None,
        written: Sequence[int] = (),
    ) -> Survivors | None:
        """Return what of a forward's changes the original gets, if it gets any.

        Args:
            snapshot: of the original; None if the replica's changes are not to survive.
            tags: what buffers were like before.
            written: the positions of the parameters that the forward wrote.

        Raises:
            LazyModuleError: the forward made submodules or parameters.
        """
        assert self._bound is not None, "a forward has run"
        differs = self._differed = not self._watch.holds(self.module)
        if differs:
            self._check_additions()
        if snapshot is None or tags is None:
            return None
        if not (differs or written or snapshot.buffer_owners or snapshot.loose):
            return None
        found = Survivors(snapshot, is_counted=bool(written))
        owners = range(len(self._modules)) if differs else snapshot.buffer_owners
        for position in owners:
            # Flags about parameters may be anywhere: one device would have them all.
            is_changed = self._buffers_changed(position, found, tags)
            found.is_counted |= is_changed
            if (is_changed or written) and differs:
                self._collect_values(position, found)
        for position in written:
            original = snapshot.parameters[position]
            own = self._bound[id(original)]
            if storage_address(own) != storage_address(original):
                found.loose.append((original, own))
        for original in snapshot.loose:
            own = self._bound[id(original)]
            if own.is_inference() or tags.get(id(own)) != self._tag(own):
                found.is_counted = True
                if own is not original:
                    found.loose.append((original, own))
                for position, namespace in enumerate(self._namespaces if differs else ()):
                    if any(value is own for value in namespace.values()):
                        self._collect_values(position, found)
        return found

    def _buffers_changed(self, position: int, found: Survivors, tags: Tags) -> bool:
        """Collect the changed buffers of one module; return whether there are any."""
        replica = self._modules[position]
        own = found.snapshot.held(found.snapshot.namespaces[position]["_buffers"])
        is_changed = False
        assert self._bound is not None, "a forward has run"
        for name in own | replica._buffers:
            before, after = own.get(name), replica._buffers.get(name)
            if before is None and after is None:
                continue
            if before is None or after is None or after is not self._bound.get(id(before)):
                # The forward put another tensor in the buffer's place.
                found.buffers.append((position, name, before, self._original_of(after, found.snapshot), True))
                is_changed = True
                if name not in own and name in replica._non_persistent_buffers_set:
                    found.transient.append((position, name))
                continue
            is_counted = after.is_inference() or tags.get(id(after)) != self._tag(after)
            # Batch norm changes its statistics without counting a version.
            if not is_counted and not replica.training:
                continue
            # Values beside are a matter of certainty: many a buffer in train mode never changes.
            is_changed |= is_counted
            shares_storage = after is before or (after.requires_grad and after.device == before.device)
            if not shares_storage and (is_counted or not _overlaps_itself(before)):
                found.buffers.append((position, name, before, after, False))
        return is_changed

    def _original_of(self, tensor: Tensor | None, snapshot: ModuleSnapshot) -> Tensor | None:
        """Return the original's tensor if `tensor` stands for it, else itself: ties survive."""
        assert self._bound is not None, "a forward has run"
        return next((each for each in snapshot.tensors if self._bound.get(id(each)) is tensor), tensor)

    def _collect_values(self, position: int, found: Survivors) -> None:
        saved = self._saved_namespaces[position]
        for name, value in self._namespaces[position].items():
            before = saved.get(name, found)
            if name in OF_ALL_MODULES or before is value:
                continue
            if _is_scalar(value):
                found.values[position, name] = value
                continue
            # A flag set beside hooks says that they are there, and they do not survive.
            is_flag = isinstance(value, bool) and self._has_new_hooks(self._modules[position])
            if is_plain(value) and not is_flag and (type(before) is not type(value) or before != value):
                found.values[position, name] = value

    def _has_new_hooks(self, module: nn.Module) -> bool:
        """Return whether the forward registered hooks on a module of the replica, or on one below it."""
        content = self._saved_content()
        hooks = (vars(each)[name] for each in module.modules() for name in HOOKS)
        return any(not content.get(id(each), {}).keys() >= each.keys() for each in hooks)

    def _saved_content(self) -> dict[int, Any]:
        """Return what every container held, by its `id`."""
        return {id(each): saved or {} for each, saved in zip(self._holders, self._saved, strict=True)}

    def _check_additions(self) -> None:
        known = {id(each) for each in self._modules}
        content = self._saved_content()
        for module, namespace in zip(self._modules, self._saved_namespaces, strict=True):
            for kind, registry in (("submodule", "_modules"), ("parameter", "_parameters")):
                saved = content[id(namespace[registry])]
                for name, value in module.__dict__[registry].items():
                    if value is None or saved.get(name) is not None or id(value) in known:
                        continue
                    if isinstance(value, Tensor) or any(_tensors_of(value)):
                        prefix = next(path for path, each in self.module.named_modules() if each is module)
                        raise LazyModuleError(
                            f"{prefix}.{name}" if prefix else name, f"forward added the {kind}"
                        )
        for container in self._containers:
            before = content[id(container)]
            for value in entries(container):
                is_new = isinstance(value, nn.Module) and not any(value is each for each in entries(before))
                if is_new and id(value) not in known and any(_tensors_of(value)):
                    name = type(value).__name__
                    raise LazyModuleError(name, "forward put into a container of its module the submodule")

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
        self._watch = self._new_watch()

    def _bind_changes(self, changes: AttributeMap) -> None:
        # Passes do not always come in the order of their calls: one of before a change may come after it.
        for place in self._built.keys() - changes.keys():
            self._set(place, self._built.pop(place))
        for place, value in changes.items():
            position, name = place
            self._built.setdefault(place, self._saved_namespaces[position].get(name, _ABSENT))
            self._set(place, value)
        self._bound_changes = changes

    def _set(self, place: tuple[int, str], value: Any) -> None:
        position, name = place
        for namespace in (self._namespaces[position], self._saved_namespaces[position]):
            self._is_reshaped |= value is _ABSENT or name not in namespace
            if value is _ABSENT:
                namespace.pop(name, None)
            else:
                namespace[name] = value

    def _set_modes(self, training: Sequence[bool]) -> None:
        for namespace, saved, mode in zip(self._namespaces, self._saved_namespaces, training, strict=True):
            namespace["training"] = saved["training"] = mode
        self._training = training


def _is_scalar(value: Any) -> bool:
    """Return whether a value is a number that a forward keeps as a tensor."""
    return type(value) is Tensor and value.dim() == 0 and not value.requires_grad


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
    pairs = zip(flat_weights(original), flat_weights(replica), strict=True)
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
