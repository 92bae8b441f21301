"""What a module consists of at one moment: the one answer to whether it has changed since."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import attrgetter, is_
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._torch_private import optimized_module_types
from ..errors import (
    CompiledModuleError,
    LazyModuleError,
    NotAModuleError,
    UnsupportedModuleError,
)
from .containers import MAPPINGS, Contents, Slots, is_same, shallow
from .refusals import check_placement
from .state import (
    HOOKS,
    OWN_OF_ALL,
    REGISTRIES,
    Watch,
    attributes_of,
    loose_tensors,
    namespaces_of,
)

AttributeMap = Mapping[tuple[int, str], Any]
"""The position of a module in `ModuleSnapshot.modules` and the name of an attribute -> its value."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of values that hold no reference to anything else."""

# What equals a value of these types can stand for it. Equal numbers may differ in type, equal tensors in
# everything but values, so values of all other types are compared by identity.
_EQUALITY_SUFFICES = frozenset({str, type(None), set, torch.dtype, FunctionType, MethodType})

_training = attrgetter("training")
_device = attrgetter("device")


def check_module(module: object) -> None:
    """Refuse what cannot be replicated, before anything runs."""
    if not isinstance(module, nn.Module):
        raise NotAModuleError(module)
    compiled = optimized_module_types()
    for each in _modules_of(module):
        if isinstance(each, torch.jit.ScriptModule):
            raise UnsupportedModuleError(each)
        if isinstance(each, compiled):
            raise CompiledModuleError
        if any(map(_has_slots, type(each).__mro__)):
            cause = "its class keeps attributes in __slots__"
            remedy = "Delete __slots__ from the class: a torch.nn.Module has a __dict__ anyway."
            raise UnsupportedModuleError(each, cause, remedy)
        if any(map(_is_lazy, chain(each._parameters.values(), each._buffers.values()))):
            tensors = chain(module.named_parameters(), module.named_buffers())
            raise LazyModuleError(next(name for name, tensor in tensors if _is_lazy(tensor)))
        check_placement(module, each)


def is_plain(value: Any) -> bool:
    """Return whether a value, or all that a tuple has, is of `PLAIN` types."""
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))


def _has_slots(kind: type) -> bool:
    """Return whether a class lets its instances keep attributes outside of their `__dict__`."""
    slots = kind.__dict__.get("__slots__", ())
    return not {*((slots,) if isinstance(slots, str) else slots)} <= {"__dict__", "__weakref__"}


def _is_lazy(tensor: Tensor | None) -> bool:
    return tensor is not None and is_lazy(tensor)


class ModuleSnapshot:
    """A module and all below it, as of a moment. Never changes itself.

    Refers to the module weakly: the module may hold its replicas, which hold their snapshot.

    Attributes:
        namespaces: copies of all modules' `__dict__`, without replicas.
        contents: what the containers, registries and hook dictionaries among their values hold, by the `id`
            of these; those of every module that held nothing are left out.
        objects: by their ids, what each replica has its own of, with the mappings of their attributes.
        parameters: every parameter once, in the order of `module.parameters()`.
        buffers: every buffer once.
        tensors: the parameters, then the buffers.
        loose: the tensors among attributes that are neither, and require no gradient.
        buffer_owners: the positions of the modules that have buffers, or empty places for them.
        training: the mode of every module.
        updates_buffers: whether a forward is likely to change buffers or loose tensors: some have an owner
            in train mode.
        has_rnn: whether one of the modules is recurrent.
    """

    def __init__(self, module: nn.Module) -> None:
        check_module(module)
        modules = _modules_of(module)
        namespaces = namespaces_of(modules)
        self._root = weakref.ref(module)
        self._below = modules[1:]
        self._types = [*map(type, modules)]
        self.namespaces = [*map(dict, namespaces)]
        found = Contents(modules)
        for namespace in namespaces:
            for _, value in attributes_of(namespace):
                found.look(value)
        containers, self.objects = found.containers, found.objects
        self._containers = [(each, shallow(each)) for each in containers.values()]
        self.contents = {id(each): content for each, content in self._containers}
        for namespace in namespaces:
            for name in (*REGISTRIES, *OWN_OF_ALL):
                if namespace[name]:
                    self.contents[id(namespace[name])] = shallow(namespace[name])
        registries = [namespace[name] for namespace in namespaces for name in REGISTRIES]
        hooks = [namespace[name] for namespace in namespaces for name in HOOKS]
        mappings = [each for each in containers.values() if isinstance(each, MAPPINGS)]
        # Views, all of them live; most dictionaries of most modules are empty, which is asked for faster.
        self._live_parts = [each.values() for each in registries if each]
        self._live_names = [each.keys() for each in (*registries, *hooks, *mappings) if each]
        self._empty_registries = [each for each in registries if not each]
        self._names = [*chain.from_iterable(self._live_names)]
        self._watch = Watch(modules, [*containers.values()], [each for each, _ in self.objects.values()])
        self.loose = loose_tensors(namespaces, [*containers.values()])
        self.training = [*map(_training, modules)]
        self._modes: dict[bool, list[bool]] = {}
        self._list_tensors()
        self.has_rnn = any(isinstance(each, nn.RNNBase) for each in modules)

    def _list_tensors(self) -> None:
        registries = [namespace[name] for namespace in self.namespaces for name in REGISTRIES]
        self._parts = [*chain.from_iterable(self.held(each).values() for each in registries)]
        self.parameters = _distinct(map(self.held, registries[0::3]))
        self.buffers = _distinct(map(self.held, registries[1::3]))
        self.tensors = self.parameters + self.buffers
        self.buffer_owners = [place for place, each in enumerate(registries[1::3]) if self.held(each)]
        self.updates_buffers = any(self.training[position] for position in self.buffer_owners) or (
            bool(self.loose) and any(self.training)
        )

    @classmethod
    def capture(cls, module: nn.Module) -> ModuleSnapshot:
        """Return what `module` consists of now.

        Raises:
            NotAModuleError, LazyModuleError, UnsupportedModuleError: it cannot be replicated.
        """
        return cls(module)

    @property
    def modules(self) -> list[nn.Module]:
        """Return the module and all below it, in the order of `module.modules()`."""
        root = self._root()
        assert root is not None, "the caller holds the module"
        return [root, *self._below]

    def held(self, registry: dict[str, Any]) -> dict[str, Any]:
        """Return what a registry of one of the modules, or a dictionary of hooks, held."""
        held: dict[str, Any] = self.contents.get(id(registry), {})
        return held

    def tensor_at(self, position: int, name: str) -> Tensor | None:
        """Return the parameter or buffer of a name of the module at a position."""
        parameters, buffers = (self.held(self.namespaces[position][each]) for each in REGISTRIES[:2])
        return parameters.get(name, buffers.get(name))

    def replaced_tensors(self) -> dict[tuple[int, str], tuple[Tensor | None, Tensor | None]]:
        """Return the parameters and buffers in whose places the modules have others: those, and these."""
        return {
            (position, name): (before, now)
            for position, module in enumerate(self.modules)
            for registry in (module._parameters, module._buffers)
            for name, now in registry.items()
            if (before := self.held(registry).get(name)) is not now
        }

    def is_current(self) -> bool:
        """Return whether nothing at all was replaced, added, removed, renamed or reordered since."""
        root = self._root()
        if root is None or not self._watch.holds(root):
            return False
        return [*chain.from_iterable(self._live_names)] == self._names

    def with_tensors(self, tensors: Mapping[tuple[int, str], Tensor | None]) -> ModuleSnapshot:
        """Return a snapshot of the module as if it had had other parameters or buffers.

        Args:
            tensors: by the position of their module, and their name.
        """
        made = copy.copy(self)
        made.contents = dict(self.contents)
        for (position, name), tensor in tensors.items():
            parameters, buffers = (self.namespaces[position][registry] for registry in REGISTRIES[:2])
            registry = parameters if name in self.held(parameters) else buffers
            made.contents[id(registry)] = {**made.held(registry), name: tensor}
        made._list_tensors()
        return made

    def in_mode(self, training: bool) -> ModuleSnapshot:
        """Return a snapshot of the module as if each module in it were in train mode, or in eval mode."""
        forced = copy.copy(self)
        forced.training = self.modes(training)
        forced.updates_buffers = training and bool(self.buffer_owners or self.loose)
        return forced

    def has_same_root(self, other: ModuleSnapshot) -> bool:
        """Return whether the other is a snapshot of the same module."""
        return self._root is other._root  # a module has only one weak reference

    def has_same_parts(self) -> bool:
        """Return whether parameters, buffers and submodules are the same, in less time than `is_current`."""
        found = [*chain.from_iterable(self._live_parts)]
        return (
            len(found) == len(self._parts)
            and all(map(is_, found, self._parts))
            and not any(self._empty_registries)
        )

    def has_same_modes(self) -> bool:
        """Return whether every module is in the mode that it was in."""
        return [*map(_training, self.modules)] == self.training

    def modes(self, training: bool | None) -> list[bool]:
        """Return the mode of every module, or `training` for each of them; always the same list."""
        if training is None:
            return self.training
        return self._modes.setdefault(training, [training] * len(self.training))

    def plain_changes(self, later: ModuleSnapshot) -> AttributeMap | None:
        """Return the attributes that changed from this snapshot to a later one of the same module.

        Returns:
            The new values, or None if anything but values of `PLAIN` types changed.
        """
        if not self._has_parts_of(later):
            return None
        changes = {}
        for position, (before, now) in enumerate(zip(self.namespaces, later.namespaces, strict=True)):
            if is_same(before, now):
                continue
            if [*before] != [*now]:
                return None
            for name, value in now.items():
                if value is before[name]:
                    continue
                if is_plain(value) and is_plain(before[name]):
                    changes[position, name] = value
                elif type(value) not in _EQUALITY_SUFFICES or value != before[name]:
                    return None
        return changes

    def is_on(self, device: torch.device) -> bool:
        """Return whether all tensors are on a device; `module.to(device)` takes far longer to find out."""
        return {*map(_device, self.tensors)} <= {device}

    def moves_weights(self, device: torch.device) -> bool:
        """Return whether a forward may move the weights in memory while other lanes read them."""
        return self.has_rnn and device.type == "cuda"

    def trainable(self) -> list[Tensor]:
        """Return the tensors that require gradients now."""
        return [tensor for tensor in self.tensors if tensor.requires_grad]

    def _has_parts_of(self, other: ModuleSnapshot) -> bool:
        mine, theirs = self._containers, other._containers
        return (
            self._root() is other._root()
            and self._names == other._names
            and self._types == other._types
            and is_same(self._parts, other._parts)
            and len(mine) == len(theirs)
            and all(
                _is_same_holder(a, b) and is_same(x, y) for (a, x), (b, y) in zip(mine, theirs, strict=True)
            )
        )


def _is_same_holder(one: Any, other: Any) -> bool:
    if type(one) is Slots and type(other) is Slots:
        return one.owner is other.owner
    return one is other


class LatestSnapshot:
    """The latest snapshots of one module, captured anew only when it has to be.

    The one before the latest is kept too: a module goes from train to eval mode and back.
    """

    def __init__(self) -> None:
        self._latest: tuple[ModuleSnapshot, ...] = ()

    @property
    def latest(self) -> ModuleSnapshot | None:
        """The latest of all; None before the first."""
        return self._latest[0] if self._latest else None

    def current(self, module: nn.Module) -> ModuleSnapshot:
        """Return a snapshot of the module as it is."""
        if self._latest and self._latest[0].is_current():
            return self._latest[0]
        return self._first(ModuleSnapshot.is_current) or self._capture(module)

    def parts(self, module: nn.Module) -> ModuleSnapshot:
        """Return a snapshot that has the parts and modes of the module; its attributes may be older."""
        return self._first(_has_same_parts_and_modes) or self._capture(module)

    def _first(self, is_right: Callable[[ModuleSnapshot], bool]) -> ModuleSnapshot | None:
        latest = self._latest  # lanes may replace it meanwhile
        for each in latest:
            if is_right(each):
                if each is not latest[0]:
                    self._latest = (each, latest[0])
                return each
        return None

    def _capture(self, module: nn.Module) -> ModuleSnapshot:
        snapshot = ModuleSnapshot.capture(module)
        self._latest = (snapshot, *self._latest[:1])
        return snapshot


def _has_same_parts_and_modes(snapshot: ModuleSnapshot) -> bool:
    return snapshot.has_same_parts() and snapshot.has_same_modes()


def _modules_of(module: nn.Module) -> list[nn.Module]:
    """Return what `module.modules()` yields, without making names on the way, which takes far longer."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        each = waiting.pop()
        if id(each) not in found:
            found[id(each)] = each
            waiting += [child for child in reversed(each._modules.values()) if child is not None]
    return [*found.values()]


def _distinct(registries: Iterable[dict[str, Tensor | None]]) -> list[Tensor]:
    found = chain.from_iterable(registry.values() for registry in registries)
    return [*{id(tensor): tensor for tensor in found if tensor is not None}.values()]
