"""What a module consists of, remembered so that any change of it is noticed."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from itertools import chain
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .replica import KEPT, PLAIN

_REGISTRIES = ("_parameters", "_buffers", "_modules")

_CONTAINERS = (list, tuple, dict, OrderedDict)


def modules_of(module: nn.Module) -> list[nn.Module]:
    """A module and all below it. `module.modules()` makes names on the way, which takes far longer."""
    found = [module]
    known = {id(module)}
    for each in found:
        for child in each._modules.values():
            if child is not None and id(child) not in known:
                known.add(id(child))
                found.append(child)
    return found


def is_on(module: nn.Module, device: torch.device) -> bool:
    """Whether all of a module is on a device; `module.to(device)` takes far longer to find out."""
    return all(
        tensor is None or tensor.device == device
        for each in modules_of(module)
        for tensor in chain(each._parameters.values(), each._buffers.values())
    )


def moves_weights(module: nn.Module, device: torch.device) -> bool:
    """Whether the module's forward may give its own weights another place, under lanes that read them."""
    return device.type == "cuda" and any(isinstance(each, nn.RNNBase) for each in modules_of(module))


class Outline:
    """The modules that a module consists of, remembered to look at them all once more in little time.

    Unlike a `Structure` it keeps them alive, and notices no other change than of which they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = modules_of(module)
        # Live views.
        self._children = [each._modules.values() for each in self.modules]
        self._parameters = [each._parameters.values() for each in self.modules]
        self._noted_children = [*chain.from_iterable(self._children)]
        self._noted_parameters: list[Tensor | None] = []
        self._distinct_parameters: list[Tensor] = []

    def is_same(self) -> bool:
        """Whether the modules are the same still."""
        found = [*chain.from_iterable(self._children)]
        return len(found) == len(self._noted_children) and all(map(is_, found, self._noted_children))

    def parameters(self) -> list[Tensor]:
        """The parameters of all modules as of now, each once."""
        found: list[Tensor | None] = [*chain.from_iterable(self._parameters)]
        noted = self._noted_parameters
        if len(found) != len(noted) or not all(map(is_, found, noted)):
            self._noted_parameters = found
            distinct = {id(tensor): tensor for tensor in found if tensor is not None}
            self._distinct_parameters = list(distinct.values())
        return self._distinct_parameters


class Structure:
    """What a module looked like when its replicas were made; tells cheaply whether it still does.

    Everything a module consists of is a value in one of its dictionaries, so one pass over all those
    values finds any change.
    """

    def __init__(self, module: nn.Module) -> None:
        # Weak: a module keeps its replicas, so references to its namespace would make a cycle.
        self._owners = [weakref.ref(each) for each in module.modules()]
        self.take_note()

    def __len__(self) -> int:
        return len(self._owners)

    def take_note(self) -> None:
        """Remember the values as they are now."""
        namespaces = [each.__dict__ for each in self._modules() or ()]
        registries = [namespace[name] for namespace in namespaces for name in _REGISTRIES]
        hooks = [
            values
            for namespace in namespaces
            for name, values in namespace.items()
            if name.endswith("_hooks") and isinstance(values, dict)
        ]
        parts = [
            each
            for namespace in namespaces
            for name, value in namespace.items()
            if name not in _REGISTRIES and _holds_parts(value)
            for each in _containers_in(value)
        ]
        # Views and lists, all of them live. A hook's key is never used again, so keys tell all of hooks.
        self._values = [_values_of(each) for each in (*registries, *parts)]
        named = [*registries, *hooks, *(each for each in parts if isinstance(each, dict))]
        self._names = [each.keys() for each in named if each]
        self._empty = [each for each in named if not each]
        self._attribute_names = [list(namespace) for namespace in namespaces]
        self._noted_names = list(chain.from_iterable(self._names))
        # The root's may hold this very object by its replicas, so of them all but those are kept.
        self._root_ids = [id(value) for value in namespaces[0].values()] if namespaces else []
        self._root = [value for name, value in namespaces[0].items() if name != KEPT] if namespaces else []
        containers = self._containers(namespaces)
        self._lengths = [*map(len, containers)]
        self._noted = [*chain.from_iterable(containers)]

    def is_same(self) -> bool:
        """Whether nothing at all was replaced, added or removed."""
        try:
            namespaces = [owner().__dict__ for owner in self._owners]
        except AttributeError:  # one of the modules is gone
            return False
        containers = self._containers(namespaces)
        return (
            [id(value) for value in namespaces[0].values()] == self._root_ids
            and [*map(len, containers)] == self._lengths
            and all(map(is_, chain.from_iterable(containers), self._noted))
            and self._has_same_names()
        )

    def plain_changes(self) -> dict[tuple[int, str], Any] | None:
        """The attributes that changed, or None if anything else than plain values did."""
        modules = self._modules()
        if modules is None or not self._has_same_names():
            return None
        namespaces = [each.__dict__ for each in modules]
        if [*map(list, namespaces)] != self._attribute_names:
            return None
        if [*map(len, self._containers(namespaces))] != self._lengths:
            return None
        before = chain(self._root, self._noted)
        changes = {
            (id(module), name): value
            for module in modules
            for name, value in module.__dict__.items()
            if (name != KEPT or module is not modules[0]) and value is not next(before)
        }
        unchanged = [*map(id, chain.from_iterable(self._values))] == [*map(id, before)]
        return changes if unchanged and all(isinstance(each, PLAIN) for each in changes.values()) else None

    def _containers(self, namespaces: list[dict[str, Any]]) -> list[Any]:
        """All that holds values, but for the root's namespace."""
        return [each.values() for each in namespaces[1:]] + self._values

    def _modules(self) -> list[nn.Module] | None:
        """All modules, or None if one of them is gone."""
        modules = [owner() for owner in self._owners]
        return None if None in modules else modules  # type: ignore[return-value]

    def _has_same_names(self) -> bool:
        # Most dictionaries of most modules are empty, which is asked for much faster than their names.
        return not any(self._empty) and list(chain.from_iterable(self._names)) == self._noted_names


def _values_of(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _holds_parts(value: Any) -> bool:
    """Whether a plain container holds parts of a module, for which a replica has others."""
    return type(value) in _CONTAINERS and any(
        isinstance(entry, (nn.Module, Tensor, MethodType)) or _holds_parts(entry)
        for entry in _values_of(value)
    )


def _containers_in(value: Any) -> list[Any]:
    """A container and all those within it, but for tuples: they never change."""
    if type(value) not in _CONTAINERS:
        return []
    within = [each for entry in _values_of(value) for each in _containers_in(entry)]
    return within if type(value) is tuple else [value, *within]
