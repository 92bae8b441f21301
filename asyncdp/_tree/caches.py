"""The key-value caches of transformers as containers of the tensors that they hold.

A cache and its layers are objects with tensors, lists and numbers as attributes. They are rebuilt with all
of them, not through the cache's own iteration, which leaves out what a layer counts beside its tensors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_MODULE = "transformers.cache_utils"
_NAMES = frozenset({"Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin", "EncoderDecoderCache"})
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@lru_cache(maxsize=1024)
def is_cache(cls: Any) -> bool:
    """Return whether objects of a class are caches of transformers, or layers of them."""
    return any(base.__module__ == _MODULE and base.__name__ in _NAMES for base in cls.__mro__)


class _Rest:
    """What of a cache's attributes has no rows; equal if all numbers and names in it are."""

    def __init__(self, cls: type, names: tuple[str, ...], attributes: dict[str, Any]) -> None:
        self.cls, self.names, self.attributes = cls, names, attributes

    def _key(self) -> tuple[Any, ...]:
        plain = {name: value for name, value in self.attributes.items() if isinstance(value, _PLAIN)}
        return self.cls, self.names, plain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rest) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((self.cls, self.names))

    def __repr__(self) -> str:
        return repr(self._key())


def flatten(cache: Any) -> tuple[list[Any], _Rest, tuple[str, ...]]:
    """Return the attributes that hold tensors with rows, and everything else."""
    attributes = dict(vars(cache))
    names = tuple(name for name, value in attributes.items() if _has_parts(value))
    return [attributes.pop(name) for name in names], _Rest(type(cache), names, attributes), names


def unflatten(rest: Any, children: Any) -> Any:
    """Make a cache of the same class with other parts."""
    cache: Any = object.__new__(rest.cls)
    parts = dict(zip(rest.names, children, strict=True))
    # Counters that are tensors are written in place: each cache has its own.
    counters = {name: value.clone() for name, value in rest.attributes.items() if isinstance(value, Tensor)}
    vars(cache).update(rest.attributes, **counters, **parts)
    device = next((part.device for part in parts.values() if isinstance(part, Tensor)), None)
    if device is not None and isinstance(rest.attributes.get("device"), torch.device):
        cache.device = device
    return cache


def _has_parts(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0
    cls: Any = type(value)
    return isinstance(value, (list, tuple, dict)) or is_cache(cls)
