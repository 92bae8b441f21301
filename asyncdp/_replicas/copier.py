"""Fills the copies of a module's namespaces, so that nothing a forward may change is shared."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import is_
from types import CellType, FunctionType, MethodType
from typing import Any
from weakref import ReferenceType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._torch_private import COMPILED_CALL
from .containers import ATOMS, MAPPINGS, MUTABLE, bare_like, empty_like, parts_of
from .snapshot import PLAIN, ModuleSnapshot
from .state import CACHE_ATTRIBUTE, OF_ALL_MODULES, REGISTRIES


def bare_copy(module: nn.Module, namespace: Mapping[str, Any]) -> nn.Module:
    replica = bare_like(module)
    replica.__dict__.update(namespace)
    return replica  # type: ignore[no-any-return]


class Copier:
    """Fills the copies of a module's namespaces.

    Attributes:
        places: where tensors are to be put: a container, the key, and the `id` of the original tensor.
        templates: the same for tuples in which tensors are: a container, the key and the original.
        holders: containers whose content a forward may change.
        containers: those of them that are no registries, and not torch's own.
        objects: those whose attributes are among these.
    """

    def __init__(self, snapshot: ModuleSnapshot, modules: Sequence[nn.Module], *, deep: bool) -> None:
        self._copies: dict[int, Any] = dict(zip(map(id, snapshot.modules), modules, strict=True))
        # A submodule, met inside an attribute, stands for its copy; a copy stands for itself.
        self._memo = {**self._copies, **{id(each): each for each in modules}} if deep else None
        tensors = snapshot.tensors if deep else [*snapshot.tensors, *snapshot.loose]
        self._tensor_ids = {id(tensor) for tensor in tensors}
        self._contents = snapshot.contents
        self._originals = snapshot.objects
        self.places: list[tuple[Any, Any, int]] = []
        self.templates: list[tuple[Any, Any, Any]] = []
        self.holders: list[Any] = []
        self.containers: list[Any] = []
        self.objects: list[Any] = []
        self._hooks: dict[int, Any] = {}  # a copy of each dictionary of hooks, by the `id` of the original
        self._handles: list[tuple[Any, Any, RemovableHandle]] = []

    def fill(self, namespace: dict[str, Any]) -> None:
        """Make all that one namespace holds the replica's own."""
        for registry in ("_parameters", "_buffers"):
            held = namespace[registry] = dict(self._contents.get(id(namespace[registry]), {}))
            self.places += [(held, name, id(value)) for name, value in held.items() if value is not None]
        namespace.pop(CACHE_ATTRIBUTE, None)
        namespace["_modules"] = {
            name: None if child is None else self._copies[id(child)]
            for name, child in self._contents.get(id(namespace["_modules"]), {}).items()
        }
        self.holders += [namespace[registry] for registry in REGISTRIES]
        # Compiled code of the original would run the original.
        namespace.pop(COMPILED_CALL, None)
        for name, value in [*namespace.items()]:
            if name in REGISTRIES or type(value) in ATOMS:
                continue
            if name in OF_ALL_MODULES:
                if type(value) in MUTABLE:
                    namespace[name] = self._hooks[id(value)] = self._filled(empty_like(value), value)
                    self.holders.append(namespace[name])
            elif self._memo is None or type(value) is RemovableHandle:
                namespace[name] = self._own(value)
                self._note(namespace, name, value)
            else:
                namespace[name] = self._deep(namespace, name, value, self._memo)

    def bind_handles(self) -> None:
        """Have the handles of hooks remove the replica's own, once all namespaces are filled."""
        for holder, key, handle in self._handles:
            refs = [handle.hooks_dict_ref, *handle.extra_dict_ref]
            dicts = [self._hooks.get(id(ref())) for ref in refs]
            if None not in dicts:
                own = holder[key] = object.__new__(RemovableHandle)  # with no `id` of its own
                own.__setstate__((dicts[0], handle.id, tuple(dicts[1:])))

    def _own(self, value: Any) -> Any:
        """Return the replica's own of a value; what is met twice is still one."""
        kind = type(value)
        if id(value) in self._copies:
            return self._copies[id(value)]
        if id(value) in self._originals:
            return self._own_object(value)
        if kind is MethodType:
            owner = self._own(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if kind is ReferenceType and (id(value()) in self._copies or id(value()) in self._originals):
            return ReferenceType(self._own(value()))
        if kind in (FunctionType, partial):
            return rebound(value, self._captured)
        if kind is tuple:
            return _rebuilt(value, [self._own(entry) for entry in value], tuple)
        if kind not in MUTABLE:
            return value
        new = self._copies[id(value)] = empty_like(value)
        self.holders.append(new)
        self.containers.append(new)
        return self._filled(new, value)

    def _own_object(self, value: Any) -> Any:
        new = self._copies[id(value)] = bare_like(value)
        self.objects.append(new)
        held = parts_of(new)
        self.holders += held
        self.containers += held
        for mine, part in zip(held, self._originals[id(value)][1], strict=True):
            self._copies[id(part)] = mine
            self._filled(mine, part)
        return new

    def _captured(self, value: Any) -> Any:
        """Return the replica's own of what a function captured, if that is a module or held by one."""
        is_ours = any(id(value) in each for each in (self._copies, self._contents, self._originals))
        return self._own(value) if is_ours or type(value) in (MethodType, FunctionType, partial) else value

    def _filled(self, new: Any, value: Any) -> Any:
        """Put into a new container what another held when the snapshot was captured."""
        content = self._contents.get(id(value), ())
        if isinstance(value, set):
            new.update(map(self._own, content))
            return new
        for key, entry in content.items() if isinstance(content, dict) else enumerate(content):
            own = self._own(entry)
            if isinstance(value, MAPPINGS):
                new[key] = own
            else:
                new.append(own)
            self._note(new, key, entry)
        return new

    def _note(self, holder: Any, key: Any, value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) in self._tensor_ids:
                self.places.append((holder, key, id(value)))
        elif type(value) is RemovableHandle:
            self._handles.append((holder, key, value))
        elif type(value) is tuple and _refers_to(value, self._tensor_ids):
            self.templates.append((holder, key, holder[key]))

    def _deep(self, namespace: dict[str, Any], name: str, value: Any, memo: dict[int, Any]) -> Any:
        mapped = self._own(value) if type(value) in (FunctionType, partial) else value
        mapped = substitute(mapped, self._copies)
        if _refers_to(mapped, self._tensor_ids):
            self.templates.append((namespace, name, mapped))
            return mapped
        return _deep_copy(mapped, memo)


def substitute(value: Any, memo: Mapping[int, Any]) -> Any:
    """Replace what `memo` knows, also inside lists, tuples, dicts and bound methods."""
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    if kind is MethodType and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    if kind in (list, tuple):
        return _rebuilt(value, [substitute(entry, memo) for entry in value], kind)
    if kind in (dict, OrderedDict):
        entries = [substitute(entry, memo) for entry in value.values()]
        return _rebuilt(value, entries, lambda new: kind(zip(value, new, strict=True)), list(value.values()))
    return value


def rebound(function: Any, own: Callable[[Any], Any]) -> Any:
    """Return a function or `partial` that refers to other values; the same one if they are the same.

    Modules keep such functions that refer to themselves: wrapped methods, hooks made by a method.

    Args:
        function: what may have captured modules.
        own: returns what is to be captured in a value's place.
    """
    if type(function) is partial:
        inner, *args = old = [function.func, *function.args, *function.keywords.values()]
        inner, *args = new = [own(each) for each in old]
        if all(map(is_, old, new)):
            return function
        count = len(function.args)
        return partial(inner, *args[:count], **dict(zip(function.keywords, args[count:], strict=True)))
    cells = [cell for cell in function.__closure__ or () if _is_filled(cell)]
    # A function that refers to itself goes on referring to the one before.
    old = [cell.cell_contents for cell in cells if cell.cell_contents is not function]
    new = [own(each) for each in old]
    if all(map(is_, old, new)):
        return function
    values = dict(zip(map(id, old), new, strict=True))
    closure = tuple(
        CellType(values[id(cell.cell_contents)])
        if _is_filled(cell) and id(cell.cell_contents) in values
        else cell
        for cell in function.__closure__
    )
    name, defaults = function.__name__, function.__defaults__
    copied = FunctionType(function.__code__, function.__globals__, name, defaults, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    return copied


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _rebuilt(value: Any, new: list[Any], make: Callable[[list[Any]], Any], old: Any = None) -> Any:
    """Make a new container if an entry changed; else return the same one, so that edits stay visible."""
    entries = value if old is None else old
    if all(before is after for before, after in zip(entries, new, strict=True)):
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


def _deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute deeply, but share what cannot be copied (locks, handles)."""
    if isinstance(value, PLAIN):
        return value
    # A copy that fails leaves half-built objects in its memo, which no later copy may find.
    trial = dict(memo)
    try:
        copied = copy.deepcopy(value, trial)
    except Exception:
        return value
    memo.update(trial)
    return copied
