"""What modules hold beside their tensors' values, found at C speed.

A forward may set attributes, append to lists, register hooks. What it leaves so on a replica must not
reach the next pass, and looking for it must cost next to nothing where there is none.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .containers import Slots, entries

REGISTRIES = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OF_ALL_MODULES = frozenset(vars(nn.Module()))
OWN_OF_ALL = tuple(
    name
    for name, value in vars(nn.Module()).items()
    if isinstance(value, (dict, set)) and name not in REGISTRIES
)
"""The hook dictionaries and other containers that every module has."""

CACHE_ATTRIBUTE = "_asyncdp_replicas"
"""The attribute of a module that holds its replicas; no snapshot and no replica has it."""

_namespace = attrgetter("__dict__")  # quicker than `vars`

_FOLLOWED = (dict, set)

# What equals a value of these types can stand for it. Equal numbers may differ in type, equal tensors in
# everything but values, so values of all other types with an equality of their own are compared by identity.
_EQUALITY_SUFFICES = frozenset({str, bytes, torch.device, FunctionType, MethodType})


class Watch:
    """Tells whether modules, their parameters, buffers, submodules and hooks, and containers are the same.

    Args:
        modules: which modules; the first one is not kept.
        containers: what else their attributes hold.
        objects: whose attributes are among these.
    """

    def __init__(
        self, modules: Sequence[nn.Module], containers: Sequence[Any], objects: Sequence[Any] = ()
    ) -> None:
        namespaces = namespaces_of(modules)
        held = [namespace[name] for namespace in namespaces for name in REGISTRIES + HOOKS]
        held += [each for each in containers if type(each) is not Slots]
        self._empty = [each for each in held if not each]
        # From Python 3.13 on most objects have their attributes themselves, and so tell of them; before, and
        # also later after some changes, their `__dict__` does.
        self._holders = (*modules[1:], *namespaces[1:], *objects, *(each for each in held if each))
        self._found = self._find(modules[0])
        # Dictionaries of torch's own are followed by what they hold.
        followed = {
            id(value)
            for namespace in namespaces
            for name, value in namespace.items()
            if name in OF_ALL_MODULES and isinstance(value, _FOLLOWED)
        }
        places = [
            place
            for place, value in enumerate(self._found)
            if _is_compared_by_identity(value) and id(value) not in followed
        ]
        self._pick = itemgetter(*places, *places[:1]) if places else (lambda _: ())
        self._picked = self._pick(self._found)

    def _find(self, root: nn.Module) -> list[Any]:
        """Return all values that are held now, and the types of what holds them."""
        return gc.get_referents((type(root),), _without_replicas(root.__dict__), *self._holders)

    def holds(self, root: nn.Module) -> bool:
        """Return whether nothing was replaced, added, removed or reordered since.

        Args:
            root: the first of the modules.
        """
        # All values at once; identities first, lest different tensors are compared.
        found = self._find(root)
        try:
            return (
                len(found) == len(self._found)
                and all(map(is_, self._pick(found), self._picked))
                and found == self._found
                and not any(self._empty)
            )
        except Exception:  # a new value cannot be compared
            return False

    def renew(self, root: nn.Module) -> None:
        """Take the values that are held now, in the same places, for those to be held."""
        self._found = self._find(root)
        self._picked = self._pick(self._found)


def _is_compared_by_identity(value: Any) -> bool:
    kind: Any = type(value)
    return kind not in _EQUALITY_SUFFICES and kind.__eq__ is not object.__eq__


def namespaces_of(modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Return the attributes of modules; of the first one without its replicas."""
    namespaces = [*map(_namespace, modules)]
    namespaces[0] = _without_replicas(namespaces[0])
    return namespaces


def _without_replicas(namespace: dict[str, Any]) -> dict[str, Any]:
    found = namespace.copy()
    found.pop(CACHE_ATTRIBUTE, None)
    return found


def attributes_of(namespace: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the attributes that are not among those of every module."""
    return ((name, value) for name, value in namespace.items() if name not in OF_ALL_MODULES)


def loose_tensors(namespaces: Sequence[dict[str, Any]], containers: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that a forward may write into although they are neither parameters nor buffers."""
    registered = {
        id(tensor)
        for namespace in namespaces
        for tensor in chain(namespace["_parameters"].values(), namespace["_buffers"].values())
    }
    found: dict[int, Tensor] = {}

    def look(value: Any) -> None:
        if type(value) is Tensor:
            # Copies of others would have gradients of their own.
            if id(value) not in registered and not value.requires_grad and not value.is_meta:
                found[id(value)] = value
        elif type(value) is tuple:
            for entry in value:
                look(entry)

    for namespace in namespaces:
        for _, value in attributes_of(namespace):
            look(value)
    for container in containers:
        if type(container) not in (set, Counter):
            for entry in entries(container):
                look(entry)
    return [*found.values()]
