"""Copies of a module, one per lane, whose parameters lead their gradients back to the original."""

from __future__ import annotations

import copy
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CompiledModuleError, LazyModuleError, NotAModuleError, UnsupportedModuleError

TensorMap = Mapping[int, Tensor]
"""The `id` of one of the original module's parameters or buffers -> what stands in its place."""

AttributeMap = Mapping[tuple[int, str], Any]
"""The `id` of one of the original's modules and a plain attribute's name -> its value."""

KEPT = "_asyncdp_replicas"
"""The attribute under which a module keeps its replicas; no replica has it."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of values that hold no reference to anything else."""

_COMPILED = "_compiled_call_impl"

_SET_APART = ("_parameters", "_buffers", "_modules", _COMPILED, KEPT)


def check_module(module: object) -> None:
    """Refuse what cannot be replicated, before any work starts."""
    if not isinstance(module, nn.Module):
        raise NotAModuleError(module)
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    for each in module.modules():
        if isinstance(each, torch.jit.ScriptModule):
            raise UnsupportedModuleError(each)
        if isinstance(each, compiled):
            raise CompiledModuleError
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise LazyModuleError(name)


def module_tensors(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer once, parameters first."""
    return [*module.parameters(), *module.buffers()]


def stand_ins(originals: Sequence[Tensor], replacements: Sequence[Tensor]) -> TensorMap:
    """Map originals to what stands in for them; a parameter's stand-in counts as a parameter too."""
    for original, replacement in zip(originals, replacements, strict=True):
        if isinstance(original, nn.Parameter) and replacement is not original:
            # What isinstance(x, nn.Parameter) looks at for tensors that are no such instances.
            replacement._is_param = True
    return {id(original): new for original, new in zip(originals, replacements, strict=True)}


class Replica:
    """A module's structure copied, with places into which tensors can be put again and again.

    Args:
        original: what to copy.
        deep: whether attributes that are neither modules nor tensors are copied too, or shared with
            the original. Either way, references to the original's submodules become the replica's.

    Attributes:
        module: the copy.
        installed: the stand-ins it holds now.
        changes: the latest plain attributes that changed in the original since the copy was made.
    """

    def __init__(self, original: nn.Module, *, deep: bool) -> None:
        self.installed: TensorMap | None = None
        self.changes: AttributeMap = {}
        self._installed_changes: AttributeMap = self.changes
        self._modules: dict[int, nn.Module] = {id(each): _bare_copy(each) for each in original.modules()}
        self.module = self._modules[id(original)]
        self._slots: dict[str, list[tuple[dict[str, Any], str, int]]] = {"_parameters": [], "_buffers": []}
        self._empty_buffers: list[tuple[dict[str, Any], str]] = []
        self._attributes: list[tuple[dict[str, Any], str, Any]] = []
        self._memo: dict[int, Any] | None = None
        if deep:
            # A submodule, met inside an attribute, stands for its copy; a copy stands for itself.
            self._memo = {**self._modules, **{id(copied): copied for copied in self._modules.values()}}
        tensor_ids = {id(tensor) for tensor in module_tensors(original)}
        for each in original.modules():
            replica = self._modules[id(each)]
            self._fill(each, replica.__dict__, tensor_ids)
            if isinstance(each, nn.RNNBase) and not deep:
                replica.__dict__["flatten_parameters"] = _Flatten(each, replica)

    def install(self, tensors: TensorMap, changes: AttributeMap | None = None) -> None:
        """Put tensors in the places of the original's, and values in those of its plain attributes.

        Args:
            tensors: what stands for each parameter and buffer of the original.
            changes: plain attributes that changed since the replica was made; the latest if None.
        """
        changes = self.changes if changes is None else changes
        # Buffers always: a forward may have put another tensor in a buffer's place.
        for registry, name, key in self._slots["_buffers"]:
            registry[name] = tensors[key]
        for registry, name in self._empty_buffers:
            registry[name] = None
        if tensors is not self.installed:
            for registry, name, key in self._slots["_parameters"]:
                registry[name] = tensors[key]
            for namespace, name, template in self._attributes:
                namespace[name] = _substitute(template, tensors)
            self.installed = tensors
        if changes is not self._installed_changes:
            for (owner, name), value in changes.items():
                self._modules[owner].__dict__[name] = value
            self._installed_changes = changes

    def set_modes(self, training: Mapping[int, bool]) -> None:
        """Put the copies of the original's modules, named by their ids, in train mode or out of it."""
        for owner, mode in training.items():
            self._modules[owner].__dict__["training"] = mode

    def buffers_of(self, original: nn.Module) -> dict[str, Tensor | None]:
        """The buffers of the copy of one of the original's modules."""
        return self._modules[id(original)]._buffers

    def _fill(self, original: nn.Module, namespace: dict[str, Any], tensor_ids: set[int]) -> None:
        for registry in ("_parameters", "_buffers"):
            entries = dict(namespace[registry])
            namespace[registry] = entries
            self._slots[registry] += [
                (entries, name, id(value)) for name, value in entries.items() if value is not None
            ]
        buffers = namespace["_buffers"]
        self._empty_buffers += [(buffers, name) for name, value in buffers.items() if value is None]
        namespace.pop(KEPT, None)
        namespace["_modules"] = {
            name: None if child is None else self._modules[id(child)]
            for name, child in original._modules.items()
        }
        # Compiled code of the original would run the original.
        namespace.pop(_COMPILED, None)
        for name, value in original.__dict__.items():
            if name in _SET_APART:
                continue
            mapped = _substitute(value, self._modules)
            if _refers_to(mapped, tensor_ids):
                self._attributes.append((namespace, name, mapped))
            elif self._memo is not None:
                mapped = _deep_copy(name, mapped, self._memo)
            namespace[name] = mapped


class _Flatten:
    """`flatten_parameters` of a replica, which leaves weights alone that it shares with the original.

    It gives every weight a new place in memory. Shared ones are no longer shared then, or other lanes read
    them while they move. They are flat as far as the original's are.
    """

    def __init__(self, original: nn.RNNBase, replica: nn.Module) -> None:
        self._original = weakref.ref(original)
        self._replica = weakref.ref(replica)

    def __call__(self) -> None:
        original, replica = self._original(), self._replica()
        assert isinstance(replica, nn.RNNBase), "it is called by way of the replica"
        if original is None or not _share_weights(original, replica):
            type(replica).flatten_parameters(replica)


def _share_weights(one: nn.RNNBase, other: nn.RNNBase) -> bool:
    pairs = zip(one._flat_weights, other._flat_weights, strict=True)
    return any(
        isinstance(weight, Tensor) and isinstance(twin, Tensor) and weight.data_ptr() == twin.data_ptr()
        for weight, twin in pairs
    )


def _bare_copy(module: nn.Module) -> nn.Module:
    # Not through the class's own __new__, which some classes (GraphModule) use to make a new class.
    replica = object.__new__(type(module))
    replica.__dict__.update(module.__dict__)
    return replica


def _substitute(value: Any, memo: Mapping[int, Any]) -> Any:
    """Replace what `memo` knows, also inside lists, tuples, dicts and bound methods."""
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    if kind is MethodType and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    if kind in (list, tuple):
        return _rebuilt(value, [_substitute(entry, memo) for entry in value], kind)
    if kind in (dict, OrderedDict):
        entries = [_substitute(entry, memo) for entry in value.values()]
        return _rebuilt(value, entries, lambda new: kind(zip(value, new, strict=True)), list(value.values()))
    return value


def _rebuilt(value: Any, new: list[Any], make: Callable[[list[Any]], Any], old: Any = None) -> Any:
    """Make a new container if an entry changed; else keep the very one, so that edits stay visible."""
    entries = value if old is None else old
    if all(one is other for one, other in zip(entries, new, strict=True)):
        return value
    return make(new)


def _refers_to(value: Any, ids: set[int]) -> bool:
    if isinstance(value, Tensor):
        return id(value) in ids
    if type(value) in (list, tuple):
        return any(_refers_to(entry, ids) for entry in value)
    if type(value) in (dict, OrderedDict):
        return any(_refers_to(entry, ids) for entry in value.values())
    return False


def _deep_copy(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute deeply, but for hooks and what cannot be copied (locks, handles): shared."""
    if isinstance(value, PLAIN):
        return value
    if name.endswith("_hooks"):
        return copy.copy(value)
    # A copy that fails leaves half-built objects in its memo, which no later copy may meet.
    trial = dict(memo)
    try:
        copied = copy.deepcopy(value, trial)
    except Exception:
        return value
    memo.update(trial)
    return copied
