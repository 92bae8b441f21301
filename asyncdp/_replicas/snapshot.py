"""What a module consists of at one moment: the one answer to whether it has changed since."""

from __future__ import annotations

import copy
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, starmap
from operator import attrgetter, call, is_, itemgetter
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CompiledModuleError, LazyModuleError, NotAModuleError, UnsupportedModuleError
from .refusals import check_placement

CACHE_ATTRIBUTE = "_asyncdp_replicas"
"""The attribute of a module that holds its replicas; no snapshot and no replica has it."""

AttributeMap = Mapping[tuple[int, str], Any]
"""The position of a module in `ModuleSnapshot.modules` and the name of an attribute -> its value."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of values that hold no reference to anything else."""

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_ALL_MODULES = frozenset(vars(nn.Module()))

# What equals a value of these types can stand for it. Equal numbers may differ in type, equal tensors in
# everything but values, so values of all other types are compared by identity.
_EQUALITY_SUFFICES = frozenset({str, type(None), set, torch.dtype, FunctionType, MethodType})

_CONTAINERS = frozenset({list, tuple, dict, OrderedDict})
_namespace = attrgetter("__dict__")  # quicker than `vars`
_training = attrgetter("training")
_device = attrgetter("device")


def check_module(module: object) -> None:
    """Refuse what cannot be replicated, before anything runs."""
    if not isinstance(module, nn.Module):
        raise NotAModuleError(module)
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    for each in _modules_of(module):
        if isinstance(each, torch.jit.ScriptModule):
            raise UnsupportedModuleError(each)
        if isinstance(each, compiled):
            raise CompiledModuleError
        if any(map(_is_lazy, chain(each._parameters.values(), each._buffers.values()))):
            tensors = chain(module.named_parameters(), module.named_buffers())
            raise LazyModuleError(next(name for name, tensor in tensors if _is_lazy(tensor)))
        check_placement(module, each)


def _is_lazy(tensor: Tensor | None) -> bool:
    return tensor is not None and is_lazy(tensor)


class ModuleSnapshot:
    """A module and all below it, as of a moment. Never changes itself.

    Refers to the module weakly: the module may hold its replicas, which hold their snapshot.

    Attributes:
        namespaces: copies of all modules' `__dict__`, without replicas.
        parameters: every parameter once, in the order of `module.parameters()`.
        buffers: every buffer once.
        tensors: the parameters, then the buffers.
        buffer_owners: the positions of the modules that have buffers, or empty places for them.
        training: the mode of every module.
        updates_buffers: whether a forward is likely to change buffers: some have an owner in train mode.
        changes_uncounted: whether forwards may change buffers without counting a version.
        has_rnn: whether one of the modules is recurrent.
    """

    def __init__(self, module: nn.Module) -> None:
        check_module(module)
        modules = _modules_of(module)
        namespaces = _namespaces_of(modules)
        self._root = weakref.ref(module)
        self._below = modules[1:]
        self._types = [*map(type, modules)]
        self.namespaces = [*map(dict, namespaces)]
        registries = [namespace[name] for namespace in namespaces for name in _REGISTRIES]
        hooks = [namespace[name] for namespace in namespaces for name in _HOOKS]
        # Views, all of them live; most dictionaries of most modules are empty, which is asked for faster.
        self._live_parts = [each.values() for each in registries if each]
        self._live_names = [each.keys() for each in (*registries, *hooks) if each]
        self._empty_registries = [each for each in registries if not each]
        self._empty_hooks = [each for each in hooks if not each]
        self._parts = [*chain.from_iterable(self._live_parts)]
        self._names = [*chain.from_iterable(self._live_names)]
        self._getters = [_getter_of(namespace) for namespace in namespaces]
        self._identities = [*chain.from_iterable(map(call, self._getters, namespaces))]
        containers = _containers_with_parts(namespaces)
        self._containers = [
            (each, dict(each) if isinstance(each, dict) else list(each)) for each in containers
        ]
        self.parameters = _distinct(each["_parameters"] for each in namespaces)
        self.buffers = _distinct(each["_buffers"] for each in namespaces)
        self.tensors = self.parameters + self.buffers
        self.buffer_owners = [place for place, each in enumerate(namespaces) if each["_buffers"]]
        self.training = [*map(_training, modules)]
        self.updates_buffers = any(self.training[position] for position in self.buffer_owners)
        self.changes_uncounted = self.updates_buffers
        self.has_rnn = any(isinstance(each, nn.RNNBase) for each in modules)

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

    def is_current(self) -> bool:
        """Return whether nothing at all was replaced, added, removed, renamed or reordered since."""
        root = self._root()
        if root is None or not self.has_same_parts():
            return False
        modules = [root, *self._below]
        namespaces = _namespaces_of(modules)
        try:
            # Identities first, so that equality is never asked of different tensors.
            return (
                all(map(is_, chain.from_iterable(map(call, self._getters, namespaces)), self._identities))
                and namespaces == self.namespaces
                and not any(self._empty_hooks)
                and [*chain.from_iterable(self._live_names)] == self._names
                and [*map(type, modules)] == self._types
                and (not self._containers or all(starmap(_holds_the_same, self._containers)))
            )
        except Exception:  # an attribute is gone, or its new value cannot be compared
            return False

    def in_mode(self, training: bool) -> ModuleSnapshot:
        """Return a snapshot of the module as if each module in it were in train mode, or in eval mode."""
        forced = copy.copy(self)
        forced.namespaces = [{**namespace, "training": training} for namespace in self.namespaces]
        forced.training = [training] * len(self.training)
        forced.updates_buffers = training and bool(self.buffer_owners)
        forced.changes_uncounted = self.changes_uncounted or forced.updates_buffers
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

    def plain_changes(self, later: ModuleSnapshot) -> AttributeMap | None:
        """Return the attributes that changed from this snapshot to a later one of the same module.

        Returns:
            The new values, or None if anything but values of `PLAIN` types changed.
        """
        if not self._has_parts_of(later):
            return None
        changes = {}
        for position, (before, now) in enumerate(zip(self.namespaces, later.namespaces, strict=True)):
            if [*before] != [*now]:
                return None
            for name, value in now.items():
                if value is before[name]:
                    continue
                if isinstance(value, PLAIN) and isinstance(before[name], PLAIN):
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
            and _holds_the_same(self._parts, other._parts)
            and len(mine) == len(theirs)
            and all(a is b and _holds_the_same(x, y) for (a, x), (b, y) in zip(mine, theirs, strict=True))
        )


class LatestSnapshot:
    """The latest snapshot of one module, captured anew only when it has to be.

    Attributes:
        latest: the snapshot; None before the first.
    """

    def __init__(self) -> None:
        self.latest: ModuleSnapshot | None = None

    def current(self, module: nn.Module) -> ModuleSnapshot:
        """Return a snapshot of the module as it is."""
        latest = self.latest
        if latest is None or not latest.is_current():
            latest = self.latest = ModuleSnapshot.capture(module)
        return latest

    def parts(self, module: nn.Module) -> ModuleSnapshot:
        """Return a snapshot that has the parts and modes of the module; its attributes may be older."""
        latest = self.latest
        if latest is None or not (latest.has_same_parts() and latest.has_same_modes()):
            latest = self.latest = ModuleSnapshot.capture(module)
        return latest


class LatestInMode(LatestSnapshot):
    """The latest snapshot of one module as if it were in one mode, whatever its flags say.

    Args:
        training: the mode.
    """

    def __init__(self, training: bool) -> None:
        super().__init__()
        self._training = training
        self._forced: tuple[ModuleSnapshot, ModuleSnapshot] | None = None

    def current(self, module: nn.Module) -> ModuleSnapshot:
        return self._in_mode(super().current(module))

    def parts(self, module: nn.Module) -> ModuleSnapshot:
        return self._in_mode(super().parts(module))

    def _in_mode(self, snapshot: ModuleSnapshot) -> ModuleSnapshot:
        pair = self._forced
        if pair is None or pair[0] is not snapshot:
            pair = self._forced = (snapshot, snapshot.in_mode(self._training))
        return pair[1]


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


def _namespaces_of(modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Return the attributes of modules; of the first one without its replicas."""
    namespaces = [*map(_namespace, modules)]
    if CACHE_ATTRIBUTE in namespaces[0]:
        namespaces[0] = {name: value for name, value in namespaces[0].items() if name != CACHE_ATTRIBUTE}
    return namespaces


def _getter_of(namespace: dict[str, Any]) -> itemgetter[Any]:
    """Return what gets a tuple of all attributes that have to be compared by identity."""
    names = [
        name
        for name, value in namespace.items()
        if type(value) not in _EQUALITY_SUFFICES and name not in _OF_ALL_MODULES
    ]
    # Of a single name `itemgetter` would give no tuple.
    return _getter(*(names if len(names) > 1 else (names or ["training"]) * 2))


@lru_cache(maxsize=1024)
def _getter(*names: str) -> itemgetter[Any]:
    return itemgetter(*names)


def _distinct(registries: Iterator[dict[str, Tensor | None]]) -> list[Tensor]:
    found = chain.from_iterable(registry.values() for registry in registries)
    return [*{id(tensor): tensor for tensor in found if tensor is not None}.values()]


def _containers_with_parts(namespaces: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the lists and dictionaries among attributes whose entries a replica has to replace."""
    return [
        container
        for namespace in namespaces
        for name, value in namespace.items()
        if type(value) in _CONTAINERS and value and name not in _REGISTRIES and _holds_parts(value)
        for container in _containers_in(value)
    ]


def _holds_parts(value: Any) -> bool:
    return type(value) in _CONTAINERS and any(
        isinstance(entry, (nn.Module, Tensor, MethodType)) or _holds_parts(entry)
        for entry in _values_of(value)
    )


def _containers_in(value: Any) -> list[Any]:
    """Return a container and all those within it, but no tuples, which never change."""
    if type(value) not in _CONTAINERS:
        return []
    within = [each for entry in _values_of(value) for each in _containers_in(entry)]
    return within if type(value) is tuple else [value, *within]


def _holds_the_same(one: Any, other: Any) -> bool:
    """Return whether two containers hold the very same values, in the same order and by the same names."""
    if len(one) != len(other) or not all(map(is_, _values_of(one), _values_of(other))):
        return False
    return not isinstance(one, dict) or [*one] == [*other]


def _values_of(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container
