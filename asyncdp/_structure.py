"""What a module consists of, remembered so that any change of it is noticed."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ._replicate import KEPT, PLAIN


class Structure:
    """What a module looked like when its replicas were made; tells cheaply whether it still does.

    Everything a module consists of is a value in one of its dictionaries, so one pass over the ids of
    all those values finds any change.
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
        registries = [
            namespace[name] for namespace in namespaces for name in ("_parameters", "_buffers", "_modules")
        ]
        hooks = [
            values
            for namespace in namespaces
            for name, values in namespace.items()
            if name.endswith("_hooks") and isinstance(values, dict)
        ]
        parts = [value for namespace in namespaces for value in namespace.values() if _holds_parts(value)]
        # Views and lists, all of them live. A hook's key is never used again, so keys tell all of hooks.
        self._values = [_values_of(each) for each in (*registries, *parts)]
        self._names = [each.keys() for each in (*registries, *hooks)]
        self._attribute_names = [list(namespace) for namespace in namespaces]
        self._ids = self._current_ids()
        self._noted_names = self._current_names()
        # So that the ids stay theirs.
        self._kept = [
            *(value for each in namespaces for name, value in each.items() if name != KEPT),
            *(value for values in self._values for value in values),
        ]

    def is_same(self) -> bool:
        """Whether nothing at all was replaced, added or removed."""
        return self._current_ids() == self._ids and self._current_names() == self._noted_names

    def plain_changes(self) -> dict[tuple[int, str], Any] | None:
        """The attributes that changed, or None if anything else than plain values did."""
        modules = self._modules()
        if modules is None or self._current_names() != self._noted_names:
            return None
        before = iter(self._ids or ())
        changes = {}
        for module, names in zip(modules, self._attribute_names, strict=True):
            if list(module.__dict__) != names:
                return None
            for (name, value), old in zip(module.__dict__.items(), before, strict=False):
                if id(value) != old:
                    changes[id(module), name] = value
        unchanged = [id(value) for values in self._values for value in values] == list(before)
        return changes if unchanged and all(isinstance(each, PLAIN) for each in changes.values()) else None

    def _modules(self) -> list[nn.Module] | None:
        """All modules, or None if one of them is gone."""
        modules = [owner() for owner in self._owners]
        return None if None in modules else modules  # type: ignore[return-value]

    def _current_ids(self) -> list[int] | None:
        try:
            ids = [id(value) for owner in self._owners for value in owner().__dict__.values()]
        except AttributeError:  # one of the modules is gone
            return None
        ids += [id(value) for values in self._values for value in values]
        return ids

    def _current_names(self) -> list[Any]:
        return [name for names in self._names for name in names]


def _values_of(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _holds_parts(value: Any) -> bool:
    """Whether a plain container holds parts of a module, for which a replica has others."""
    return type(value) in (list, dict, OrderedDict) and any(
        isinstance(entry, (nn.Module, Tensor, MethodType)) for entry in _values_of(value)
    )
