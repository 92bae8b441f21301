"""What of a forward's changes to its replica survives in the module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .snapshot import ModuleSnapshot


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

    def apply(self) -> None:
        """Carry them into the original."""
        modules = self.snapshot.modules
        for position, name in self.transient:
            modules[position]._non_persistent_buffers_set.add(name)
        own: dict[int, Tensor] = {}  # by what the forward put in several places
        with torch.no_grad():
            for position, name, before, after, is_replaced in self.buffers:
                if not is_replaced:
                    before.copy_(after)  # type: ignore[union-attr, arg-type]
                elif after is None:
                    modules[position]._buffers[name] = None
                else:
                    device = after.device if before is None else before.device
                    modules[position]._buffers[name] = own.setdefault(id(after), _own(after, device))
            for before, after in self.loose:
                before.copy_(after)
        for (position, name), value in self.values.items():
            modules[position].__dict__[name] = value


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """Return what the original can hold: the tensor itself, unless it has a history or is elsewhere."""
    return tensor.detach().to(device) if tensor.requires_grad or tensor.device != device else tensor
