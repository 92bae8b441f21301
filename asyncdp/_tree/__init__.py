"""Nested inputs and outputs as flat lists of leaves.

optree does the work. Dataclasses, subclasses of the built-in containers, the caches of transformers and what
is registered with torch's own pytree, which it takes for leaves, are registered with it in a namespace of our
own: no other user of optree in the process sees a change.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from collections import UserDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import optree
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import SUPPORTED_NODES

from . import caches
from .rows import PerRow, Whole

__all__ = ["PerRow", "Whole", "flatten", "map_leaves", "paths", "tensors", "unflatten"]

NAMESPACE = "asyncdp"

LEAF: optree.PyTreeSpec = optree.tree_structure(cast(Any, 0), none_is_leaf=True, namespace=NAMESPACE)
"""The structure of a lone leaf."""

_LEAVES = (str, int, float, PerRow, Whole)
_CONTAINERS = (dict, list, tuple, UserDict)

_registering = threading.Lock()
_registered: set[type] = set()
if hasattr(os, "register_at_fork"):
    # A running registration ends first: it may hold a lock of optree, which a child could not release.
    os.register_at_fork(
        before=_registering.acquire,
        after_in_parent=_registering.release,
        after_in_child=_registering.release,
    )


def flatten(tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """Flatten nested tuples, lists, dicts, named tuples, dataclasses, subclasses and registered classes.

    None is a leaf, and so are `PerRow` and `Whole`; empty containers are kept in the structure.
    """
    if isinstance(tree, torch.Tensor):  # by far the most frequent tree, and quicker than by optree
        return [tree], LEAF
    while True:
        leaves, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
        unknown = {type(leaf) for leaf in leaves if _is_container(leaf)}
        if not unknown:
            return leaves, spec
        for cls in unknown:
            _register(cls)


def unflatten(spec: optree.PyTreeSpec, leaves: Sequence[Any]) -> Any:
    """Put leaves back into their structure."""
    return leaves[0] if spec is LEAF else optree.tree_unflatten(spec, leaves)


def paths(spec: optree.PyTreeSpec) -> list[str]:
    """Return each leaf's path as Python writes it: "[0]['mask']", or "" for a lone leaf."""
    return [_without_packed(accessor).codify("") for accessor in spec.accessors()]


def _without_packed(accessor: Any) -> Any:
    """Leave out the way into a packed sequence, whose only leaf is itself."""
    is_packed = len(accessor) > 0 and accessor[-1].type is PackedSequence
    return accessor[:-1] if is_packed else accessor


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the same structure with `function` applied to every leaf."""
    leaves, spec = flatten(tree)
    return unflatten(spec, [function(leaf) for leaf in leaves])


def tensors(tree: Any) -> list[torch.Tensor]:
    """Return every tensor of a tree, those in a `PerRow` or a `Whole` included."""
    found: list[torch.Tensor] = []
    for leaf in flatten(tree)[0]:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif isinstance(leaf, PerRow):
            found += tensors(list(leaf))
        elif isinstance(leaf, Whole):
            found += tensors(leaf.value)
    return found


def _is_container(leaf: Any) -> bool:
    if isinstance(leaf, (torch.Tensor, *_LEAVES)):
        return False
    return _is_dataclass(leaf) or isinstance(leaf, _CONTAINERS) or _is_registered(type(leaf))


def _is_dataclass(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def _is_registered(cls: type) -> bool:
    return cls in SUPPORTED_NODES or caches.is_cache(cls)


def _register(cls: Any) -> None:
    with _registering:
        if cls in _registered:
            return
        _registered.add(cls)
        node: Any = cls
        if caches.is_cache(cls):
            optree.register_pytree_node(cls, caches.flatten, caches.unflatten, namespace=NAMESPACE)
        elif cls in SUPPORTED_NODES and not issubclass(cls, _CONTAINERS):
            definition = SUPPORTED_NODES[cls]
            unflatten_node = partial(_unflatten_registered, definition.unflatten_fn)
            optree.register_pytree_node(cls, definition.flatten_fn, unflatten_node, namespace=NAMESPACE)
        elif dataclasses.is_dataclass(cls):
            optree.register_pytree_node(node, _flatten_dataclass, _unflatten_dataclass, namespace=NAMESPACE)
        elif issubclass(cls, (dict, UserDict)):
            optree.register_pytree_node(cls, _flatten_dict, _unflatten_dict, namespace=NAMESPACE)
        else:
            optree.register_pytree_node(cls, _flatten_sequence, _unflatten_sequence, namespace=NAMESPACE)


def _unflatten_registered(unflatten_fn: Callable[[Any, Any], Any], context: Any, children: Any) -> Any:
    return unflatten_fn(list(children), context)  # torch gives the two the other way round


def _flatten_dataclass(value: Any) -> tuple[Any, Any, Any]:
    names = tuple(field.name for field in dataclasses.fields(value) if hasattr(value, field.name))
    return [getattr(value, name) for name in names], (type(value), names), names


def _unflatten_dataclass(metadata: Any, children: Any) -> Any:
    cls, names = metadata
    if issubclass(cls, dict):  # the constructor keeps attributes and entries equal
        return cls(**dict(zip(names, children, strict=True)))
    # Not by the constructor: it may take other arguments, or repeat side effects.
    value = object.__new__(cls)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(value, name, child)
    return value


def _flatten_dict(value: Any) -> tuple[Any, Any, Any]:
    keys = tuple(value)
    return [value[key] for key in keys], (type(value), keys), keys


def _unflatten_dict(metadata: Any, children: Any) -> Any:
    cls, keys = metadata
    entries = dict(zip(keys, children, strict=True))
    if issubclass(cls, UserDict):
        return cls(entries)
    value = cls.__new__(cls)
    for key, child in entries.items():  # not update, which in a Counter counts
        value[key] = child
    return value


def _flatten_sequence(value: Any) -> tuple[Any, Any, Any]:
    return list(value), type(value), range(len(value))


def _unflatten_sequence(cls: Any, children: Any) -> Any:
    if issubclass(cls, list):
        value = cls.__new__(cls)
        list.extend(value, children)
        return value
    # A subclass may construct from other arguments; torch.Size insists on its own constructor.
    return cls(children) if cls is torch.Size else tuple.__new__(cls, children)


class Packed:
    """The only leaf of a packed sequence, which moves as a whole and cannot be split."""

    def __init__(self, sequence: Any) -> None:
        self.sequence = sequence

    @property
    def device(self) -> torch.device:
        """Where the sequence is."""
        return self.sequence.data.device  # type: ignore[no-any-return]

    def to(self, device: torch.device, *, non_blocking: bool) -> Packed:
        """Return the sequence on another device."""
        return Packed(self.sequence.to(device, non_blocking=non_blocking))

    def __repr__(self) -> str:
        return "PackedSequence(...)"


# A named tuple, but its rows do not lie along any dimension of its parts.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # optree warns that it knows named tuples already
    optree.register_pytree_node(
        PackedSequence,
        lambda sequence: ([Packed(sequence)], None),
        lambda _, leaves: next(iter(leaves)).sequence,
        namespace=NAMESPACE,
    )
