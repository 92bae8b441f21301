"""Nested inputs and outputs as flat lists of leaves.

optree does the work; here it learns of dataclasses and of subclasses of the built-in containers,
which it would take for leaves. They are registered in a namespace of our own, so that no other
user of optree in the process sees a change.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import optree
import torch
from torch.nn.utils.rnn import PackedSequence

NAMESPACE = "asyncdp"

LEAF: optree.PyTreeSpec = optree.tree_structure(cast(Any, 0), none_is_leaf=True, namespace=NAMESPACE)
"""The structure of a lone leaf."""

_registering = threading.Lock()
_registered: set[type] = set()
if hasattr(os, "register_at_fork"):
    # A registration under way ends first: optree has a lock of its own, which a child could not undo.
    os.register_at_fork(
        before=_registering.acquire,
        after_in_parent=_registering.release,
        after_in_child=_registering.release,
    )


def flatten(tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """Flatten nested tuples, lists, dicts, named tuples, dataclasses and their subclasses.

    None is a leaf; empty containers are kept in the structure.
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
    """How a person would write the way to each leaf: "[0]['mask']", or "" for a lone leaf."""
    return [accessor.codify("") for accessor in spec.accessors()]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to every leaf."""
    leaves, spec = flatten(tree)
    return unflatten(spec, [function(leaf) for leaf in leaves])


def _is_container(leaf: Any) -> bool:
    return isinstance(leaf, (dict, list, tuple, UserDict)) or (
        dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
    )


def _register(cls: Any) -> None:
    with _registering:
        if cls in _registered:
            return
        _registered.add(cls)
        node: Any = cls
        if dataclasses.is_dataclass(cls):
            optree.register_pytree_node(node, _flatten_dataclass, _unflatten_dataclass, namespace=NAMESPACE)
        elif issubclass(cls, (dict, UserDict)):
            optree.register_pytree_node(cls, _flatten_dict, _unflatten_dict, namespace=NAMESPACE)
        else:
            optree.register_pytree_node(cls, _flatten_sequence, _unflatten_sequence, namespace=NAMESPACE)


def _flatten_dataclass(value: Any) -> tuple[Any, Any, Any]:
    names = tuple(field.name for field in dataclasses.fields(value) if hasattr(value, field.name))
    return [getattr(value, name) for name in names], (type(value), names), names


def _unflatten_dataclass(metadata: Any, children: Any) -> Any:
    cls, names = metadata
    if issubclass(cls, dict):  # a mapping with attributes keeps both in step by its constructor
        return cls(**dict(zip(names, children, strict=True)))
    # Not the constructor: it may take other arguments, or do its work twice.
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
    """The one leaf of a packed sequence, which moves as a whole and cannot be split."""

    def __init__(self, sequence: Any) -> None:
        self.sequence = sequence

    def __repr__(self) -> str:
        return "PackedSequence(...)"


# A named tuple by its looks, but its rows do not lie along any dimension of its parts.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that named tuples are known already is the point
    optree.register_pytree_node(
        PackedSequence,
        lambda sequence: ([Packed(sequence)], None),
        lambda _, leaves: next(iter(leaves)).sequence,
        namespace=NAMESPACE,
    )
