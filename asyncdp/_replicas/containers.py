"""What a module's attributes lead to and a forward may change: containers, and the attributes of objects."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import suppress
from operator import is_
from types import MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any

from torch import nn

MUTABLE = frozenset({list, dict, OrderedDict, defaultdict, Counter, set, deque})
"""Types of containers that a forward may change; each replica has its own."""

_BASES = (list, dict, set, deque)

ATOMS = frozenset({bool, int, float, str, type(None)})

# A class of containers with one of these of its own is not copied: nobody knows what it does.
_METHODS: tuple[str, ...] = ("keys", "values", "update", "append", "extend", "clear")
_METHODS += ("__getitem__", "__setitem__", "__iter__", "__len__", "__reduce__")

_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_IS_HEAP_TYPE = 1 << 9  # `Py_TPFLAGS_HEAPTYPE`: of classes that are made, not built in
_DEFAULTS = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__")
_OTHER_WAYS = ("__deepcopy__", "__setstate__", "__getnewargs__", "__getnewargs_ex__", "__del__")

# What leads to more (a vocabulary, a trainer with its data set) is not looked through at every call.
_MAX_VALUES = 4096


class Slots(MutableMapping[str, Any]):
    """The attributes that an object keeps in `__slots__`; none of those that are not set.

    Args:
        owner: the object.
        names: of all its slots.
    """

    __slots__ = ("_names", "owner")

    def __init__(self, owner: Any, names: Iterable[str]) -> None:
        self.owner = owner
        self._names = tuple(names)

    def __getitem__(self, name: str) -> Any:
        return object.__getattribute__(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self.owner, name)

    def __iter__(self) -> Iterator[str]:
        for name in self._names:
            try:
                self[name]
            except AttributeError:
                continue
            yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __reduce__(self) -> Any:
        return Slots, (self.owner, self._names)


MAPPINGS = (dict, Slots)


def parts_of(value: Any) -> list[Any]:
    """Return what holds an object's values: itself if it is a container, its `__dict__`, its slots."""
    kind = type(value)
    parts: list[Any] = [value] if issubclass(kind, _BASES) else []
    with suppress(AttributeError):
        parts.append(object.__getattribute__(value, "__dict__"))
    names = [
        name
        for each in kind.__mro__
        for name, held in vars(each).items()
        if type(held) is MemberDescriptorType and name != "__dict__"
    ]
    return [*parts, Slots(value, names)] if names else parts


def bare_like(value: Any) -> Any:
    """Return an object of the same class that has no attributes yet."""
    kind = type(value)
    if issubclass(kind, _BASES):
        return empty_like(value)
    # Not through a module's own __new__, which some classes (GraphModule) use to make a new class.
    return kind() if kind is SimpleNamespace else object.__new__(kind)


def is_copied_by_attributes(value: Any) -> bool:
    """Return whether an object is nothing but its attributes, so that copies of these make a copy of it."""
    kind = type(value)
    if not kind.__flags__ & _IS_HEAP_TYPE:
        return kind is SimpleNamespace
    if issubclass(kind, nn.Module):
        return kind.__reduce_ex__ is object.__reduce_ex__ and not hasattr(kind, "__deepcopy__")
    if any(hasattr(kind, name) for name in _OTHER_WAYS):
        return False
    if issubclass(kind, _BASES):
        base = next(each for each in kind.__mro__ if each in MUTABLE)
        is_plain = all(getattr(kind, name, None) == getattr(base, name, None) for name in _METHODS)
        return is_plain and kind.__new__ is base.__new__ and getattr(value, "__dict__", None) is not value
    if any(getattr(kind, name) is not getattr(object, name) for name in _DEFAULTS):
        return False
    try:
        object.__reduce_ex__(value, 2)  # refuses what has state of its own in C
    except Exception:
        return False
    return True


class Contents:
    """The containers and objects that a module's attributes lead to.

    Args:
        modules: those that have replicas, which are not looked into.

    Attributes:
        containers: by their ids; also the mappings that hold the attributes of `objects`. No tuples, which
            never change.
        objects: by their ids, those of which each replica has its own, with the mappings of their attributes.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.containers: dict[int, Any] = {}
        self.objects: dict[int, tuple[Any, list[Any]]] = {}
        self._known = {*map(id, modules)}
        self._shared: set[int] = set()

    def look(self, value: Any) -> None:
        """Add what an attribute leads to."""
        kind = type(value)
        if kind in ATOMS or id(value) in self._known or id(value) in self._shared:
            return
        if kind is MethodType:
            self.look(value.__self__)
        elif kind is tuple or kind in MUTABLE:
            if kind is not tuple:
                self._known.add(id(value))
                self.containers[id(value)] = value
            for entry in entries(value):
                self.look(entry)
        elif is_copied_by_attributes(value) and not self._add_object(value):
            self._shared.add(id(value))

    def _add_object(self, value: Any) -> bool:
        """Add an object with all that it leads to; not if it is meant to be shared, or leads too far."""
        reached = Contents(())
        reached._known |= self._known
        waiting, num_values = [value], 0
        while waiting:
            each = waiting.pop()
            kind = type(each)
            if kind in ATOMS or id(each) in reached._known:
                continue
            if kind in _LOCKS or id(each) in self._shared:
                return False
            parts: list[Any] = []
            if kind is MethodType:
                waiting.append(each.__self__)
            elif kind is tuple:
                waiting += each
            elif kind in MUTABLE:
                parts = [each]
            elif is_copied_by_attributes(each):
                parts = parts_of(each)
                reached.objects[id(each)] = (each, parts)
            reached._known |= {id(each), *map(id, parts)}
            for part in parts:
                reached.containers[id(part)] = part
                num_values += len(part)
                waiting += entries(part)
            if num_values > _MAX_VALUES:
                return False
        self.containers |= reached.containers
        self.objects |= reached.objects
        self._known = reached._known
        return True


def entries(container: Any) -> Any:
    """Return the values that a container holds."""
    return container.values() if isinstance(container, MAPPINGS) else container


def is_same(one: Any, other: Any) -> bool:
    """Return whether two containers hold the very same values, in the same order and by the same names."""
    if len(one) != len(other) or not all(map(is_, entries(one), entries(other))):
        return False
    return not isinstance(one, MAPPINGS) or [*one] == [*other]


def shallow(container: Any) -> Any:
    """Return what `refill` fills a container from."""
    if isinstance(container, MAPPINGS):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def empty_like(container: Any) -> Any:
    """Return a new container of the same kind that holds nothing."""
    kind: Any = type(container)
    new = kind.__new__(kind)  # the class of a user's own may want arguments
    if isinstance(container, defaultdict):
        new.default_factory = container.default_factory
    elif isinstance(container, deque):
        deque.__init__(new, maxlen=container.maxlen)
    return new


def refill(container: Any, content: Any) -> None:
    """Put back what a container held."""
    container.clear()
    if isinstance(container, (*MAPPINGS, set)):
        container.update(content)
    else:
        container.extend(content)
