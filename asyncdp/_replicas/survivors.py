"""What of a forward's changes to its replica survives in the module."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .snapshot import AttributeMap, ModuleSnapshot

TensorMap = Mapping[tuple[int, str], tuple[Tensor | None, Tensor | None]]
"""The position of a module and the name of a buffer or parameter -> the tensors before and after."""


def _dead() -> None:
    """Stand for a reference to what is gone."""


@dataclass(slots=True)
class Survivors:
    """What of a forward's changes to its replica survives in the original.

    Attributes:
        snapshot: of the original.
        buffers: position and name of each buffer to be changed; what it was before, what it is now, and
            whether it was put in the other's place.
        values: plain values that were set beside buffers that changed.
        is_counted: whether the forward is known to have changed a tensor that survives. Lane 0 may have
            changed the original's own, which leaves nothing to carry.
        loose: tensors to be written to, and from what.
    """

    snapshot: ModuleSnapshot
    buffers: list[tuple[int, str, Tensor | None, Tensor | None, bool]] = field(default_factory=list)
    values: dict[tuple[int, str], Any] = field(default_factory=dict)
    is_counted: bool = False
    loose: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    transient: list[tuple[int, str]] = field(default_factory=list)
    """New buffers that are not to be saved."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that passes which wait do not have anyway."""
        return not self.values and not any(is_replaced for *_, is_replaced in self.buffers)


class Carried:
    """What forwards have carried into a module, in the order in which they did.

    A pass whose state was captured before gets it all the same. Each state refers to the latest link of a
    chain at its time; links that no state refers to go.

    Attributes:
        num_changing: by the mode, how many forwards have changed tensors that survive.
    """

    def __init__(self) -> None:
        self.latest = Link()
        self.num_changing: Counter[bool] = Counter()
        self._put: dict[tuple[int, str], weakref.ref[Tensor]] = {}  # what forwards have put into registries

    def apply(self, survivors: Survivors, training: bool) -> None:
        """Carry what survives of one forward into the module.

        Args:
            survivors: of a forward.
            training: its mode.
        """
        modules = survivors.snapshot.modules
        self.num_changing[training] += survivors.is_counted
        with torch.no_grad():
            tensors = self._replace(survivors, modules)
            for before, after in survivors.loose:
                before.copy_(after)
        for (position, name), value in survivors.values.items():
            modules[position].__dict__[name] = value
        if not survivors.is_empty:
            self.add(survivors.snapshot, survivors.values, tensors)

    def add(self, snapshot: ModuleSnapshot, values: AttributeMap, tensors: TensorMap) -> None:
        """Have passes that wait get values of attributes, and tensors in the place of others."""
        link = Link()
        self.latest.snapshot, self.latest.values, self.latest.tensors = snapshot, values, tensors
        self.latest.next = link
        self.latest = link

    def _replace(self, survivors: Survivors, modules: Sequence[nn.Module]) -> TensorMap:
        """Change the buffers; return those that were put in the place of others."""
        found: dict[tuple[int, str], tuple[Tensor | None, Tensor | None]] = {}
        own: dict[int, Tensor] = {}  # by what the forward put in several places
        for position, name, before, after, is_replaced in survivors.buffers:
            if not is_replaced:
                before.copy_(after)  # type: ignore[union-attr, arg-type]
                continue
            module = modules[position]
            now = module._buffers.get(name)
            if now is not before and self._put.get((id(module), name), _dead)() is not now:
                continue  # the caller's since the call
            if after is not None:
                device = after.device if before is None else before.device
                after = own.setdefault(id(after), _own(after, device))
                self._put[id(module), name] = weakref.ref(after)
            module._buffers[name] = after
            if (position, name) in survivors.transient:
                module._non_persistent_buffers_set.add(name)
            found[position, name] = before, after
        return found


@dataclass(slots=True)
class Link:
    """What one forward has carried into a module."""

    snapshot: ModuleSnapshot | None = None
    values: AttributeMap = field(default_factory=dict)
    tensors: TensorMap = field(default_factory=dict)
    next: Link | None = None

    def values_since(self, snapshot: ModuleSnapshot) -> AttributeMap:
        """Return the values that were added since this link was the latest.

        Args:
            snapshot: whose positions the result has.
        """
        if self.next is None:
            return {}
        found: dict[tuple[int, str], Any] = {}
        for link, positions in self._since(snapshot):
            for (place, name), value in link.values.items():
                if place in positions:
                    found[positions[place], name] = value
        return found

    def tensors_since(self, snapshot: ModuleSnapshot) -> Mapping[tuple[int, str], Tensor | None]:
        """Return the tensors that were put in the place of those of a snapshot, with its positions."""
        found: dict[tuple[int, str], Tensor | None] = {}
        for link, positions in self._since(snapshot):
            for (place, name), (before, after) in link.tensors.items():
                if place in positions:
                    mine = positions[place], name
                    if (found[mine] if mine in found else snapshot.tensor_at(*mine)) is before:
                        found[mine] = after
        return found

    def _since(self, snapshot: ModuleSnapshot) -> Iterator[tuple[Link, Mapping[int, int]]]:
        """Yield this link and the later ones, and which position in the snapshot each of theirs has."""
        link = self
        positions = {id(each): position for position, each in enumerate(snapshot.modules)}
        while link.next is not None:
            assert link.snapshot is not None, "only the latest is empty"
            modules = enumerate(link.snapshot.modules)
            yield link, {place: positions[id(each)] for place, each in modules if id(each) in positions}
            link = link.next


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """Return what the original can hold: the tensor itself, unless it has a history or is elsewhere."""
    return tensor.detach().to(device) if tensor.requires_grad or tensor.device != device else tensor
