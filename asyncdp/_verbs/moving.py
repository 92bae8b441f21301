"""Values moved to a device."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import _tree
from .._devices import LaneDevice
from .._tree import PerRow, Whole
from ..errors import MetaTensorError

_HOST = torch.device("cpu")


def move(tree: Any, device: torch.device, *, objects: bool = False) -> Any:
    """Move every tensor of a tree to `device`; a tree that is there already is returned as it is.

    Args:
        tree: nested at will.
        device: where to.
        objects: as `moved_leaves`.
    """
    leaves, spec = _tree.flatten(tree)
    moved = moved_leaves(leaves, device, objects=objects)
    return tree if moved is leaves else _tree.unflatten(spec, moved)


def moved_leaves(leaves: list[Any], device: torch.device, *, objects: bool = True) -> list[Any]:
    """Move what is elsewhere, and take values out of `Whole`; return the very list if nothing changes.

    Args:
        leaves: of a tree.
        device: where to.
        objects: whether to move also what is no tensor but knows how to move itself, as batches of graphs do.
    """
    moved = leaves
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.device == device:
            continue
        there = _moved(leaf, device, objects)
        if there is not leaf:
            moved = list(leaves) if moved is leaves else moved
            moved[position] = there
    return moved


def prefetched(tree: Any, driver: LaneDevice) -> Callable[[], Any]:
    """Begin to copy plain tensors of the host to a lane's device, where it can copy while it computes.

    Returns:
        What gives the tree with these copies in it, called once, by the lane's task.
    """
    if not driver.prefetches:
        return lambda: tree
    leaves, spec = _tree.flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if _is_plain(leaf, _HOST)]
    if not places:
        return lambda: tree
    take = driver.prefetch([leaves[place] for place in places])
    return lambda: _tree.unflatten(spec, _replaced(leaves, places, take()))


def fetched(tree: Any, driver: LaneDevice, device: torch.device) -> Any:
    """As `move`, for the output of a lane's task; results for the host are there once that is complete."""
    if not driver.prefetches or device.type != "cpu":
        return move(tree, device)
    leaves, spec = _tree.flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if _is_plain(leaf, driver.device)]
    hosts = driver.fetch([leaves[place] for place in places]) if places else []
    others = moved_leaves(_replaced(leaves, places, [None] * len(places)), device, objects=False)
    return _tree.unflatten(spec, _replaced(others, places, hosts))


def _is_plain(leaf: Any, device: torch.device) -> bool:
    """Return whether a leaf is plain data on a device, with no gradient to go through its copy."""
    return (
        isinstance(leaf, Tensor)
        and leaf.device.type == device.type
        and leaf.device.index in (None, device.index)
        and leaf.layout is torch.strided
        and not leaf.requires_grad
    )


def _replaced(leaves: list[Any], places: list[int], values: Sequence[Any]) -> list[Any]:
    replaced = list(leaves)
    for place, value in zip(places, values, strict=True):
        replaced[place] = value
    return replaced


def _moved(leaf: Any, device: torch.device, objects: bool) -> Any:
    if isinstance(leaf, (Tensor, _tree.Packed)):
        # Only towards CUDA: the other way the copy might be read on the host before it has arrived.
        if leaf.device == device:
            return leaf
        if isinstance(leaf, Tensor) and leaf.is_meta:
            raise MetaTensorError(f"a tensor of shape {list(leaf.shape)}")
        return leaf.to(device, non_blocking=device.type == "cuda")
    if isinstance(leaf, PerRow):
        entries = list(leaf)
        there = move(entries, device, objects=objects)
        return leaf if there is entries else PerRow(there)
    if isinstance(leaf, Whole):
        return move(leaf.value, device, objects=objects)
    cls: Any = type(leaf)
    if objects and _moves_itself(cls) and getattr(leaf, "device", None) != device:
        # A copy: some move in place, and several lanes may have the same object.
        there = copy.copy(leaf)
        result = there.to(device)
        return there if result is None else result
    return leaf


@lru_cache(maxsize=1024)
def _moves_itself(cls: Any) -> bool:
    """Return whether objects have a `to` that takes a device, rather than a time zone or a unit."""
    to = getattr(cls, "to", None)
    if not callable(to) or issubclass(cls, nn.Module):
        return False
    try:
        parameters = list(inspect.signature(to).parameters.values())
    except (TypeError, ValueError):  # no signature
        return False
    if len(parameters) < 2:
        return False
    return parameters[1].name == "device" or parameters[1].kind is inspect.Parameter.VAR_POSITIONAL
